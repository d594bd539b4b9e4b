"""Gradient matching on a module as it is, for models of which one attack fits neither the vectorised program nor one device.

        v = ∂distance/∂g at g = ∂L/∂θ,    ∂distance/∂x = d/dh ∂L/∂x (θ + h v) ≈ (∂L/∂x (θ + h v) − ∂L/∂x (θ − h v)) / 2h

An iteration is three plain passes: one for g, two for gradients of the images alone. There is no second derivative and no functional call,
so whatever trains can be attacked: fused attention, activation checkpointing, compiled modules, low precision, sharded parameters. The
distance and v are closed forms, streamed tensor by tensor; the attack's loop is the engine's. Kinks are held in place for the difference.

Where parameters are DTensors (FSDP2), each rank sees its shards, and the few scalars of the distance are summed over the mesh.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from gidef.attack.batch import NOT_FINITE, OK, UNTOLD, ZERO, Batch, Chunk, first_variables, targets_of
from gidef.attack.engine import ChunkRun, Progress, first_state
from gidef.attack.matching import DISTANCES, Matching, tables
from gidef.attack.program import one_attack
from gidef.errors import InputError
from gidef.types import Observation, Tensors

Loss = Callable[[Any, Tensor], Tensor]
"""loss(what the module returns, labels (B, classes) probabilities) → scalar."""

STRETCH = 2**20
"""Numbers that are summed in one go."""
_WRAPPERS = ("_orig_mod.", "_checkpoint_wrapped_module.")


def invert_large(
    observation: Observation, model: nn.Module, matching: Matching, *, seed: int, loss: Loss = F.cross_entropy, chunk: Chunk = ((0, 0),),
    checkpointing: bool = False, every: int = 50, every_s: float = math.inf,
) -> Generator[Progress, None, Tensors]:  # fmt: skip
    """Attack one observation of a gradient on the module itself, one start after another.

    Args:    observation: of kind "gradient". Its params, and what of its known tensors bears a parameter's or buffer's name, are copied into the
             module; tensors are whole ones, or DTensors that lie as the parameters do. The tensors in `update` are matched, others left;
             where they are DTensors, labels must be granted.
             model: model(images (B, C, H, W)) → outputs, or model(images, noise) where noise is searched; deterministic. It is lent: while
             the attack runs its parameters change, and its gradients are dropped. In the end it holds the observation's params.
             matching: all but `form` applies, `difference_step` in particular. Kinks are curved, or flat without `kink_width`, as in the
             vectorised program, where the model has them as modules (nn.ReLU, LeakyReLU, ReLU6, Hardtanh; nn.MaxPool2d is flat).
             seed, every, every_s: as `run_chunk`; under FSDP2 reports by the clock would part the ranks.  loss: of the client.  chunk: (number of the observation, start) of each attack; starts draw from it.
             checkpointing: recompute activations, by the model's own switch (timm, transformers) or for each block of its longest list.
    Yields:  Progress.  Returns: what `run_chunk` returns of these attacks. Under FSDP2 all ranks take every step together, and get the same.
    Memory:  three copies: θ, the observed update and the gradient, in which θ rests while θ ± h v takes its place, so that it comes back bit by
             bit; temporaries of one tensor; activations of one plain pass, and the inputs of kinks again (a byte each where flat). What the
             observation holds elsewhere comes on top; params that are the module's own tensors do not.
    Time:    7 forward passes per iteration, the floor of double backward, or 10 with checkpointing; and a dozen readings of the parameters.
    Raises:  InputError, before the first iteration, for what does not fit or is not supported: deltas, distances of one's own, `searched`, `drawn`.
    Traps:   a compiled model's kinks, those of functions (F.relu), and those of a module that checkpointing calls twice in a pass are free to
             move: a difference_step of 0.03 then samples enough of them, at a loss. With bfloat16 the step stays small all the same: v is
             concentrated on few parameters, for which it is large, and a large one meets the net's curvature. Modules that are compiled with
             CUDA graphs (mode "reduce-overhead") will not do: their gradients are overwritten.
    """  # fmt: skip
    _check(observation, matching, chunk)
    parameters = _loaded(model, observation)
    like = next(iter(parameters.values()))
    cast = {"device": like.device, "dtype": torch.float64 if like.dtype == torch.float64 else torch.float32}
    labels, targets, untold = targets_of([observation] * len(chunk), matching, cast)
    variables = first_variables(chunk, labels.shape[1], matching, seed, cast)
    passes = _Passes(model, parameters, observation, matching, loss)
    scale = passes.scale.to(cast["dtype"]).expand(len(chunk))
    knobs, rates = tables(matching, [start for _, start in chunk], list(variables), cast)
    batch = Batch(
        chunk=chunk, labels=labels, given=({}, {}, targets), target={}, scale=scale, dims=(({}, {}, 0), {}), knobs=knobs, rates=rates, seed=seed
    )  # fmt: skip
    run = ChunkRun(matching, _nothing, passes, "loop", "float32", every, every_s, 1)
    failure = torch.where(untold & (passes.failure == OK), UNTOLD, passes.failure.expand(len(chunk)))
    with _lent(model), passes.gates.installed(), _checkpointed(model) if checkpointing else contextlib.nullcontext():
        yield from run.go(batch, first_state(variables, failure, matching))
    return run.result(batch)


def on_module(
    observations: Sequence[Observation], make_model: Callable[[], nn.Module], matching: Matching, *, seed: int, **options: Any
) -> Callable[[Chunk], Generator[Progress, None, Tensors]]:
    """The last rung of `ladder.climb`: large(chunk) attacks a chunk's observations with `invert_large`, one after another.

    Args:    make_model: gives the module, on its device; asked when the first chunk comes.  options: of `invert_large`.
    """
    made: list[nn.Module] = []

    def large(chunk: Chunk) -> Generator[Progress, None, Tensors]:
        if not made:
            made.append(make_model())
        groups: dict[int, list[int]] = {}
        for row, (observation, _) in enumerate(chunk):
            groups.setdefault(observation, []).append(row)
        parts, done, failed = [], 0, 0
        for observation, rows in groups.items():
            running = invert_large(observations[observation], made[0], matching, seed=seed, chunk=tuple(chunk[row] for row in rows), **options)
            while True:
                try:
                    progress = next(running)
                except StopIteration as end:
                    parts.append(end.value)
                    break
                yield dataclasses.replace(progress, attacks=len(chunk), failed=failed + progress.failed, done=done + progress.done)
            done, failed = done + len(rows) * matching.iterations, failed + int((parts[-1]["failure"] != OK).sum())
        order = torch.tensor([row for rows in groups.values() for row in rows]).argsort()
        return {name: torch.cat([part[name] for part in parts])[order] for name in parts[0]}

    return large


def _check(observation: Observation, matching: Matching, chunk: Chunk) -> None:
    if observation.kind != "gradient":
        raise InputError(f"an observation of kind {observation.kind!r}: a module is attacked through one gradient; simulate steps in `run_chunk`.")
    if matching.distance not in DISTANCES:
        raise InputError(f"a distance of one's own is not streamed over tensors: choose one of {', '.join(DISTANCES)}.")
    for name, others in (("searched", matching.searched), ("drawn", matching.drawn)):
        if others:
            raise InputError(f"{name}={sorted(others)}: a module takes images and noise alone; give others to a simulator, in `run_chunk`.")
    if len({index for index, _ in chunk}) != 1:
        raise InputError(f"chunk={chunk}: expected starts of one observation; several are for `on_module`.")


def _named(tensors: Iterable[tuple[str, Tensor]]) -> Tensors:
    """Parameters or buffers by the name that they have in the plain module."""
    named = {}
    for name, tensor in tensors:
        for wrapper in _WRAPPERS:
            name = name.replace(wrapper, "")
        named[name] = tensor
    return named


def _loaded(model: nn.Module, observation: Observation) -> Tensors:
    """The observation's tensors, written into the module; its parameters that the observation has, by name."""
    parameters = _named(model.named_parameters())
    there = parameters | _named(model.named_buffers())
    for what, tensors in (("params", observation.params), ("update", observation.update)):
        for name, tensor in tensors.items():
            expected = tuple(parameters[name].shape) if name in parameters else "missing"
            if tuple(tensor.shape) != expected:
                raise InputError(
                    f"the observation's {what} do not fit the model: {name!r} is {tuple(tensor.shape)} there and {expected} in the model. "
                    "Give the model that the client trains, and match tensors that it has."
                )
    if missing := sorted(observation.update.keys() - observation.params.keys()):
        raise InputError(f"the observation's update has {missing[0]!r}, which its params lack: give both of the same model.")
    if not observation.update:
        raise InputError("the observation's update holds no tensor: there is nothing to match.")
    if observation.trust:
        raise InputError("the observation trusts its tensors by their noise, which a module compares all alike: match it by `run_chunk`, or leave trust empty.")
    with torch.no_grad():
        for name, tensor in {**observation.known, **observation.params}.items():
            if name in there:
                _local(there[name]).copy_(_local(_laid(tensor, there[name])))
    return {name: parameters[name] for name in observation.params}


class _Passes:
    """The inner step: takes the place of a program. Everything per tensor runs on this rank's shards."""

    def __init__(self, model: nn.Module, parameters: Tensors, observation: Observation, matching: Matching, loss: Loss) -> None:
        self.model, self.loss, self.matching, self.gates = model, loss, matching, _Gates(model)
        self.all, self.dtype = dict(parameters), next(iter(parameters.values())).dtype
        names = list(observation.update)
        self.parameters = [parameters[name] for name in names]
        self.places = [_local(parameter) for parameter in self.parameters]
        self.moved: list[tuple[Tensor, Tensor]] = []
        self.observed = [_local(_laid(observation.update[name], parameters[name])) for name in names]
        with torch.no_grad():
            self.powers = self._each([_dot(tensor, tensor) for tensor in self.observed])
            norm = self.powers.sum().sqrt()
            finite, there = norm.isfinite(), norm > 0
            self.failure = torch.where(~finite, NOT_FINITE, torch.where(there, OK, ZERO))
            self.healthy = bool(finite & there)
            self.scale = torch.where(finite & there, 1 / norm, 1.0)
            powers = torch.stack([_dot(_local(tensor), _local(tensor)) for tensor in self.all.values()])
            self.size = _over_shards(powers, list(self.all.values())).sum().sqrt()
        # the penalties alone, by the engine's own step: an update of nothing, at no distance
        alone = dataclasses.replace(matching, distance=lambda update, target, scale: 0 * update[""], form="double_backward", kink_width=None)
        self.penalties, self.known = one_attack(_nothing, alone), observation.known

    def get(self, *_: Any, **__: Any) -> Callable[..., tuple[Tensor, Tensor, Tensor, Tensors]]:
        """As `Programs.get`."""
        return self._evaluate

    def _evaluate(
        self, variables: Tensors, given: tuple, target: Tensors, scale: Tensor, knobs: Tensors
    ) -> tuple[Tensor, Tensor, Tensor, Tensors]:
        each = []
        for row in range(len(scale)):
            point, weights = {name: tensor[row] for name, tensor in variables.items()}, {name: tensor[row] for name, tensor in knobs.items()}
            now, last, _, slopes = self.penalties(point, (self.all, self.known, given[2][row]), {"": scale[row]}, scale[row], weights)
            if self.healthy:  # what failed before the first iteration costs no passes
                fit, more = self._matched(point, given[2][row], weights.get("width"))
                now, last, slopes = fit + now, fit + last, {name: slope + more[name] for name, slope in slopes.items()}
            else:
                fit = torch.zeros_like(now)
            each.append((now, last, fit, slopes))
        loss, final, fit, slopes = zip(*each, strict=True)
        return torch.stack(loss), torch.stack(final), torch.stack(fit), {name: torch.stack([one[name] for one in slopes]) for name in slopes[0]}

    def _matched(self, point: Tensors, labels: Tensor, width: Tensor | None = None) -> tuple[Tensor, Tensors]:
        """The distance, and its slope in every variable."""
        gradients = self._gradients(point, labels, width)
        fit, parts, length = self._residuals(gradients)
        reach = self.matching.difference_step * self.size
        away = torch.where(length > 0, reach / length, 0.0)
        try:
            self._move(gradients, parts, away)
            ahead = self._slopes(point, labels)
            for here, rest in self.moved:  # the other side of what rounding left of the step
                here.neg_().add_(rest, alpha=2)
            behind = self._slopes(point, labels)
        finally:
            self._return()
        back = length / (2 * reach)
        slopes = {name: (ahead[name] - behind[name]) * back.to(tensor.dtype) for name, tensor in ahead.items()}
        like = next(iter(slopes.values()))
        return fit.to(like.dtype), self._agreed(slopes)

    def _inputs(self, point: Tensors, labels: Tensor) -> Tensors:
        """What the client's pass reads at a point."""
        images = self.matching.render(point["code"]) if self.matching.render is not None else point["images"]
        inputs = {"images": images, "labels": point["logits"].softmax(-1) if "logits" in point else labels}
        return inputs | ({"noise": point["noise"]} if "noise" in point else {})

    def _loss(self, inputs: Tensors) -> Tensor:
        outputs = self.model(*(inputs[name].to(self.dtype) for name in ("images", "noise") if name in inputs))
        return self.loss(_wide(outputs) if isinstance(outputs, Tensor) else outputs, inputs["labels"])

    def _gradients(self, point: Tensors, labels: Tensor, width: Tensor | None) -> list[Tensor]:
        """∂L/∂θ of the matched tensors, in memory of our own."""
        self._ask_for(self.parameters)
        self.gates.record(width)
        inputs = self._inputs(point, labels)
        with torch.enable_grad():
            loss = self._loss(inputs)
            self.gates.recorded()
            loss.backward()
        self.gates.hold()
        found = []
        for parameter in self.parameters:
            found.append(torch.zeros_like(_local(parameter)) if parameter.grad is None else _local(parameter.grad))
            parameter.grad = None
        return found

    def _slopes(self, point: Tensors, labels: Tensor) -> Tensors:
        """∂L/∂ each variable, at the parameters as they are."""
        self._ask_for([])
        with torch.enable_grad():
            roots = {name: tensor.detach().clone().requires_grad_() for name, tensor in point.items()}
            inputs = self._inputs(roots, labels)
            # plain backward passes end at leaves of their own: sharded and checkpointed modules know no other, and what renders is left alone
            leaves = {name: tensor.detach().requires_grad_(tensor.requires_grad) for name, tensor in inputs.items()}
            self._loss(leaves).backward()
            ends = [name for name, leaf in leaves.items() if leaf.grad is not None]
            onward = [leaves[name].grad for name in ends]
            found = torch.autograd.grad([inputs[name] for name in ends], list(roots.values()), onward, allow_unused=True)
        return {name: torch.zeros_like(root) if slope is None else slope for (name, root), slope in zip(roots.items(), found, strict=True)}

    def _ask_for(self, wanted: list[Tensor]) -> None:
        """No pass computes gradients, or keeps activations for them, that nobody reads."""
        chosen = {id(parameter) for parameter in wanted}
        for parameter in self.model.parameters():
            parameter.requires_grad_(id(parameter) in chosen)

    def _residuals(self, gradients: list[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """The distance d of the gradients g, which become its residuals r, and its slope v = ∂d/∂g as scalars for each tensor.

            r = k g − m g_observed,   v = f (r − P k g) = a r + b g_observed,   a = f (1 − P),   b = −f P m

        with k = s c, c = 1/√(‖s g‖² + 1e-12), m = s, f = k, P = Σ k g·r, d = ½ Σ r² for the cosine; k = m = s, f = 2 s, P = 0, d = Σ r² for l2.

        Two passes over the tensors, scalars in float64.  Returns: d, (a, b) of each tensor, ‖v‖.
        """
        s, name = self.scale, self.matching.distance
        own = self._each([_dot(tensor, tensor) for tensor in gradients]) * s.square()
        s = s.expand(len(own))
        if name == "l2":
            k, m = s, s
        elif name == "cosine":
            k, m = s * (own.sum() + 1e-12).rsqrt(), s
        else:
            goal = self.powers * s.square()
            k, m = s * (own + 1e-12 * goal + 1e-24).rsqrt(), s * torch.where(goal > 0, goal, 1.0).rsqrt()
        products = []
        for gradient, observed, ours, theirs in zip(gradients, self.observed, k, m, strict=True):
            gradient.mul_(ours).addcmul_(observed, -theirs)
            products.append(torch.stack([_dot(gradient, gradient), _dot(gradient, observed)]))
        apart, along = self._each(products).unbind(1)
        along = apart + m * along
        unit = own * (k / s).square()
        if name == "l2":
            f, along, fit = 2 * s, torch.zeros_like(along), apart.sum()
            length = (f.square() * apart).sum().sqrt()
        elif name == "cosine":
            f, fit, along = k, 0.5 * apart.sum(), along.sum().expand(len(own))
            length = f[0] * (apart.sum() - along[0].square() * (2 - unit.sum())).clamp_min(0).sqrt()
        else:  # tensors of nothing are left out
            count = (goal > 0).sum().clamp_min(1)
            f, fit = (goal > 0) * k / count, 0.5 * (apart * (goal > 0)).sum() / count
            length = (f.square() * (apart - along.square() * (2 - unit)).clamp_min(0)).sum().sqrt()
        return fit, torch.stack([f * (1 - along), -f * along * m], 1), length

    def _move(self, residuals: list[Tensor], parts: Tensor, away: Tensor) -> None:
        """θ + away · v in θ's place; θ in the residual's."""
        for here, residual, observed, (a, b) in zip(self.places, residuals, self.observed, parts * away, strict=True):
            new = torch.addcmul(_wide(here), _wide(residual), a).addcmul_(_wide(observed), b)
            residual.copy_(here)
            here.copy_(new)
            self.moved.append((here, residual))

    def _return(self) -> None:
        """θ in its place again."""
        for here, rest in self.moved:
            here.copy_(rest)
        self.moved = []

    def _each(self, parts: list[Tensor]) -> Tensor:
        """One row per matched tensor, summed over its shards."""
        return _over_shards(torch.stack(parts), self.parameters)

    def _agreed(self, slopes: Tensors) -> Tensors:
        """Slopes that are the same on all ranks bit by bit: a rank's kernels may add in another order, and its images would drift apart."""
        meshes = [tensor.device_mesh for tensor in self.all.values() if _is_sharded(tensor)]
        if not meshes:
            return slopes
        mesh = max(meshes, key=lambda mesh: mesh.size())
        flat = torch.cat([tensor.flatten() for tensor in slopes.values()])
        flat = _summed(flat / mesh.size(), mesh, (True,) * mesh.ndim)
        parts = flat.split([tensor.numel() for tensor in slopes.values()])
        return {name: part.view_as(slopes[name]) for name, part in zip(slopes, parts, strict=True)}


def _nothing(params: Tensors, known: Tensors, images: Tensor, *_: Any) -> Tensors:
    return {"": 0 * images.sum()}


def _wide(tensor: Tensor) -> Tensor:
    """In the precision of sums."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def _dot(one: Tensor, other: Tensor) -> Tensor:
    """Σ one · other, in float64 over stretches of which each is summed in the tensors' precision, at least float32; without a temporary."""
    pairs = zip(one.reshape(-1).split(STRETCH), other.reshape(-1).split(STRETCH), strict=True)
    return torch.stack([torch.dot(_wide(left), _wide(right)).double() for left, right in pairs]).sum()


# --- kinks ------------------------------------------------------------------------------------------------------------


_KINKED = (nn.ReLU, nn.LeakyReLU, nn.Hardtanh, nn.ReLU6, nn.MaxPool2d)  # not their subclasses, which may do more


class _Gates:
    """Keeps piecewise linear modules on the pieces on which a recorded pass found them, so that the gradients of later ones are smooth in θ.

    Their difference is then the derivative that double backward takes, with the curvature of `CurvedKinks` if there is a width. With gates free
    to open and close it samples their jumps, and the few that lie between θ − h v and θ + h v are a noise in which the attack on a deep
    network of ReLUs gets stuck.
    """

    def __init__(self, model: nn.Module) -> None:
        # compiled code does not look at a module's forward
        compiled = any(hasattr(module, "_orig_mod") or module._compiled_call_impl is not None for module in model.modules())
        self.modules = [] if compiled else [module for module in model.modules() if type(module) in _KINKED]
        self.phase, self.width, self.calls, self.again = "", None, Counter(), set()
        self.found: dict[nn.Module, list[Tensor]] = {}

    def installed(self) -> contextlib.AbstractContextManager[None]:
        return _forwards({module: functools.partial(self._forward, module) for module in self.modules})

    def record(self, width: Tensor | None) -> None:
        self.phase, self.width, self.found = "forward", width, {module: [] for module in self.modules}
        self.calls.clear()
        self.again.clear()

    def recorded(self) -> None:
        """What is called from here on is a recomputation."""
        self.phase = "backward"

    def hold(self) -> None:
        self.phase = "held"
        for module in self.again:  # in which order its calls come back is not known
            if len(self.found[module]) > 1:
                self.found[module] = []

    def _forward(self, module: nn.Module, z: Tensor) -> Tensor:
        found = self.found.get(module, [])
        if self.phase == "held":
            self.calls[module] += 1
            return self._held(module, z, found[(self.calls[module] - 1) % len(found)]) if found else type(module).forward(module, z)
        if self.phase == "backward":
            self.again.add(module)
        if isinstance(module, nn.MaxPool2d):
            out, kept = F.max_pool2d(z, module.kernel_size, module.stride, module.padding, module.dilation, module.ceil_mode, return_indices=True)
            out = (out, kept) if module.return_indices else out
        else:  # what is kept comes first: the module may work in place
            kept = _piece(module, z) if self.width is None else z.detach().clone() if module.inplace else z.detach()
            out = type(module).forward(module, z)
        if self.phase == "forward":
            found.append(kept)
        return out

    def _held(self, module: nn.Module, z: Tensor, kept: Tensor) -> Tensor:
        if isinstance(module, nn.MaxPool2d):
            out = z.flatten(-2).gather(-1, kept.flatten(-2)).view(kept.shape)
            return (out, kept) if module.return_indices else out
        piece = kept if self.width is None else _piece(module, kept)
        low, high, slope = _line(module)
        if slope is None:
            ends = (torch.full((), end, dtype=z.dtype, device=z.device) for end in (low, high))
            out = torch.where(piece == 1, z, torch.where(piece == 0, *ends))
        else:
            out = torch.where(piece == 1, z, slope * z)
        if self.width is None:
            return out
        # as CurvedKinks has it, around the recorded point
        width = self.width * kept.square().mean().sqrt() + torch.finfo(z.dtype).tiny
        jumps = {low: 1.0, high: -1.0} if slope is None else {0.0: 1.0 - slope}
        density = sum(jump / (1 + ((kept - kink) / width).square()) for kink, jump in jumps.items()) / (math.pi * width)
        return out + (0.5 * density * (z - kept).square()).to(z.dtype)


def _line(module: nn.Module) -> tuple[float, float, float | None]:
    """Between low and high the identity; outside constant, or of the given slope."""
    if isinstance(module, nn.Hardtanh):
        return float(module.min_val), float(module.max_val), None
    return 0.0, math.inf, module.negative_slope if isinstance(module, nn.LeakyReLU) else 0.0


def _piece(module: nn.Module, z: Tensor) -> Tensor:
    """int8: 0 below, 1 between, 2 above."""
    low, high, _ = _line(module)
    return (z > low).to(torch.int8) + (z >= high)


# --- shards -----------------------------------------------------------------------------------------------------------


def _is_sharded(tensor: Tensor) -> bool:
    return hasattr(tensor, "device_mesh")


def _local(tensor: Tensor) -> Tensor:
    """This rank's part of a tensor, in the same memory."""
    return tensor.detach().to_local() if _is_sharded(tensor) else tensor.detach()


def _laid(tensor: Tensor, like: Tensor) -> Tensor:
    """A tensor where and as a parameter lies, in its precision; no copy if it lies so."""
    if _is_sharded(tensor):
        return tensor.to(like.dtype)
    tensor = tensor.detach().to(like.device, like.dtype)
    if not _is_sharded(like):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    # every rank holds the whole tensor and cuts out its own shard
    return distribute_tensor(tensor, like.device_mesh, like.placements, src_data_rank=None)


def _summed(part: Tensor, mesh: Any, over: tuple[bool, ...]) -> Tensor:
    """The sum of each rank's part over some dims of a mesh."""
    from torch.distributed.tensor import DTensor, Partial, Replicate

    return DTensor.from_local(part, mesh, [Partial() if one else Replicate() for one in over], run_check=False).full_tensor()


def _over_shards(parts: Tensor, parameters: list[Tensor]) -> Tensor:
    """Rows of parts (T, …), one for each parameter, summed over what it is sharded over: one collective for all on a mesh."""
    groups: dict[Any, list[int]] = {}
    for row, parameter in enumerate(parameters):
        if _is_sharded(parameter):
            groups.setdefault((parameter.device_mesh, tuple(not one.is_replicate() for one in parameter.placements)), []).append(row)
    if groups:
        parts = parts.clone()
    for (mesh, over), members in groups.items():
        parts[members] = _summed(parts[members], mesh, over)
    return parts


# --- the module, while it is lent -------------------------------------------------------------------------------------


@contextlib.contextmanager
def _lent(model: nn.Module) -> Iterator[None]:
    """Which parameters ask for gradients, and all buffers, as they were."""
    asked = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    kept = [(buffer, buffer.clone()) for buffer in model.buffers()]
    for parameter, _ in asked:
        parameter.grad = None
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, before in kept:
                buffer.copy_(before)
        for parameter, before in asked:
            parameter.grad = None
            parameter.requires_grad_(before)


@contextlib.contextmanager
def _forwards(exchanged: dict[nn.Module, Callable]) -> Iterator[None]:
    """Modules with other forwards."""
    before = {module: module.__dict__.get("forward") for module in exchanged}
    for module, forward in exchanged.items():
        module.forward = forward
    try:
        yield
    finally:
        for module, forward in before.items():
            if forward is None:
                del module.forward
            else:
                module.forward = forward


@contextlib.contextmanager
def _checkpointed(model: nn.Module) -> Iterator[None]:
    """Activations are recomputed block by block."""
    switch = getattr(model, "set_grad_checkpointing", None)
    if switch is not None:
        before = bool(getattr(model, "grad_checkpointing", False))
        switch(True)
        undo = functools.partial(switch, before)
    elif hasattr(model, "gradient_checkpointing_enable"):
        before = bool(getattr(model, "is_gradient_checkpointing", False))
        model.gradient_checkpointing_enable({"use_reentrant": False})
        undo = model.gradient_checkpointing_enable if before else model.gradient_checkpointing_disable
    else:
        lists = [module for module in model.modules() if isinstance(module, nn.ModuleList | nn.Sequential)]
        blocks = list(max(lists, key=len, default=()))
        if not blocks:
            raise InputError("checkpointing: the model has neither a switch of its own nor a list of blocks; wrap its parts in torch's checkpoint.")
        with _forwards({block: functools.partial(checkpoint, block.forward, use_reentrant=False) for block in blocks}):
            yield
        return
    try:
        yield
    finally:
        undo()
