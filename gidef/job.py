"""The main job (train, attack, report), and the two commands that take up a finished run: attack again, report again."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import platform
import socket
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

import gidef
from gidef import audit, build, cells, config, copies, findings, importing, restart, strengths, tuning
from gidef.data import summary as partition_summary
from gidef.errors import InputError, RankFailure
from gidef.models import judge_called
from gidef.parallel import World, open_world, seated, seats, with_mesh
from gidef.report import Console, Record, choice, html, joined, learning_curves, partition_bars, read, results, tables, tradeoff, verdict
from gidef.report import consumers as follow
from gidef.report.files import held, write_atomically
from gidef.report.paired import starts
from gidef.report.verdict import compare
from gidef.runs import Run, Trained, fingerprint, run_key
from gidef.stopping import leave_on_sigterm
from gidef.training import reload

RECIPE = restart.RECIPE


def run_recipe(recipe: config.Recipe, name: str, *, part: tuple[int, int] | None = None) -> dict[str, Any]:
    """Train each defence and seed, attack it, report. Every rank calls this; returns results.json's content (on rank 0, else {}).

    part: (I, N), only the I-th of N `tuning.shares`, which is not empty; gidef.parts joins them.
    Raises: InputError for bad data or an unusable run folder; nothing of an existing run is touched then. Once all is reported, InputError where every training
            diverged; of a part not, as others may have trained something.
    """
    began = time.perf_counter()
    leave_on_sigterm(recipe.out)
    follow.check(recipe.log)
    with (
        open_world(recipe.speed.device, recipe.speed.timeout_s, stall_s=recipe.speed.stall_s) as world,
        contextlib.ExitStack() as stack,
    ):
        world = seated(world)
        world = with_mesh(world, recipe.speed.shard_size, timeout_s=recipe.speed.stall_s)
        said: list[str] = []  # shown once there is a console with a log
        folder, again = _choose_folder(recipe, name, world)
        leave_on_sigterm(folder, clear=world.rank == 0)
        if again:
            recipe = dataclasses.replace(recipe, out=str(folder), resume=True)
            said.append(f"{again} was started again, so its run in {folder} goes on.")
        recipe = _continued(recipe, folder, world)
        settle_threads(recipe)
        setting = build.load_setting(recipe, world=world, notice=said.append, folder=folder)
        for key, defence in recipe.chosen.items():  # what cannot be built, a missing extra or an ε out of reach is refused before any file
            for one in (defence.at(defence.low), defence.at(defence.high)) if isinstance(defence, config.Matched) else (defence,):
                _check_built(setting, key, one)
        for judge in recipe.evaluation.judges:
            judge_called(recipe.evaluation.judge_named(judge)[0], num_classes=setting.dataset.num_classes, image_shape=setting.dataset.image_shape)
        mark = fingerprint(recipe, setting.dataset)
        world.agree("the recipe and the data", mark)
        world.agree("the threads of an operator", str(recipe.speed.threads))
        if world.rank == 0:
            _make_folder(folder)
            stack.enter_context(held(folder))
            if (folder / RECIPE).exists() and not recipe.resume:  # by now
                raise InputError(f"{folder} holds a run already: continue it with --resume, or choose another --out.")
            write_recipe(recipe, name, folder)
        world.barrier()
        damaged: list[str] = []
        record = Record.open(folder / "record.jsonl", keep=_keeper(recipe, folder, damaged.append)) if world.rank == 0 else None
        own = rank_log(folder, world.rank)
        with _last_lines(folder), record or contextlib.nullcontext(), Console(rank=world.rank, log=folder / "log.txt", own=own) as console:
            run = Run(setting, world, folder, console, record, mark)
            console.note(f"rank {world.rank} of {world.size} on {socket.gethostname()}, process {os.getpid()}, {_device_name(world.device)}")
            _introduce(run, name, said)
            for text in damaged:
                console.notice(text)
            if record is not None:
                record.feed(follow.consumers(recipe.log, folder, name))
            if part is not None:
                console.notice(f"this is part {part[0]} of {part[1]} of {name}: its rows alone, which a page over all parts joins.")
            nets = copies.check(run, recipe.chosen, folder / copies.FILE)
            trained, tuned, failed = tuning.train_all(run, tuning.shares(recipe, part[1])[part[0]] if part is not None else None)
            attacked = strengths.evaluated(run, trained)
            found = audit.audit(run, attacked, folder=folder / "attacks")
            content = describe(run, name, trained | attacked, found, tuned, nets, failed, seconds=time.perf_counter() - began, part=part)
            if world.rank == 0:
                publish(content, folder, console)
                run.append("end", seconds=content["seconds"]["total"])
            world.barrier()
            if part is None:
                check_any(trained, failed)
    return content


def check_any(trained: dict[tuple[str, int], Trained], failed: list[dict[str, Any]]) -> None:
    """Raises InputError where every training failed."""
    if failed and not trained:
        raise InputError(f"nothing was trained. The first of {len(failed)}: {failed[0]['defence']}, seed {failed[0]['seed']}: {failed[0]['error']}")


def _check_built(setting: build.Setting, key: str, defence: Any) -> None:
    """Raises InputError, with its name, for a defence that cannot be built, or whose ε is out of reach."""
    recipe = setting.recipe
    try:
        made = build.make_defence(defence, recipe, setting.dataset, seed=0)
        for seed in recipe.seeds:
            build.privacy_budget(setting, defence, seed=seed)
    except InputError as error:
        raise InputError(f"defences.{key}: {error}") from error
    strengths.check(made, recipe.evaluation.strengths, key)


def rank_log(folder: Path, rank: int) -> Path:
    """A rank's own log."""
    return folder / "logs" / f"rank-{rank:05d}.txt"


@contextlib.contextmanager
def _last_lines(folder: Path) -> Iterator[None]:
    """A failure of another rank goes out with that rank's last lines, and the name of its log."""
    try:
        yield
    except RankFailure as error:
        for rank in error.ranks[:1]:
            path = rank_log(folder, rank)
            with contextlib.suppress(OSError):
                error.lines = error.lines or tuple(path.read_text(errors="replace").splitlines()[-12:])
                error.log = path
        raise


def settle_threads(recipe: config.Recipe) -> None:
    """Threads and kernels as `speed` asks for them."""
    torch.set_num_threads(recipe.speed.threads)
    if recipe.speed.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    if torch.cuda.is_available():
        torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic = False, True  # the kernels of a convolution are the same in every process


def _choose_folder(recipe: config.Recipe, name: str, world: World) -> tuple[Path, str | None]:
    """(the run's folder, the same on every rank; the name of the job whose earlier life began it, if this is a later one).

    An existing run is refused without --resume, unless the launcher started its job again.
    """
    chosen, error, again = recipe.out, None, None
    if world.rank == 0:
        runs = Path("runs") / name
        if chosen is None and (found := restart.recall(runs)):
            chosen = str(found)
        elif chosen is None:
            stem = runs / time.strftime("%Y-%m-%d-%H%M%S")
            chosen, number = str(stem), 1
            while Path(chosen).exists():
                number += 1
                chosen = f"{stem}-{number}"
            with contextlib.suppress(OSError):  # a folder that cannot be written to is refused later, in better words
                restart.remember(runs, Path(chosen))
        folder = Path(chosen)
        if (folder / RECIPE).exists() and not recipe.resume:
            again = restart.began(folder)
            error = None if again else f"{folder} holds a run already: continue it with --resume, or choose another --out."
        elif folder.exists() and not folder.is_dir():
            error = f"{folder} is a file: choose another --out."
    chosen, error, again = world.broadcast_json([chosen, error, again])
    if error:
        raise InputError(error)
    return Path(chosen), again


def _continued(recipe: config.Recipe, folder: Path, world: World) -> config.Recipe:
    """Check a resumed run's recipe against the one that began it, and take over what decides the last bits."""
    path = folder / RECIPE
    if not recipe.resume or not path.exists():
        return recipe
    mine = config.to_json(recipe)
    try:
        saved = json.loads(path.read_text())["recipe"]
        differing, kept = _differences(mine, saved), {
            name: type(default := getattr(config.Speed(), name))(saved["speed"].get(name, default)) for name in config.LAST_BITS
        }  # fmt: skip
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{path} cannot be read: {_unread(error)}. Restore it, or choose another --out.") from error
    if differing:
        raise InputError(
            f"{folder} was begun with another recipe: {'; '.join(differing[:5])}. Resume with the same scientific fields, or choose another --out."
        )
    changed = [f"speed.{name}={value}" for name, value in kept.items() if value != getattr(recipe.speed, name)]
    if changed and world.rank == 0:
        print(f"gidef: the run goes on with {', '.join(changed)}, as it began.", file=sys.stderr)
    if saved["speed"].get("shard_size", 1) != recipe.speed.shard_size and world.rank == 0:
        print("gidef: the run began with another speed.shard_size, so its end agrees with an uninterrupted one but for rounding.", file=sys.stderr)
    recipe = dataclasses.replace(recipe, speed=dataclasses.replace(recipe.speed, **kept))
    if changed and (found := config.problems(recipe)):
        raise InputError(f"{folder} goes on as it began, with {', '.join(changed)}, which does not go with the rest: {' '.join(found)}")
    return recipe


def _differences(mine: Any, saved: Any, place: str = "") -> list[str]:
    """Scientific fields in which two recipes differ, as text."""
    if isinstance(mine, dict) and isinstance(saved, dict):
        keys = [key for key in {**mine, **saved} if place or key not in config.NOT_SCIENCE]
        return [text for key in keys for text in _differences(mine.get(key), saved.get(key), f"{place}.{key}" if place else key)]
    return [] if mine == saved else [f"{place} was {saved!r} and is now {mine!r}"]


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot make the run's folder {folder}: {error.strerror}. Choose another --out.") from error


def write_recipe(recipe: config.Recipe, name: str, folder: Path) -> None:
    content = {"name": name, "gidef": gidef.__version__, "job": restart.job(), "recipe": config.to_json(recipe)}
    write_atomically(folder / RECIPE, (json.dumps(content, indent=1) + "\n").encode())


def _keeper(recipe: config.Recipe, folder: Path, notice: Callable[[str], None]) -> Any:
    """Which lines of an earlier life's record stay: rounds up to the checkpoint that will be continued, and finished attacks."""
    from gidef.checkpoint import load_latest
    from gidef.parallel.checkpoints import newest

    if not recipe.resume:
        return None
    done: dict[tuple[str, int], float] = {}
    for key in recipe.chosen:
        for seed in recipe.seeds:
            name = run_key(key, seed)
            if (folder / "models" / f"{name}.safetensors").exists():
                done[key, seed] = float("inf")
            else:
                found = load_latest(folder / "checkpoints" / name, notice=notice)  # the only one to meet a damaged file: it sets it aside
                done[key, seed] = max(found[0] if found else 0, newest(folder / "checkpoints" / name, notice) or 0)

    def keep(line: dict[str, Any]) -> bool:
        if line["kind"] == "round":
            return line["round"] <= done.get((line["defence"], line["seed"]), 0)
        if line["kind"] == "trained":
            return done.get((line["defence"], line["seed"]), 0) == float("inf")
        return line["kind"] == "start"  # attacks are written again, from their saved results, in one go

    return keep


def _introduce(run: Run, name: str, said: list[str]) -> None:
    """What is going to happen, in a few lines; the partition's table and picture."""
    recipe, dataset, console = run.recipe, run.setting.dataset, run.console
    console.heading(f"{name}: do the shared updates give the patients away?")
    shape = "x".join(map(str, dataset.image_shape))
    console.say(f"images    {dataset.title}, {shape}, {int(run.setting.counts.sum())} for training, from {dataset.source}")
    for note in dict.fromkeys([*said, *dataset.notes]):
        console.notice(note)
    if dataset.synthetic and not any("synthetic" in note.lower() for note in dataset.notes):
        console.notice("these are SYNTHETIC images from a generator: they show how gidef works, not what leaks about patients.")
    cohort = recipe.cohort
    console.say(
        f"clients   {recipe.data.num_clients} ({'streamed' if recipe.data.stream else type(recipe.data.partition).__name__}), {cohort} per round, {run.setting.rounds} rounds"
        f"{'' if recipe.rounds.count else f' (what {recipe.rounds.local_steps} local steps allow; --rounds.count for more)'}; share policy {recipe.share_policy}"
    )
    console.say(f"defences  {', '.join(recipe.chosen)}; seeds {', '.join(map(str, recipe.seeds))}; model {recipe.model.name}")
    attacks = ", ".join(f"{key} ({cells.effort(attack)})" for key, attack in recipe.attacks.items())
    console.say(f"attacks   {attacks or 'none'} on {len(run.setting.roles.victims)} training images{' kept for tuning' * (recipe.choose is not None)}, at: {', '.join(recipe.evaluation.checkpoints)}")
    world = run.world
    console.say(f"machine   {_device_name(world.device)}, {world.size} rank(s){_groups(recipe)}, {build.num_workers(recipe, world)} worker(s) each; run folder {run.folder}")
    ranks, about = _ranks(run), ", about, from a common queue" if recipe.speed.clients_schedule == "dynamic" else ""
    for one in ranks[:MOST_RANKS]:
        console.say(f"  rank {one['rank']:<4} {one['host']}  {one['device']}, {one['workers']} worker(s), first round{about}: {_clients(one)}")
    if len(ranks) > MOST_RANKS:
        console.say(f"  and {len(ranks) - MOST_RANKS} more, in record.jsonl")
    for line in partition_summary(run.setting.counts):
        console.say(f"  {line}")
    if run.leads:
        title = f"{dataset.title}: training images per client"
        partition_bars(run.folder / "pictures" / "partition.png", run.setting.counts, dataset.class_names, title=title)
    run.append("start", recipe_name=name, world_size=world.size, shard_size=recipe.speed.shard_size, threads=recipe.speed.threads, reduction=recipe.speed.reduction, resumed=recipe.resume, gidef=gidef.__version__, ranks=ranks)


MOST_RANKS = 64
"""Ranks that the console lists."""


def _ranks(run: Run) -> list[dict[str, Any]]:
    """Where each rank sits, and its clients of the first seed's first round, as planned; the same on every rank."""
    recipe, world = run.recipe, run.world
    workers = world.all_gather_json(build.num_workers(recipe, world))
    shards = build.shards(run.setting, world.size, seed=recipe.seeds[0], round=0)
    return [
        {**dataclasses.asdict(seat), "workers": workers[seat.rank], "clients": clients, "examples": sum(run.setting.clients[k].num_examples for k in clients)}
        for seat, clients in zip(seats(world), shards, strict=True)
    ]


def _clients(one: dict[str, Any]) -> str:
    """A rank's clients in words, the first ten by number."""
    if not one["clients"]:
        return "no client"
    named = " ".join(map(str, one["clients"][:10])) + (f" and {len(one['clients']) - 10} more" if len(one["clients"]) > 10 else "")
    return f"client{'s' * (len(one['clients']) > 1)} {named} ({one['examples']} images)"


def _groups(recipe: config.Recipe) -> str:
    return f" in groups of {recipe.speed.shard_size} ({recipe.speed.shard_backend})" if recipe.speed.shard_size > 1 else ""


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {os.cpu_count()} cores"


def describe(
    run: Run, name: str, trained: dict[tuple[str, int], Trained], found: audit.Findings, tuned: dict[str, Any], nets: list[dict[str, Any]],
    failed: list[dict[str, Any]], *, seconds: float, part: tuple[int, int] | None = None,
) -> dict[str, Any]:
    """results.json's content; see the docstring of gidef.report."""
    recipe, dataset, roles = run.recipe, run.setting.dataset, run.setting.roles
    own = {place: one for place, one in trained.items() if one.strength == 1}
    lost = [{**one, "defence": recipe.evaluation.named(one["defence"], strength)} for one in failed for strength in recipe.evaluation.strengths]
    content = {
        "format": results.FORMAT, "recipe_name": name, "recipe": config.to_json(recipe), **({"part": list(part)} if part is not None else {}),
        "data": {
            "name": dataset.name, "title": dataset.title, "source": dataset.source, "md5": dataset.md5, "synthetic": dataset.synthetic,
            "counts": {
                "train": int(run.setting.counts.sum()), "val": len(dataset.val), "test": len(dataset.test), "victims": len(roles.victims),
                "tuning": len(roles.tuning), "judge": len(roles.judge),
            },
        },
        "versions": versions(), "hardware": {"device": _device_name(run.world.device), "cores": os.cpu_count(), "platform": platform.platform()},
        "seeds": list(recipe.seeds), "world_size": run.world.size, "threads": recipe.speed.threads,
        "seconds": {
            "total": seconds, "train": {f"{key}/{seed}": one.summary["seconds"] for (key, seed), one in own.items()}, "attack": found.seconds,
        },
        "weights_sha256": {f"{key}/{seed}": one.sha256 for (key, seed), one in own.items()},
        "training": [one.summary for one in trained.values()],
        "tuned": tuned, "nets": nets, "rows": tuning.noted(found.rows, tuned, lost), "bounds": found.bounds, "judge": found.judge,
        "pictures": found.pictures, "verdict": [], "choice": None,
        **({"not_applicable": found.not_applicable} if found.not_applicable else {}), **({"failed": failed} if failed else {}),
    }  # fmt: skip
    lines = read(run.record.path) if run.record is not None else ()
    content["comparisons"], content["starts"] = compare(content, lines), starts(content, lines)
    content["choice"] = choice(content)
    content["verdict"] = verdict(content)
    return content


def versions() -> dict[str, str]:
    import importlib.metadata

    names = ("torch", "torchvision", "timm", "numpy", "medmnist", "safetensors")
    found = {"python": platform.python_version(), "gidef": gidef.__version__}
    for name in names:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def publish(content: dict[str, Any], folder: Path, console: Console) -> None:
    """Write results.json and its tables and pictures, and print them: the same values everywhere."""
    rounds = [line for line in read(folder / "record.jsonl") if line["kind"] == "round"] if (folder / "record.jsonl").exists() else []
    curves: dict[str, list[tuple[int, float]]] = {}
    families: dict[str, str] = {}
    for line in rounds:
        label = f"{line['defence']}, seed {line['seed']}"
        curves.setdefault(label, []).append((line["round"], line["val_accuracy"]))
        families[label] = line["defence"]
    pictures = [picture for picture in content["pictures"] if picture != "pictures/learning.png"]
    if curves:
        learning_curves(folder / "pictures" / "learning.png", curves, title=content["data"]["title"], chance=content["judge"].get("chance"), families=families)
        pictures.append("pictures/learning.png")
    if (folder / "pictures" / "partition.png").exists() and "pictures/partition.png" not in pictures:
        pictures.append("pictures/partition.png")
    traded = [f"pictures/{path.name}" for path in tradeoff.save([(content["recipe_name"], content)], folder / "pictures") if path.suffix == ".png"]
    content["pictures"] = [picture for picture in pictures if picture not in traded] + traded
    results.save(folder / "results.json", content)
    for name, text in (("csv", tables.csv(content)), ("md", tables.markdown(content)), ("tex", tables.latex(content)), ("txt", tables.text(content))):
        write_atomically(folder / f"table.{name}", text.encode())
    console.say("")
    console.table(tables.training_table(content))
    console.say("")
    console.table(tables.table(content, width=console.width))
    for more in (tables.tuned_table(content), tables.judges_table(content)):
        if more is not None:
            console.say("")
            console.table(more)
    console.heading("What this run shows")
    for sentence in content["verdict"]:
        console.table(sentence_of(sentence))
    console.heading("Where to look")
    for picture in content["pictures"]:
        if (folder / picture).exists():  # a run may have been copied without them
            console.say(f"picture  {folder / picture}")
    console.say(f"page     {html.write([folder])}")
    record = f"; record {folder / 'record.jsonl'}" if (folder / "record.jsonl").exists() else ""
    console.say(f"results  {folder / 'results.json'}, table.csv, table.md, table.tex{record}")
    if (folder / "models").exists():
        console.say(f"models   {folder / 'models'}")
    console.say(f"time     {content['seconds']['total']:.0f} s")


def sentence_of(text: str) -> Any:
    """A sentence that wraps at the screen's width, with a dash in front."""
    from rich.padding import Padding
    from rich.text import Text

    return Padding(Text(f"- {text}"), (0, 0, 0, 0))


# --- taking up a finished run ----------------------------------------------------------------------------------------


def _read_run(folder: Path, *, allow_code: bool) -> tuple[config.Recipe, str, dict[str, Any]]:
    """The recipe of a run, its name, and the recipe as it stands in the file."""
    path = folder / RECIPE
    try:
        content = json.loads(path.read_text())
        recipe, name = config.from_json(content["recipe"], load=importing.load if allow_code else None), content["name"]
        if not isinstance(recipe, config.Recipe):
            raise ValueError(f"it holds a {type(recipe).__name__}, expected a Recipe.")
        found = config.problems(recipe)  # it may have been edited by hand
    except (FileNotFoundError, NotADirectoryError) as error:
        raise InputError(f"{folder} is no run: {RECIPE} is missing there. Give the folder that a recipe was run with as --out.") from error
    except (OSError, ValueError, KeyError, TypeError, ImportError, AttributeError) as error:
        raise InputError(f"{path} cannot be read: {_unread(error)}") from error
    if found:
        raise InputError(f"{path}: " + "\n".join(found))
    return recipe, name, content["recipe"]


def _unread(error: Exception) -> str:
    """Why a recipe's file cannot be read, in words."""
    if isinstance(error, json.JSONDecodeError | UnicodeDecodeError):
        return f"it is not JSON ({error})"
    return f"{error} is missing in it" if isinstance(error, KeyError) else str(error)


def attack_again(arguments: argparse.Namespace, part: tuple[int, int] = (0, 1)) -> None:
    """`gidef attack RUN`: attack a finished run's checkpoints with other attacks, victims or budgets, without training. part: of the attacks, (I, N)."""
    began = time.perf_counter()
    folder = Path(arguments.folder)
    leave_on_sigterm(arguments.out)
    recipe, name, saved = _read_run(folder, allow_code=arguments.allow_code)
    new = _altered(recipe, arguments)
    if part[1] > 1:
        new = dataclasses.replace(new, attacks=dict(list(new.attacks.items())[part[0] :: part[1]]))
        if config.controlled(new.attacks) is None:  # another part has what it repeats
            new = dataclasses.replace(new, evaluation=dataclasses.replace(new.evaluation, control=False))
    if part[1] > 1 and not new.attacks:
        print(f"gidef: part {part[0]}/{part[1]} of the attacks is empty: nothing to do.", file=sys.stderr)
        return
    found = config.problems(new, trained=True)
    if found:
        raise InputError("\n".join(found))
    with (
        open_world(new.speed.device, new.speed.timeout_s, stall_s=new.speed.stall_s) as world,
        contextlib.ExitStack() as stack,
    ):
        world = seated(world)
        if (size := new.speed.shard_size) > 1 and world.size % size == 0:
            world = with_mesh(world, size, timeout_s=new.speed.stall_s)
        settle_threads(new)
        said: list[str] = []
        if size > 1 and world.mesh is None:
            said.append(f"{world.size} rank(s) make no groups of {size} (speed.shard_size): every network is attacked on one rank.")
        setting = build.load_setting(new, world=world, notice=said.append, folder=folder)
        out = Path(world.broadcast_json(arguments.out or str(folder / "attacked" / time.strftime("%Y-%m-%d-%H%M%S"))))
        if (out / "results.json").exists():
            raise InputError(f"{out} holds results already: choose another --out.")
        if world.rank == 0:
            stack.enter_context(held(out))
        leave_on_sigterm(out, clear=world.rank == 0)
        mark = fingerprint(saved, setting.dataset)  # as written: a class of the script that ran has another name when imported
        # attacks of an earlier life are written again, from their saved results
        record = Record.open(out / "record.jsonl", keep=lambda line: line["kind"] not in ("matched", "tuned attack", "attack", "attempt")) if world.rank == 0 else None
        own = rank_log(out, world.rank)
        with _last_lines(out), record or contextlib.nullcontext(), Console(rank=world.rank, log=out / "log.txt", own=own) as console:
            run = Run(setting, world, folder, console, record, mark)
            console.heading(f"{name}: {folder} attacked again")
            for note in dict.fromkeys([*said, *setting.dataset.notes]):
                console.notice(note)
            defences, tuned, failed = tuning.resolved(run)
            for one in failed:
                console.notice(f"{one['defence']}, seed {one['seed']} was not trained: {one['error']}")
            check_any(defences, failed)
            nets = copies.check(run, {key: one for (key, _), one in defences.items()}, out / copies.FILE)
            trained = {(key, seed): reload(run, key, defence, seed) for (key, seed), defence in defences.items()}
            attacked = strengths.evaluated(run, trained)
            findings = audit.audit(run, attacked, folder=out / "attacks", pictures=out / "pictures")
            content = describe(run, name, trained | attacked, findings, tuned, nets, failed, seconds=time.perf_counter() - began)
            if world.rank == 0:
                publish(content, out, console)
            world.barrier()


def _altered(recipe: config.Recipe, arguments: argparse.Namespace) -> config.Recipe:
    """The run's recipe with the command's changes to attacks, victims and budgets."""
    if unknown := [name for name in arguments.defence or () if name not in recipe.chosen]:
        raise InputError(f"{unknown} is none of the run's defences, which are {sorted(recipe.chosen)}.")
    offered = {**config.PRESETS, **recipe.attacks}  # the recipe's own settings win over a preset of the same name
    asked = list(arguments.attack or recipe.attacks)
    for place, name in enumerate(asked):
        if name not in offered and importing.is_code(name):
            asked[place], own = _own_attack(name, allow_code=arguments.allow_code)
            if asked[place] in asked[:place] or asked[place] in offered:
                raise InputError(f"--attack {name}: there is another attack called {asked[place]}. Rename the class, or leave one of them out.")
            offered[asked[place]] = own
    if unknown := [name for name in asked if name not in offered]:
        raise InputError(
            f"{unknown} is none of the run's attacks, which are {sorted(recipe.attacks)}, nor a preset: {', '.join(config.PRESETS)}; your own is "
            "package.module:Class or folder/file.py:Class, with --allow-code."
        )
    if recipe.choose is not None and arguments.victims is not None:
        raise InputError(f"--victims {arguments.victims}: the run chooses among its defences and attacks the images kept for tuning. Leave it out.")
    attacks = {name: _asked(name, offered[name], arguments) for name in asked}
    changes = {
        "num_victims": arguments.victims, "checkpoints": tuple(arguments.checkpoint) if arguments.checkpoint else None,
        "batch_size": arguments.batch_size, "release": arguments.release, "released_loss": arguments.released_loss, "control": arguments.control or None,
        **{name: getattr(arguments, name) for name in ("local_steps", "local_epochs", "local_lr", "local_optimiser", "local_momentum")},
        "strengths": tuple(arguments.strength) if arguments.strength else None,
    }  # fmt: skip
    evaluation = dataclasses.replace(recipe.evaluation, **{name: value for name, value in changes.items() if value is not None})
    chosen = (
        ("device", arguments.device), ("attacks_at_once", arguments.at_once), ("attack_mode", arguments.mode), ("compile", arguments.compile or None),
        ("schedule", arguments.schedule), ("threads", arguments.threads),
    )  # fmt: skip
    speed = {name: value for name, value in chosen if value is not None}
    return dataclasses.replace(
        recipe, attacks=attacks, evaluation=evaluation, speed=dataclasses.replace(recipe.speed, **speed),
        only=tuple(arguments.defence or recipe.only), resume=True, out=str(arguments.folder),
    )  # fmt: skip


def _own_attack(name: str, *, allow_code: bool) -> tuple[str, Any]:
    """(the class's name, an attack with its defaults) of `package.module:Class` or `folder/file.py:Class`; an instance serves as it is."""
    if not allow_code:
        raise InputError(f"--attack {name} names code, which would be imported and run: add --allow-code if you trust it.")
    found = importing.load(name)
    try:
        attack = found() if isinstance(found, type) else found
    except TypeError as error:
        raise InputError(f"--attack {name}: {error}. Give every field of the class a default, or name an instance.") from error
    known = dataclasses.is_dataclass(attack) and (callable(getattr(attack, "plan", None)) or isinstance(attack, config.ATTACKS))
    if not known:
        raise InputError(f"--attack {name} is a {type(attack).__name__}: expected a dataclass with a method plan(case), or an attack of gidef.config.")
    return name.rpartition(":")[2].rpartition(".")[2], attack


def _asked(name: str, attack: Any, arguments: argparse.Namespace) -> Any:
    """An attack with the command's budget and knowledge, as far as it has such fields."""
    if isinstance(attack, config.Tuned):
        inner = _asked(name, attack.attack, arguments)
        if sought := [field for field in attack.grid if inner != attack.attack and getattr(inner, field) != getattr(attack.attack, field)]:
            raise InputError(f"--{sought[0]}: the attack {name} seeks its {sought[0]} among {attack.grid[sought[0]]}. Leave it out.")
        return dataclasses.replace(attack, attack=inner)
    fixed = [f"--{flag}" for flag in ("iterations", "restarts", "steps") if getattr(arguments, flag) is not None]
    if isinstance(attack, config.Standard) and fixed:
        raise InputError(f"the budgets of an ensemble are fixed, so that its name says what was done: leave out {', '.join(fixed)}, or choose quick.")
    hints = {spec.name: str(spec.type) for spec in dataclasses.fields(attack)} if dataclasses.is_dataclass(attack) else {}
    asked = {field: getattr(arguments, field) for field in ("iterations", "restarts", "labels") if getattr(arguments, field) is not None}
    if "labels" in asked and "labels" in hints and not config.fits(asked["labels"], type(attack), "labels"):
        raise InputError(f"--labels {asked['labels']}: the attack {name} takes known or recovered labels; give one of them, or attack without it.")
    fitting = {field: value for field, value in asked.items() if field in hints}
    if arguments.steps is not None:
        fitting |= {field: min(arguments.steps, getattr(attack, field)) for field in TRAINING if field in hints}
    return dataclasses.replace(attack, **fitting)


TRAINING = ("steps", "fit_steps", "shadow_steps", "surrogate_steps", "gradients")
"""Fields of attacks that say how long something is trained on public images."""


def report_again(folders: Sequence[str | Path]) -> None:
    """`gidef report RUN...`: rebuild tables, pictures and page of each run from results.json and the record; of several, the first
    one's page shows all, with their joined table and trade-off beside it."""
    with Console() as console:
        contents = {Path(folder): results.load(Path(folder) / "results.json") for folder in folders}  # all, before anything is written
        for folder, content in contents.items():
            lines = read(folder / "record.jsonl") if (folder / "record.jsonl").exists() else ()
            content["comparisons"], content["starts"] = compare(content, lines), starts(content, lines)
            content["verdict"] = verdict(content)
            redrawn = findings.redraw(folder)
            content["pictures"] = redrawn + [picture for picture in content["pictures"] if picture not in redrawn]
            publish(content, folder, console)
        if len(folders) > 1:
            page, *others = joined.write(folders)
            console.say(f"page     {page}, over all {len(folders)} runs; {', '.join(path.name for path in others)} beside it")
