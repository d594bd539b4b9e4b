"""Names of the places where a backbone can be cut: behind a module, or before it."""

from __future__ import annotations

import difflib

from torch import nn

from gidef.errors import InputError

BEFORE = "before:"
"""Prefix of a cut that is what goes into a module instead of what comes out, such as "before:head"."""
CLASSIFIER = "before:classifier"
"""The cut before the last layer, whatever its name."""
STAGE = "stage:"
"""Prefix of a cut behind the stage of that number, from 0 (see `stages`), whatever its name."""


def cuts(backbone: nn.Module) -> list[str]:
    """Names of cuts to choose from, in the order of the modules.

    The backbone's own attribute `cuts` if it has one; otherwise timm's feature modules, and the blocks of the
    backbone's top-level sequences and of their stages. A cut that the list lacks may still do: `SplitModel` checks
    each cut by running the backbone.
    """
    if hasattr(backbone, "cuts"):
        return list(backbone.cuts)
    found = set(_feature_modules(backbone))
    for top, container in backbone.named_children():
        if isinstance(container, (nn.Sequential, nn.ModuleList)):
            for index, stage in container.named_children():
                found.add(f"{top}.{index}")
                blocks = getattr(stage, "blocks", None)
                if isinstance(blocks, (nn.Sequential, nn.ModuleList)):
                    found.update(f"{top}.{index}.blocks.{name}" for name, _ in blocks.named_children())
    return [name for name, _ in backbone.named_modules() if name in found]


def default_cut(backbone: nn.Module) -> str:
    """The cut that `cut=None` takes: an early one.

    The backbone's attribute `default_cut`; or the third block of a plain transformer; or the first stage of a pyramid.

    Raises:  InputError if the backbone offers neither that attribute nor timm's feature modules.
    """
    if hasattr(backbone, "default_cut"):
        return backbone.default_cut
    found = _feature_stages(backbone)
    if not found:
        raise InputError(f"{type(backbone).__name__} has no default cut: name one of {shown_cuts(backbone)}.")
    reductions = {info["reduction"] for info in _feature_info(backbone)}
    return found[min(2, len(found) - 1)] if len(reductions) == 1 else found[0]


def stages(backbone: nn.Module) -> list[str]:
    """The natural stages of a backbone in order, without its stem: blocks of a transformer, stages of a pyramid.

    The backbone's own attribute `cuts` if it has one; otherwise timm's feature modules that have a number and layers.

    Raises:  InputError if it has neither.
    """
    found = list(backbone.cuts) if hasattr(backbone, "cuts") else _feature_stages(backbone)
    if not found:
        raise InputError(f"{type(backbone).__name__} tells no stages: give it an attribute `cuts`, the names of its blocks in order.")
    return found


def check_cut(backbone: nn.Module, cut: str) -> str:
    """`cut` by the module's own name if the backbone has such a module; InputError with near matches and valid names otherwise.

    "stage:0" becomes the name of the first stage, "before:classifier" that of the last layer behind "before:".
    """
    if cut.startswith(STAGE):
        names, number = stages(backbone), cut.removeprefix(STAGE)
        if not number.isdigit() or int(number) >= len(names):
            raise InputError(f"cut {cut!r}: {type(backbone).__name__} has stages 0 to {len(names) - 1}. Choose one of them.")
        return names[int(number)]
    if cut == CLASSIFIER:
        return BEFORE + _classifier(backbone)
    if cut.startswith(BEFORE):
        return BEFORE + check_cut(backbone, cut.removeprefix(BEFORE))
    names = [name for name, _ in backbone.named_modules() if name]
    if cut in names:
        return cut
    near = difflib.get_close_matches(str(cut), names, n=3, cutoff=0.6)
    hint = f" Did you mean {' or '.join(map(repr, near))}?" if near else ""
    raise InputError(f"cut {cut!r} is no module of {type(backbone).__name__}.{hint} Valid cuts are {shown_cuts(backbone)}.")


def shown_cuts(backbone: nn.Module) -> str:
    """The names for a message, at most 16."""
    names = cuts(backbone)
    if len(names) > 16:
        names = [*names[:16], f"and {len(names) - 16} more (gidef.models.cuts lists them)"]
    return ", ".join(names) if names else "the names in backbone.named_modules()"


def _classifier(backbone: nn.Module) -> str:
    """Name of the last layer: what `get_classifier` gives, or else the last linear layer."""
    last = backbone.get_classifier() if hasattr(backbone, "get_classifier") else None
    names = [name for name, module in backbone.named_modules() if (module is last if last is not None else isinstance(module, nn.Linear)) and name]
    if not names:
        raise InputError(f"{type(backbone).__name__} tells no single last layer: name it, as in cut={BEFORE + 'head'!r}.")
    return names[-1]


def _feature_stages(backbone: nn.Module) -> list[str]:
    # stems have no number in their name, or lack a convolution of their own: ResNet's act1, MobileNet's bn1
    return [name for name in _feature_modules(backbone) if any(c.isdigit() for c in name) and _has_layers(backbone.get_submodule(name))]


def _feature_info(backbone: nn.Module) -> list[dict]:
    """timm keeps a list of dicts, or an object that holds one."""
    info = getattr(backbone, "feature_info", None) or []
    return list(getattr(info, "info", info))


def _feature_modules(backbone: nn.Module) -> list[str]:
    names = {name for name, _ in backbone.named_modules()}
    return [info["module"] for info in _feature_info(backbone) if info["module"] in names]


def _has_layers(module: nn.Module) -> bool:
    return any(isinstance(part, (nn.Conv2d, nn.Linear)) for part in module.modules())
