"""Weights from a local file."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from gidef.errors import InputError

_STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


def load_pretrained(backbone: nn.Module, path: str | Path, *, statistics: bool) -> None:
    """Copy a safetensors file into the backbone's parameters and buffers, in place; dtypes are converted.

    Names and shapes must agree, with two exceptions: the classifier (the module of timm's `get_classifier()`) keeps its
    initial weights where the file has none or other shapes; and with `statistics` False the file's running statistics,
    which GroupNorm has no use for, are skipped.

    Raises:  InputError if the file is missing or unreadable, or that lists what does not agree; then nothing was loaded.
    """
    try:
        stored = load_file(path)
    except (OSError, SafetensorError) as error:
        raise InputError(f"pretrained={str(path)!r} cannot be read ({error}): expected a .safetensors file with the backbone's weights.") from error
    if not statistics:
        stored = {name: tensor for name, tensor in stored.items() if name.rpartition(".")[2] not in _STATISTICS}
    own = backbone.state_dict()
    head = _classifier_names(backbone)
    wrong = []
    for name in sorted(own.keys() | stored.keys()):
        if name not in stored:
            if name not in head and not name.endswith("num_batches_tracked"):  # which no frozen layer reads, and a round counts afresh
                wrong.append(f"{name} is missing")
        elif name not in own:
            wrong.append(f"{name} is not in the model")
        elif own[name].shape != stored[name].shape:
            if name not in head:
                wrong.append(f"{name} is {tuple(stored[name].shape)} instead of {tuple(own[name].shape)}")
            del stored[name]
    if wrong:
        listed = "; ".join(wrong[:8]) + (f"; and {len(wrong) - 8} more" if len(wrong) > 8 else "")
        raise InputError(
            f"pretrained={str(path)!r} does not fit {type(backbone).__name__}: {listed}. Use the weights of the same model, image size and "
            'channels; weights for 224 pixels need small_stem=False, a file without running statistics needs norm="group".'
        )
    with torch.no_grad():
        for name, tensor in stored.items():
            own[name].copy_(tensor)


def _classifier_names(backbone: nn.Module) -> set[str]:
    """Names of the classifier's tensors; none if the backbone does not say."""
    get = getattr(backbone, "get_classifier", None)
    heads = get() if get is not None else ()
    heads = heads if isinstance(heads, (tuple, list)) else (heads,)
    wanted = {id(tensor) for head in heads if isinstance(head, nn.Module) for tensor in head.state_dict(keep_vars=True).values()}
    return {name for name, tensor in backbone.state_dict(keep_vars=True).items() if id(tensor) in wanted}
