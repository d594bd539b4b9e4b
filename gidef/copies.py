"""Before the attacks: what was changed in a network so that its gradients can be differentiated, and whether they are still the untouched network's."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from gidef import build, config
from gidef.attack.surgery import ForcedDraws, accept, check_parity, norm_names, prepare, relative
from gidef.attack.surgery_rules import drops
from gidef.defence import Defence
from gidef.errors import InputError
from gidef.models import SplitModel
from gidef.models.surgery import changes_between
from gidef.report.files import write_atomically
from gidef.rng import generator
from gidef.runs import Run
from gidef.types import Tensors

FILE = "nets.json"
"""In the run's folder: what `check` returns."""
MOST_PARAMETERS, MOST_GFLOP = 100_000_000, {"cpu": 5.0, "cuda": 500.0}
"""Of a network, and of its forward of one image, beyond which it is not compared."""


def check(run: Run, chosen: dict[str, Any], path: Path) -> list[dict[str, Any]]:
    """Compare each network with its untouched build, say what was changed, and keep both. All ranks call this together; rank 0 works.

    Defences of one network are compared once. See `compare`; what GradInversion takes statistics of is compared as well.

    Args:    chosen: defences of the recipe by name.  path: of the file that keeps the result; left alone where nothing is attacked.
    Returns: as "nets" of results.json, see `gidef.report`.
    Raises:  InputError, on every rank, if a network's gradients are not those that attacks differentiate.
    """
    if not run.recipe.attacks:
        return []
    found, error = [], ""
    if run.leads:
        try:
            found = _compared(run, chosen)
        except InputError as refusal:
            error = str(refusal)
    found, error = run.world.broadcast_json([found, error])
    if error:
        raise InputError(error)
    if run.leads:
        write_atomically(path, (json.dumps(found, indent=1) + "\n").encode())
    for net in found:
        _say(run, net)
    for change in dict.fromkeys(change for net in found for change in net["changes"] if change.endswith(")")):
        run.console.notice(f"{run.recipe.model.name} is trained and attacked without its dropout: {change}.")
    return found


def _compared(run: Run, chosen: dict[str, Any]) -> list[dict[str, Any]]:
    recipe, dataset, seed = run.recipe, run.setting.dataset, run.recipe.seeds[0]
    statistics = any(isinstance(attack, config.Standard) or (isinstance(attack, config.GradInversion) and attack.statistics != "none") for attack in recipe.attacks.values())
    nets: dict[str, dict[str, Any]] = {}
    for key, one in chosen.items():
        defence = build.make_defence(one.at(one.low) if isinstance(one, config.Matched) else one, recipe, dataset, seed=seed)
        mark = f"{defence.model} {defence.model.cut}"
        if mark not in nets:
            make = lambda: build.make_net(recipe, dataset, seed=seed, untouched=True)  # noqa: E731
            count = 4 if recipe.model.norm == "keep" else 2
            images = dataset.val.images[:count].to(run.world.device, torch.float64) / 255
            nets[mark] = {"defences": [], **compare(defence, make, images, dataset.val.labels[:count], batch=recipe.model.norm == "keep", statistics=statistics)}
        nets[mark]["defences"].append(key)
    return list(nets.values())


def compare(
    defence: Defence, make: Callable[[], nn.Module], images: Tensor, labels: Tensor, *, batch: bool = False, statistics: bool = False
) -> dict[str, Any]:  # fmt: skip
    """A defence's network beside its untouched build: the gradient of the cross-entropy, by what attacks differentiate and by plain autograd.

    Both are taken in float64, at the initial weights plus a hundredth of normal noise (layers that begin at zero would hide those behind them), under
    one draw of the defence's noise, without dropout.

    Args:    make: () → the untouched backbone, in the client's mode.  images: float64 (B, C, H, W), on the device that does it.  labels: int64 (B,).
             batch: the client normalises by its batches.  statistics: compare GradInversion's copy, too.
    Returns: {"changes", "parity", "skipped", "statistics"}, see `gidef.report`. A defence of the user's own is compared by its network without noise.
    Raises:  InputError if the gradients differ by more than rounding, see `attack.surgery.check_parity`.
    """
    net = {"changes": [], "parity": None, "skipped": None, "statistics": None}
    if type(defence.model) is not SplitModel:
        return {**net, "skipped": "the defence has a network of its own"}
    plain = make()
    net["changes"] = changes_between(plain, defence.model.backbone)
    if reason := _too_large(defence.model, images[:1]):
        return {**net, "skipped": reason}
    for module in drops(plain):
        module.train(False)
    split, of = defence.model, type(plain).__name__
    plain = SplitModel(
        plain, cut=split.cut, perturbation=copy.deepcopy(split.perturbation), image_shape=split.image_shape, num_classes=split.num_classes, latent_norm=split.latent_norm
    )
    if [name for name, _ in plain.named_parameters()] != [name for name, _ in split.named_parameters()]:
        raise InputError(f"two builds of {of} differ in their parameters' names: let the model's callable build the same network every time.")
    for name in ("input_mean", "input_std"):
        setattr(plain, name, getattr(split, name))
    weights = {name: _nudged(name, tensor).to(images.device) for name, tensor in split.named_parameters()}
    plain = plain.to(images.device, torch.float64)
    with torch.no_grad():
        for name, parameter in plain.named_parameters():
            parameter.copy_(weights[name])
    one = copy.copy(defence) if type(defence).__module__.startswith("gidef.") else Defence(split)
    one.model = copy.deepcopy(split).to(images.device, torch.float64)
    noise = one.draw_noise(len(images), generator=generator(0, "noise of parity"))
    noise = None if noise is None else noise.to(images)
    targets = F.one_hot(labels.long(), split.num_classes).to(images)

    def released(images: Tensor) -> Tensors:
        with torch.enable_grad(), ForcedDraws({}, expected=True):
            loss = F.cross_entropy(plain(images, noise), targets)
            found = torch.autograd.grad(loss, list(plain.parameters()), allow_unused=True, materialize_grads=True)
        return dict(zip(weights, found, strict=True))

    try:
        simulated = one.simulator(terms="utility")()(weights, {}, images, targets, noise)
        net["parity"] = accept(relative(simulated, released(images)), released, images, of=of)
        if statistics and norm_names(one.model):
            prepared, changes = prepare(one.model, batch_norm="train" if batch else "eval")
            net["statistics"] = {"changes": changes, "parity": check_parity(one.model.train(batch), prepared, images, labels.to(images.device))}
    except InputError:
        raise
    except RuntimeError as error:  # randomness under vmap, an operator without a derivative
        raise InputError(f"{of} cannot be attacked: {(str(error).splitlines() or [type(error).__name__])[0]} Replace the layer that does this.") from error
    return net


def _nudged(name: str, tensor: Tensor) -> Tensor:
    draw = torch.randn(tensor.shape, generator=generator(0, "weights of parity", name), dtype=torch.float64)
    return tensor.detach().double().cpu() + 0.01 * draw


def _too_large(model: SplitModel, image: Tensor) -> str:
    """Why comparing would take more than seconds; "" if it would not."""
    count, kind = sum(p.numel() for p in model.parameters()), image.device.type
    if count > MOST_PARAMETERS:
        return f"{count / 1e6:.0f} million parameters, compared are at most {MOST_PARAMETERS / 1e6:.0f}"
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), counter:
        copy.deepcopy(model).eval()(image.cpu().float())
    gflop, most = counter.get_total_flops() / 1e9, MOST_GFLOP.get(kind, MOST_GFLOP["cpu"])
    return f"an image takes {gflop:.0f} GFLOP, compared are at most {most:.0f} on {kind}" if gflop > most else ""


def _say(run: Run, net: dict[str, Any]) -> None:
    kept = f"not compared with its untouched build: {net['skipped']}" if net["parity"] is None else f"gradients as the untouched network's {_to(net['parity'])}"
    run.console.say(f"net       {run.recipe.model.name} ({', '.join(net['defences'])}): {kept}; changed for attacks: {', '.join(net['changes']) or 'nothing'}")
    if own := net["statistics"]:
        run.console.say(f"          its copy for GradInversion's statistics: gradients {_to(own['parity'])}; changed: {', '.join(own['changes']) or 'nothing'}")


def _to(parity: float) -> str:
    return f"to {parity:.0e}" if parity else "to the bit"
