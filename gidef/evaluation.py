"""How well a model predicts: logits over ranks and threads, beside the next round if asked, accuracies per client."""

from __future__ import annotations

import copy
import itertools
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor, nn

from gidef import build, metrics
from gidef.clients.evaluate import CHUNK, num_chunks, predict_chunk
from gidef.clients.local import load_parameters
from gidef.clients.sharded import predict_part
from gidef.data import Images
from gidef.errors import Diverged
from gidef.models import moving_statistics
from gidef.parallel import Beside, World
from gidef.rng import generator
from gidef.runs import Run
from gidef.spans import span
from gidef.types import Tensors


def logits(run: Run, training: build.Training, tensors: Tensors, images: Images, *, seed: int, split: str) -> Tensor:
    """Logits (N, K) float32 on the CPU, the same bits on every rank: chunks are dealt out over ranks and worker threads.

    A perturbation is on at its trained strength, with noise from (seed, split, chunk), unless predictions are to be without.
    """
    world = run.world
    if training.sharded is not None:
        return _logits_of_shards(run, training, tensors, images, seed=seed, split=split)
    models = [player.model for player in training.participation.players]
    for model in models:
        load_parameters(model, tensors)
        model.eval()
    result = torch.zeros(len(images), run.setting.dataset.num_classes)
    mine, noise = _own_chunks(world, images), _noise_of_predictions(run, training, seed=seed, split=split)

    def work(worker: int) -> None:
        torch.set_num_threads(run.recipe.speed.threads)
        if world.device.type == "cuda":
            torch.cuda.set_device(world.device)  # the current device is per thread
        _predict(result, models[worker], images, mine[worker :: len(models)], noise)

    with ThreadPoolExecutor(len(models)) as pool:
        list(pool.map(work, range(len(models))))
    for model in models:
        model.train()
    world.all_reduce_sum_(result)  # every row comes from one rank and zeros from the others: exact
    return result


def _finite(logits: Tensor) -> Tensor:
    """The logits, the same on every rank.  Raises: Diverged if one is not finite."""
    if not logits.isfinite().all():
        raise Diverged("the network predicts NaN or infinity: training diverged. Lower clients.lr, or set clients.grad_clip.")
    return logits


def _own_chunks(world: World, images: Images) -> list[int]:
    """This rank's."""
    return list(range(num_chunks(images.images)))[world.rank :: world.size]


def _predict(result: Tensor, model: nn.Module, images: Images, chunks: Iterable[int], noise: Callable[[int, int], Tensor | None]) -> None:
    """Fill in the chunks' rows of the logits."""
    for chunk in chunks:
        result[chunk * CHUNK : (chunk + 1) * CHUNK] = predict_chunk(model, images.images, chunk, noise)


def _noise_of_predictions(run: Run, training: build.Training, *, seed: int, split: str) -> Callable[[int, int], Tensor | None]:
    """noise(count, chunk), see `Model.noisy_prediction`."""

    def noise(count: int, chunk: int) -> Tensor | None:
        if not run.recipe.model.noisy_prediction:
            return None
        return training.defence.draw_noise(count, generator=generator(seed, "evaluation", split, chunk, device=run.world.device))

    return noise


def _logits_of_shards(run: Run, training: build.Training, tensors: Tensors, images: Images, *, seed: int, split: str) -> Tensor:
    """`logits` where a network lies on a group of ranks: chunks are dealt out over groups, and a chunk's rows over the group."""
    world, mesh, model = run.world, run.world.mesh, training.participation.players[0].model
    training.sharded.engine.load(tensors)
    model.eval()
    result = torch.zeros(len(images), run.setting.dataset.num_classes)
    noise = _noise_of_predictions(run, training, seed=seed, split=split)
    with mesh.shard.explained():
        for chunk in range(mesh.clients.rank, num_chunks(images.images), mesh.clients.size):
            for rows, found in predict_part(model, images.images, chunk, noise, mesh.shard, device=world.device):
                result[rows] = found
    model.train()
    world.all_reduce_sum_(result)
    return result


def model_names(training: build.Training) -> list[str]:
    """Of what a client trains of the model: parameters, and running statistics that move."""
    model = training.defence.model
    return [*(name for name, _ in model.named_parameters()), *moving_statistics(model)]


def fronts(training: build.Training, params: Tensors, clients: list[int]) -> list[Tensors]:
    """The whole model's tensors: one if the server has all of them, else one per client, with the client's own front."""
    return list(_each_front(training, params, clients, training.participation.versions))


def _each_front(training: build.Training, params: Tensors, clients: list[int], versions: Mapping[int, int]) -> Iterator[Tensors]:
    """`fronts` one at a time, of the clients as they stood after those rounds."""
    names = model_names(training)
    if all(name in params for name in names):
        yield {name: params[name] for name in names}
        return
    for k in clients:
        whole = {**training.participation.state(k, versions), **params}
        yield {name: whole[name] for name in names}


@span("evaluation")
def accuracies(run: Run, training: build.Training, params: Tensors, images: Images, *, seed: int, split: str, clients: list[int]) -> list[float]:
    """Accuracy on a split, of the server's model or of each client's own front under `head`."""
    return [
        metrics.accuracy(_finite(logits(run, training, tensors, images, seed=seed, split=split)), images.labels.cpu())
        for tensors in fronts(training, params, clients)
    ]


class EvaluationBeside(Beside):
    """`accuracies` of a round on the validation split, computed while the next round is: on a thread with a network of its own, the one further copy
    of the model that it takes. The sums over ranks, and so the accuracies, are the calling thread's: the thread computes this rank's rows alone.

    A round's evaluation reads the server's tensors and the clients' states of that round, which nothing changes: a server step makes new tensors,
    the next round's states are other files, and what a round no longer needs is removed once its evaluation is there.
    """

    def __init__(self, run: Run, training: build.Training, *, seed: int) -> None:
        super().__init__(run.world.device, threads=run.recipe.speed.threads)
        self._run_of, self._training = run, training
        self._model = copy.deepcopy(training.participation.players[0].model).eval()
        self._noise = _noise_of_predictions(run, training, seed=seed, split="validation")
        self.seconds: list[float] = []
        """Of each evaluation on the thread."""
        self.waited: list[float] = []
        """Of each: how long the calling thread waited for its end, and for the sums over ranks."""

    def begin(self, params: Tensors, clients: list[int], versions: Mapping[int, int]) -> None:
        """versions: client → its last round, as it is now; the caller's own copy."""
        self.call(self._evaluate, params, clients, versions)

    def accuracies(self) -> list[float]:
        """Of the evaluation that was begun. All ranks call this together."""
        began, val = time.perf_counter(), self._run_of.setting.dataset.val
        found = [metrics.accuracy(_finite(self._run_of.world.all_reduce_sum_(rows)), val.labels.cpu()) for rows in self.wait()]
        self.waited.append(time.perf_counter() - began)
        return found

    @span("evaluation")
    def _evaluate(self, params: Tensors, clients: list[int], versions: Mapping[int, int]) -> list[Tensor]:
        """This rank's rows of each front's logits, zeros elsewhere."""
        began, setting = time.perf_counter(), self._run_of.setting
        mine, found = _own_chunks(self._run_of.world, setting.dataset.val), []
        for tensors in _each_front(self._training, params, clients, versions):
            load_parameters(self._model, tensors)
            found.append(torch.zeros(len(setting.dataset.val), setting.dataset.num_classes))
            _predict(found[-1], self._model, setting.dataset.val, itertools.takewhile(lambda _: not self.stopped.is_set(), mine), self._noise)
            if self.stopped.is_set():
                break
        self.seconds.append(time.perf_counter() - began)
        return found


def scores_on_test(run: Run, training: build.Training, params: Tensors, *, seed: int) -> dict[str, Any]:
    """Of a model on the test split; per client: the accuracy under the client's own mix of classes. Every rank calls this together."""
    dataset, counts = run.setting.dataset, run.setting.counts.double()
    everyone = list(range(run.recipe.data.num_clients))
    outputs = [_finite(logits(run, training, tensors, dataset.test, seed=seed, split="test")) for tensors in fronts(training, params, everyone)]
    labels = dataset.test.labels.cpu()
    scores = [metrics.accuracy(output, labels) for output in outputs]
    mixes = counts / counts.sum(1, keepdim=True)
    per_class = [torch.tensor(metrics.per_class_accuracy(output, labels), dtype=torch.float64) for output in outputs]
    per_client = [_expected(mixes[k], per_class[k % len(per_class)]) for k in everyone]
    return {
        "test_accuracy": sum(scores) / len(scores), "test_accuracy_worst_front": min(scores),
        "macro_f1": sum(metrics.macro_f1(o, labels) for o in outputs) / len(outputs),
        "auc": sum(metrics.auc(o, labels) for o in outputs) / len(outputs),
        "client_accuracy_mean": sum(per_client) / len(per_client), "client_accuracy_worst": min(per_client), "client_accuracies": per_client,
    }  # fmt: skip


def _expected(mix: Tensor, per_class: Tensor) -> float:
    """Accuracy under a mix of classes; classes without test images are left out."""
    known = per_class.isfinite()
    share = mix * known
    return float((share * per_class.nan_to_num()).sum() / share.sum().clamp_min(1e-12))
