"""The inner step of many attacks, loss and gradients, in one of several executions that differ in speed alone.

    "loop"       one attack after another
    "vmap"       all attacks as one vectorised program
    "traced"     the same, recorded once as a graph of plain operators and replayed without Python's dispatch; on a GPU as a CUDA graph
    "compiled"   the recorded graph, compiled by torch.compile; on a GPU as a CUDA graph

Both derivatives, the client's and the attacker's, are taken by function transforms inside the recorded program, so that the graph is
one forward pass and nothing differentiates a compiled function, which torch.compile cannot do.
"""

from __future__ import annotations

import contextlib
import dataclasses
import threading
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
import torch.utils._pytree as pytree
from torch import Tensor
from torch.func import grad, grad_and_value, jvp, vjp, vmap
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode

from gidef.attack.convolutions import FastConvolutions, folded_by_shifts
from gidef.attack.kinks import CurvedKinks
from gidef.attack.matching import RESERVED, TRUST, Matching, Point, Simulate, distance_and_slope
from gidef.attack.pools import GatheredPools, pools_need_help
from gidef.errors import InputError
from gidef.precision import tf32
from gidef.similarity import total_variation
from gidef.types import Tensors

MODES = ("loop", "vmap", "traced", "compiled")
PRECISIONS = ("float32", "tf32", "bfloat16", "bfloat16_all")
"""Of the client's pass: as it is; products (convolutions, linear layers) in a GPU's TF32; in bfloat16; parameters and targets kept in bfloat16 too."""

COMPILED = {torch.ops.aten.col2im.default: folded_by_shifts}
"""Operators that a compiler is given in other words."""

Evaluate = Callable[..., tuple[Tensor, Tensor, Tensor, Tensors]]
"""evaluate(variables, given, target, scale, knobs) → the loss that is descended, the final objective, its fit (K,) each, and gradients."""


class LowProducts(TorchFunctionMode):
    """Within this context, convolutions and matrix products are in bfloat16, their results in the type of their inputs.

    Unlike autocast it leaves all else alone, whose second derivatives do not bear mixed types (group norm's).
    """

    def __torch_function__(self, function: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if function not in _PRODUCTS:
            return function(*args, **(kwargs or {}))
        args, kwargs = pytree.tree_map(_shorten, (args, kwargs or {}))
        return function(*args, **kwargs).to(torch.float32)


_PRODUCTS = {F.conv1d, F.conv2d, F.conv3d, F.linear, torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.bmm, Tensor.bmm, torch.mm, Tensor.mm}


def _shorten(value: Any) -> Any:
    return value.to(torch.bfloat16) if isinstance(value, Tensor) and value.is_floating_point() else value


def one_attack(simulate: Simulate, matching: Matching, precision: str = "float32", many: bool = False) -> Evaluate:
    """The inner step of a single attack, as a pure function; variables, given and knobs without the leading dim.

    many: it will be vectorised over attacks.
    """

    def unpacked(searched: Tensors, given: tuple) -> tuple[Tensors, Tensors, Tensor, Tensor, Tensor | None]:
        """The simulator's arguments at a point."""
        params, known, targets = given
        if precision == "bfloat16_all":  # kept short, and long only while they are in use
            params, known = (widened(tensors, targets) for tensors in (params, known))
        images = matching.render(searched["code"]) if matching.render is not None else searched["images"]
        labels = searched["logits"].softmax(-1) if "logits" in searched else targets
        more = {name: tensor for name, tensor in searched.items() if name not in RESERVED}
        known = {name: tensor for name, tensor in known.items() if not name.startswith(TRUST)}
        return params, {**known, **more}, images, labels, searched.get("noise")

    def widened(update: Tensors, like: Tensor) -> Tensors:
        return {name: tensor.to(like.dtype) for name, tensor in update.items()}

    def trusted(update: Tensors, given: tuple) -> Tensors:
        """Each tensor times what the observation trusts it, as the target is."""
        factors = {name.removeprefix(TRUST): tensor.to(given[2].dtype) for name, tensor in given[1].items() if name.startswith(TRUST)}
        return {name: tensor * factors[name] if name in factors else tensor for name, tensor in update.items()}

    pictures = {name: one.smooth for name, one in matching.searched.items() if one.smooth}

    def in_context(knobs: Tensors) -> contextlib.ExitStack:
        stack = contextlib.ExitStack()
        if "width" in knobs:
            stack.enter_context(CurvedKinks(knobs["width"]))
        if many and pools_need_help():
            stack.enter_context(GatheredPools())
        if precision in ("bfloat16", "bfloat16_all"):  # the client's pass only; the matching loss stays as it is
            stack.enter_context(LowProducts())
        return stack

    def rest(searched: Tensors, given: tuple, knobs: Tensors) -> tuple[Tensor, Tensor]:
        """Everything but the distance: as it is descended, and at the final weights."""
        params, known, images, labels, noise = unpacked(searched, given)
        roughness = total_variation(images).mean() + sum(weight * total_variation(searched[name]).mean() for name, weight in pictures.items())
        now, last = knobs["tv"] * roughness, matching.tv * roughness
        if noise is not None:
            power = noise.square().mean()
            now, last = now + knobs["noise_weight"] * power, last + matching.noise_weight * power
        more = sum((weight * prior(Point(images, labels, noise, params, known)) for weight, prior in matching.priors), torch.zeros_like(now))
        if "code" in searched:
            more = more + matching.code_weight * searched["code"].square().mean()
        return now + more, last + more

    def by_double_backward(searched: Tensors, given: tuple, target: Tensors, scale: Tensor, knobs: Tensors) -> tuple[Tensor, ...]:
        with in_context(knobs), FastConvolutions() if many and precision in ("float32", "tf32") else contextlib.nullcontext():
            update, pull = vjp(lambda searched: trusted(simulate(*unpacked(searched, given)), given), searched)
        fit, slope = distance_and_slope(matching.distance, update, target, scale)
        (through,) = pull(slope)
        gradients, (now, last) = grad_and_value(lambda searched: rest(searched, given, knobs), has_aux=True)(searched)
        return fit + now, fit + last, fit, {name: through[name] + gradients[name] for name in searched}

    def by_first_order(searched: Tensors, given: tuple, target: Tensors, scale: Tensor, knobs: Tensors) -> tuple[Tensor, ...]:
        """∂distance/∂x = d/dh ∂L/∂x (θ + h v) at h = 0, with v = ∂distance/∂g: see large.py."""
        params, rest_given = widened(given[0], scale), given[1:]

        def loss(params: Tensors, searched: Tensors) -> Tensor:
            return simulate.loss(*unpacked(searched, (params, *rest_given)))

        with in_context({} if matching.form == "central_difference" else knobs):
            update = grad(loss)(params, searched)
        update = trusted({name: update[name] for name in target}, given)
        fit, direction = distance_and_slope(matching.distance, update, target, scale)
        direction = trusted(direction, given)
        # tensors that are not matched stay where they are
        direction = {name: direction[name] if name in direction else torch.zeros_like(tensor) for name, tensor in params.items()}
        if matching.form == "forward_over_reverse":
            with in_context(knobs):
                _, slopes = jvp(lambda params: grad(loss, argnums=1)(params, searched), (params,), (direction,))
        else:
            h = matching.difference_step * _norm(params) / (_norm(direction) + torch.finfo(scale.dtype).tiny)
            with in_context({}):  # no curved kinks: the difference sees them open and close
                ahead, behind = (
                    grad(loss, argnums=1)({n: t + sign * h * direction[n] for n, t in params.items()}, searched) for sign in (1.0, -1.0)
                )
            slopes = {name: (ahead[name] - behind[name]) / (2 * h) for name in searched}
        gradients, (now, last) = grad_and_value(lambda searched: rest(searched, given, knobs), has_aux=True)(searched)
        return fit + now, fit + last, fit, {name: slopes[name] + gradients[name] for name in searched}

    return by_double_backward if matching.form == "double_backward" else by_first_order


def _norm(tensors: Tensors) -> Tensor:
    return sum(tensor.square().sum() for tensor in tensors.values()).sqrt()


class Programs:
    """The recorded and compiled inner steps of one attack, all of its stages, by shape and settings; threads of a rank share them.

    A recorded graph holds no Python state of the simulator, so one serves all threads. What cannot be recorded or compiled runs as the
    next simpler mode, and `notices` says so once.
    """

    def __init__(self) -> None:
        self._lock, self._made = threading.Lock(), {}
        self.notices: list[str] = []
        self.told: set[str] = set()
        """For whoever shows the notices: those that were."""

    def get(
        self, simulate: Simulate, matching: Matching, dims: tuple[Any, ...], inputs: tuple[Any, ...], *, mode: str, precision: str = "float32"
    ) -> Evaluate:
        """The inner step over all attacks of `inputs`, in which dims say what has a leading dim of attacks."""
        if mode not in MODES:
            raise InputError(f"mode={mode!r} is unknown: choose one of {', '.join(MODES)}.")
        if precision not in PRECISIONS:
            raise InputError(f"precision={precision!r} is unknown: choose one of {', '.join(PRECISIONS)}.")
        if matching.form != "double_backward" and not callable(getattr(simulate, "loss", None)):
            raise InputError(f"form={matching.form!r} needs a simulator of one gradient that carries its loss; this one has none: use double_backward.")
        if precision != "tf32" and not inputs[3].is_cuda:
            return self._get(simulate, matching, dims, inputs, mode, precision)
        with tf32(precision == "tf32"):
            evaluate = self._get(simulate, matching, dims, inputs, mode, precision)

        def in_precision(*inputs: Any) -> tuple[Tensor, Tensor, Tensor, Tensors]:
            with tf32(precision == "tf32"):
                return evaluate(*inputs)

        return in_precision

    def _get(self, simulate: Simulate, matching: Matching, dims: tuple[Any, ...], inputs: tuple[Any, ...], mode: str, precision: str) -> Evaluate:
        step = one_attack(simulate, matching, precision, many=mode != "loop")
        if mode == "loop":
            return _loop(step, dims)
        if mode == "vmap":
            return vmap(step, in_dims=dims)
        leaves, layout = pytree.tree_flatten(inputs)
        shapes = tuple((tuple(leaf.shape), leaf.dtype, leaf.device) for leaf in leaves)
        # graphs of other widths have the same shape; a matching holds closures, so the identities of its fields name it, and it is kept alive beside. No step
        # reads where attacks start, which a second stage is told anew for each chunk
        own = tuple(id(getattr(matching, spec.name)) for spec in dataclasses.fields(matching) if spec.name != "start")
        key = (mode, precision, shapes, str(dims), own)
        with self._lock:
            if key not in self._made:
                self._made[key] = (self._make(vmap(step, in_dims=dims), leaves, layout, mode), matching)
            return self._made[key][0]

    def _make(self, program: Callable, leaves: list[Tensor], layout: Any, mode: str) -> Evaluate:
        def flat(*leaves: Tensor) -> tuple[Tensor, ...]:
            loss, final, fit, gradients = program(*pytree.tree_unflatten(list(leaves), layout))
            return (loss, final, fit, *(gradients[name] for name in sorted(gradients)))

        names = sorted(pytree.tree_unflatten(leaves, layout)[0])
        try:
            with warnings.catch_warnings(), torch.no_grad():
                warnings.simplefilter("ignore")
                graph = make_fx(flat, decomposition_table=COMPILED if mode == "compiled" else None)(*leaves)
                graph.graph.eliminate_dead_code()
                graph.recompile()
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # whatever a model's code raises when it is recorded; it may still run
            self.notices.append(f"the attack's program could not be recorded ({_first_line(error)}): it runs vectorised and unrecorded.")
            return program
        run = self._compiled(graph, leaves) if mode == "compiled" else graph
        if leaves[0].is_cuda:
            run = self._captured(run, leaves)

        def evaluate(*inputs: Any) -> tuple[Tensor, ...]:
            loss, final, fit, *gradients = run(*pytree.tree_leaves(inputs))
            return loss, final, fit, dict(zip(names, gradients, strict=True))

        return evaluate

    def _compiled(self, graph: torch.fx.GraphModule, leaves: list[Tensor]) -> Callable:
        # on a CPU no rule tells which layout of images is faster: both are tried; a wrapper in C++ saves a tenth where kernels are many
        tried = [{}] if leaves[0].is_cuda else [{"options": {"cpp_wrapper": True, "layout_optimization": choice}} for choice in (False, True)]
        found, errors = [], []
        for settings in tried:
            try:
                with warnings.catch_warnings(), torch.no_grad():
                    warnings.simplefilter("ignore")
                    compiled = torch.compile(graph, fullgraph=True, dynamic=False, **settings)
                    compiled(*leaves)
                    found.append((_seconds(compiled, leaves) if len(tried) > 1 else 0.0, compiled))
            except torch.OutOfMemoryError:
                raise
            except Exception as error:  # no C++ compiler, an operator without a lowering
                errors.append(error)
        if not found:
            self.notices.append(f"the attack's program could not be compiled ({_first_line(errors[0])}): it runs recorded, not compiled.")
            return graph
        return min(found, key=lambda one: one[0])[1]

    def _captured(self, program: Callable, leaves: list[Tensor]) -> Callable:
        """The program as a CUDA graph, or itself where it cannot be captured, as when it asks the device for a value."""
        try:
            return CudaGraph(program, leaves)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            torch.cuda.synchronize(leaves[0].device)
            self.notices.append(f"the attack's program could not be captured as a CUDA graph ({_first_line(error)}): its kernels are launched one by one.")
            return program


class CudaGraph:
    """A function of tensors on one GPU, captured once and replayed: one launch instead of thousands. It may not ask the device for a value.

    The arguments of later calls are copied into those of the capture; those that are the very tensors of the last call, unchanged, are not.
    Several threads may call it: one at a time is served, on the stream of the caller.
    """

    WARM_UPS = 2

    def __init__(self, program: Callable[..., tuple[Tensor, ...]], leaves: list[Tensor]) -> None:
        self._lock, device = threading.Lock(), leaves[0].device
        self._own = [leaf.detach().clone() for leaf in leaves]
        self._seen = [(leaf, leaf._version) for leaf in leaves]
        side = torch.cuda.Stream(device)
        side.wait_stream(torch.cuda.current_stream(device))
        with torch.no_grad():
            with torch.cuda.stream(side):
                for _ in range(self.WARM_UPS):
                    program(*self._own)
            torch.cuda.current_stream(device).wait_stream(side)
            self._graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self._graph, stream=side, capture_error_mode="thread_local"):
                self._found = program(*self._own)
        self._program = program  # its constants live as long as the graph

    def __call__(self, *leaves: Tensor) -> tuple[Tensor, ...]:
        with self._lock, torch.no_grad():
            for place, (leaf, (seen, version)) in enumerate(zip(leaves, self._seen, strict=True)):
                if leaf is not seen or leaf._version != version:
                    self._own[place].copy_(leaf)
                    self._seen[place] = (leaf, leaf._version)
            self._graph.replay()
            return tuple(tensor.clone() for tensor in self._found)


def _seconds(program: Callable, leaves: list[Tensor]) -> float:
    """Of a call, the fastest of three."""
    times = []
    for _ in range(3):
        began = time.perf_counter()
        program(*leaves)
        times.append(time.perf_counter() - began)
    return min(times)


def _first_line(error: Exception) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0][:200] if text else ''}"


def _loop(step: Evaluate, dims: tuple[Any, ...]) -> Evaluate:
    def evaluate(*inputs: Any) -> tuple[Tensor, ...]:
        attacks = len(next(iter(inputs[0].values())))
        each = [step(*pick(inputs, dims, attack)) for attack in range(attacks)]
        loss, final, fit, gradients = zip(*each, strict=True)
        return torch.stack(loss), torch.stack(final), torch.stack(fit), {name: torch.stack([g[name] for g in gradients]) for name in gradients[0]}

    return evaluate


def pick(value: Any, dims: Any, attack: int) -> Any:
    """One attack's part of a value; dims as vmap's in_dims."""
    if isinstance(value, dict):
        return {name: pick(part, dims[name] if isinstance(dims, dict) else dims, attack) for name, part in value.items()}
    if isinstance(value, tuple):
        return tuple(pick(part, dims[place] if isinstance(dims, tuple) else dims, attack) for place, part in enumerate(value))
    return value if dims is None else value[attack]
