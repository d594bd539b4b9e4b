"""What modules of an attack copy become, and the tape that their forwards share; `surgery_rules` says which becomes which."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from gidef.attack.grouped import Convolved
from gidef.errors import InputError
from gidef.models.norms import affine, after_norm, moments, rescaled
from gidef.models.surgery import hardsigmoid
from gidef.types import Tensors

MASKS = "masks."
"""Prefix of dropout's masks in `known`: "masks.<module>", and "masks.<module>:2" for that module's second draw in one forward."""
BatchNormPolicy = Literal["eval", "train", "keep"]
DropoutPolicy = Literal["off", "masks"]
Statistics = list[tuple[Tensor, Tensor]]
"""(mean, variance) of each BatchNorm, (channels,) both, in the order of `norm_names`."""

_SELU = 1.7580993408473766  # λα: alpha dropout sets entries to −λα


class Tape:
    """What one forward of a copy takes besides its tensors, and leaves behind; shared by the copy's modules."""

    def __init__(self, batch_norm: BatchNormPolicy, dropout: DropoutPolicy, fused_attention: bool) -> None:
        self.batch_norm, self.dropout, self.fused_attention = batch_norm, dropout, fused_attention
        self.names: frozenset[str] = frozenset()
        self.measured: dict[str, tuple[tuple[int, ...], float]] | None = None
        self.begin({}, None)

    def begin(self, known: Tensors, statistics: dict[str, Statistics] | None) -> None:
        self.known, self.statistics, self.calls = known, statistics, Counter()

    def mask(self, module: str, shape: Sequence[int], rate: float, like: Tensor) -> Tensor:
        """The mask of this draw, of the dtype and on the device of what it multiplies."""
        self.calls[module] += 1
        name, shape = MASKS + module + (f":{self.calls[module]}" if self.calls[module] > 1 else ""), tuple(shape)
        if self.measured is not None:
            self.measured[name] = (shape, rate)
            return like.new_full(shape, 1 - rate)
        mask = self.known.get(name)
        if mask is None or mask.shape != shape:
            what = "is missing" if mask is None else f"has shape {tuple(mask.shape)}"
            raise InputError(
                f"mask {name!r} {what}: expected {shape} among the known tensors. Search or draw it (mask_shapes, draw_masks), or attack with "
                'dropout="off".'
            )
        return mask.to(like)


class Drop(NamedTuple):
    """A dropout: its rate, which entries share one of the mask's, and what the mask does."""

    rate: float
    over: Literal["elements", "channels", "examples", "batch"] = "elements"
    alpha: bool = False
    scaled: bool = True

    def __call__(self, tape: Tape, module: str, x: Tensor) -> Tensor:
        if self.rate == 0:
            return x
        if self.rate == 1:  # drawn by none; alpha dropout's limit is 0 as well
            return x * 0.0
        ones = [1] * x.ndim
        shape = {"elements": x.shape, "channels": [*x.shape[:2], *ones[2:]], "examples": [*x.shape[:1], *ones[1:]], "batch": ones}[self.over]
        mask = tape.mask(module, shape, self.rate, x)
        if self.alpha:
            scale = 1 / math.sqrt((_SELU**2 * self.rate + 1) * (1 - self.rate))
            return scale * (x * mask + _SELU * (mask - 1 + self.rate))
        return x * (mask / (1 - self.rate)) if self.scaled else x * mask


DROPOUTS: dict[Callable, Drop] = {
    F.dropout: Drop(0.5),
    F.dropout1d: Drop(0.5, "channels"),
    F.dropout2d: Drop(0.5, "channels"),
    F.dropout3d: Drop(0.5, "channels"),
    F.alpha_dropout: Drop(0.5, alpha=True),
    F.feature_alpha_dropout: Drop(0.5, "channels", alpha=True),
}


class Ramp:
    """nn.Hardsigmoid, twice differentiable."""

    def forward(self, x: Tensor) -> Tensor:
        return hardsigmoid(x)


class PureNorm:
    """BatchNorm as a pure function, with what timm's BatchNormAct2d does after it."""

    def forward(self, x: Tensor) -> Tensor:
        batch = self.training or self.running_mean is None
        return after_norm(self, _normalised(self._tape, self._name, x, self.running_mean, self.running_var, self.weight, self.bias, self.eps, batch))


class InputNorm:
    """InstanceNorm in train mode, without its update of the running statistics."""

    def forward(self, x: Tensor) -> Tensor:
        return F.instance_norm(x, None, None, self.weight, self.bias, True, 0.0, self.eps)


class Masked:
    """A dropout module with its mask from the tape."""

    def forward(self, x: Tensor) -> Tensor:
        return self._drop(self._tape, self._name, x)


class GlobalMean:
    """Average pooling to one position. PyTorch's own is slow for channels-last maps: it has no batching rule, and loops over attacks."""

    def forward(self, x: Tensor) -> Tensor:
        return x.mean(self._dims, keepdim=True)


class Grouped:
    """A convolution of many groups, by `Convolved`."""

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = self.weight, self.bias
        if torch.is_autocast_enabled(x.device.type):
            dtype = torch.get_autocast_dtype(x.device.type)
            x, weight, bias = x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
        y = Convolved.apply(x, weight, (self.stride, self.padding, self.dilation, self.groups))
        return y if bias is None else y + bias.view(-1, *[1] * len(self.stride))


class MathHeads:
    """nn.MultiheadAttention by plain products."""

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, key_padding_mask: Tensor | None = None, need_weights: bool = True,
        attn_mask: Tensor | None = None, average_attn_weights: bool = True, is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        # is_causal is a hint about attn_mask here, as in PyTorch
        if query.ndim == 2:
            padding = None if key_padding_mask is None else key_padding_mask.unsqueeze(0)
            out, weights = (t.squeeze(0) for t in self._attend(query.unsqueeze(0), key.unsqueeze(0), value.unsqueeze(0), padding, attn_mask))
        elif self.batch_first:
            out, weights = self._attend(query, key, value, key_padding_mask, attn_mask)
        else:
            out, weights = self._attend(query.transpose(0, 1), key.transpose(0, 1), value.transpose(0, 1), key_padding_mask, attn_mask)
            out = out.transpose(0, 1)
        if not need_weights:
            return out, None
        return out, weights.mean(-3) if average_attn_weights else weights

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, padding: Tensor | None, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """(B, L, E), (B, S, E), (B, S, E), (B, S) and (L, S) or (B heads, L, S) → (B, L, E) and weights (B, heads, L, S)."""
        split = self.in_proj_weight.chunk(3) if self._qkv_same_embed_dim else (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
        biases = (None,) * 3 if self.in_proj_bias is None else self.in_proj_bias.chunk(3)
        q, k, v = (F.linear(t, w, b) for t, w, b in zip((q, k, v), split, biases, strict=True))
        keys = k.shape[1]
        if self.bias_k is not None:
            k, v = (torch.cat([t, bias.expand(len(t), 1, -1)], 1) for t, bias in ((k, self.bias_k), (v, self.bias_v)))
        if self.add_zero_attn:
            k, v = (F.pad(t, (0, 0, 0, 1)) for t in (k, v))
        appended = k.shape[1] - keys
        q, k, v = (t.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for t in (q, k, v))
        scores = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])
        for hidden in (None if padding is None else padding[:, None, None], mask if mask is None or mask.ndim == 2 else mask.unflatten(0, (-1, self.num_heads))):
            if hidden is not None:  # True hides, unlike in F.scaled_dot_product_attention
                hidden = F.pad(hidden, (0, appended))
                scores = scores.masked_fill(hidden, -math.inf) if hidden.dtype == torch.bool else scores + hidden
        weights = scores.softmax(-1)
        if self._masked:
            weights = Drop(self.dropout)(self._tape, self._name, weights)
        return self.out_proj((weights @ v).transpose(1, 2).flatten(2)), weights


class Watched:
    """A module whose own code calls functions that cannot be attacked."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        with _Replaced(self._tape, self._name, self._masked, getattr(self, "num_batches_tracked", None)):
            return super().forward(*args, **kwargs)


class _Replaced(TorchFunctionMode):
    """Within one module: functional attention, hardsigmoid, dropout and BatchNorm as `prepare` replaces modules."""

    def __init__(self, tape: Tape, name: str, masked: bool, counter: Tensor | None) -> None:
        super().__init__()
        self.tape, self.name, self.masked, self.counter = tape, name, masked, counter

    def __torch_function__(self, function: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if function in DROPOUTS:
            return self._dropout(function, *args, **kwargs)
        if function is F.hardsigmoid:
            return hardsigmoid(args[0] if args else kwargs["input"])
        if function is F.batch_norm:
            return self._batch_norm(*args, **kwargs)
        if function is F.scaled_dot_product_attention and not self.tape.fused_attention:
            return self._attention(*args, **kwargs)
        if function is F.multi_head_attention_forward and "need_weights" in kwargs and not self.tape.fused_attention:
            out, weights = function(*args, **{**kwargs, "need_weights": True})  # which makes PyTorch compute them
            return out, weights if kwargs["need_weights"] else None
        if function is Tensor.add_ and args[0] is self.counter is not None:  # of batches, by code that goes on to F.batch_norm
            return self.counter
        if function is Tensor.bernoulli_ and self.masked and kwargs.get("generator") is None:
            keep = args[1] if len(args) > 1 else kwargs.get("p", 0.5)
            return self.tape.mask(self.name, args[0].shape, 1 - keep, args[0]).clone()  # callers scale it in place
        return function(*args, **kwargs)

    def _dropout(self, function: Callable, input: Tensor, p: float = 0.5, training: bool | None = None, inplace: bool = False) -> Tensor:
        drop = DROPOUTS[function]
        training = not drop.alpha if training is None else training  # PyTorch's defaults
        if not training or not self.masked:
            return input
        return drop._replace(rate=p)(self.tape, self.name, input)

    def _attention(
        self, query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0, is_causal: bool = False,
        scale: float | None = None, enable_gqa: bool = False,
    ) -> Tensor:  # fmt: skip
        if enable_gqa:
            key, value = (t.repeat_interleave(query.shape[-3] // t.shape[-3], -3) for t in (key, value))
        scores = query @ key.transpose(-2, -1) * (query.shape[-1] ** -0.5 if scale is None else scale)
        if is_causal:
            attn_mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
        if attn_mask is not None:
            scores = scores.masked_fill(~attn_mask, -math.inf) if attn_mask.dtype == torch.bool else scores + attn_mask
        weights = scores.softmax(-1)
        return (Drop(dropout_p)(self.tape, self.name, weights) if self.masked else weights) @ value

    def _batch_norm(
        self, input: Tensor, running_mean: Tensor | None, running_var: Tensor | None, weight: Tensor | None = None, bias: Tensor | None = None,
        training: bool = False, momentum: float = 0.1, eps: float = 1e-5,
    ) -> Tensor:  # fmt: skip
        return _normalised(self.tape, self.name, input, running_mean, running_var, weight, bias, eps, training)


class _NothingCached(dict):
    """A cache that never holds: what was computed within a transform of torch.func must not outlive it."""

    def __contains__(self, key: object) -> bool:
        return False

    def __getitem__(self, key: object) -> Any:
        return self.pop(key)


class Uncached:
    """One of timm's attentions that keep their bias in eval mode; they renew the cache whenever they are moved or cast."""

    @property
    def attention_bias_cache(self) -> dict:
        return self.__dict__.setdefault("_nothing", _NothingCached())

    @attention_bias_cache.setter
    def attention_bias_cache(self, cache: dict) -> None:
        pass


def _normalised(
    tape: Tape, name: str, x: Tensor, mean: Tensor | None, var: Tensor | None, weight: Tensor | None, bias: Tensor | None, eps: float, batch: bool
) -> Tensor:
    """BatchNorm of x (B, channels, …): by the batch's statistics, or as an affine map. In float32 at least, as PyTorch's own."""
    dtype = x.dtype
    x = x.float() if dtype in (torch.bfloat16, torch.float16) else x
    if batch or tape.statistics is not None:
        if batch and x.numel() == x.shape[1] and tape.measured is None:
            raise InputError(f"BatchNorm {name!r} gets one value per channel, {tuple(x.shape)}: take larger batches or images, or eval mode.")
        batch_mean, centred, batch_var = moments(x)
        if tape.statistics is not None:
            tape.statistics.setdefault(name, []).append((batch_mean.flatten(), batch_var.flatten()))
    if batch:
        return rescaled(centred, batch_var, weight, bias, eps).to(dtype)
    return affine(x, mean, var, weight, bias, eps).to(dtype)
