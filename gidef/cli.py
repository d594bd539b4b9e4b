"""`gidef data | attack | report | profile | plan | doctor`. Training starts from a recipe."""

import argparse
import os
import sys

from gidef.main import ending, launched, share, speaks


def main(argv: list[str] | None = None) -> None:
    """Parse and dispatch; bad input ends with one message and status 2. `--help` imports no torch."""
    arguments = _parser().parse_args(argv)
    if not hasattr(arguments, "run"):
        _parser().print_help()
        sys.exit(2)
    with ending():
        arguments.run(arguments)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="gidef", description="Federated training, gradient inversion of what clients share, and defences against it.")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND")

    data = commands.add_parser("data", help="list, download, convert and preview data sets").add_subparsers(title="commands", metavar="COMMAND", required=True)
    listing = data.add_parser("list", help="every data set that gidef knows")
    listing.set_defaults(run=_data_list)
    download = data.add_parser("download", help="fetch a MedMNIST set or CIFAR-10 into its cache")
    download.add_argument("name")
    download.add_argument("--size", type=int, default=None, help="28, 64, 128 or 224 pixels")
    download.set_defaults(run=_data_download)
    convert = data.add_parser("convert", help="write a data set as WebDataset shards, lossless, also per client")
    _source(convert)
    convert.add_argument("--out", required=True, help="folder for the .tar files")
    convert.add_argument("--examples-per-shard", type=int, default=1000)
    convert.add_argument("--kind", choices=("png", "npy"), default="png", help="of images: PNG, or raw bytes, larger and faster to stream")
    convert.add_argument("--clients", type=int, default=None, metavar="N", help="shards per client, to stream from (--data.stream)")
    convert.add_argument("--alpha", type=float, default=None, help="of a Dirichlet split of the classes over the clients; IID without it")
    convert.add_argument("--seed", type=int, default=0, help="of that split")
    convert.set_defaults(run=_data_convert)
    preview = data.add_parser("preview", help="a picture with some images of every class")
    _source(preview)
    preview.add_argument("--out", default="preview.png", help="the picture (default preview.png)")
    preview.add_argument("--per-class", type=int, default=8)
    preview.set_defaults(run=_data_preview)

    attack = commands.add_parser("attack", help="attack a finished run's checkpoints again, without training")
    attack.add_argument("folder", metavar="RUN", help="the run's folder")
    attack.add_argument("--attack", nargs="+", default=None, metavar="NAME", help="of the recipe's attacks (default all), presets such as standard, or package.module:Class of your own (with --allow-code)")
    attack.add_argument("--defence", nargs="+", default=None, metavar="NAME", help="of the recipe's defences (default all)")
    attack.add_argument("--checkpoint", nargs="+", default=None, choices=("untrained", "early", "final"))
    attack.add_argument("--victims", type=int, default=None)
    attack.add_argument("--batch-size", type=int, default=None)
    attack.add_argument("--strength", type=float, nargs="+", default=None, metavar="S", help="of the noise on the latent, times the trained one: 0 is none")
    attack.add_argument("--iterations", type=int, default=None)
    attack.add_argument("--restarts", type=int, default=None)
    attack.add_argument("--steps", type=int, default=None, help="at most so many training steps of what an attack trains on public images")
    attack.add_argument("--labels", choices=("known", "counts", "recovered", "searched", "soft"), default=None)
    attack.add_argument("--control", action="store_true", help="also attack a shuffled gradient: what the priors draw by themselves, per defence and checkpoint")
    attack.add_argument("--release", choices=("gradient", "delta"), default=None)
    attack.add_argument("--released-loss", choices=("client", "utility"), default=None, help="whose gradient leaves: the client's whole loss, or its cross-entropy alone")
    attack.add_argument("--local-steps", type=int, default=None, help="of a delta: steps of one local epoch")
    attack.add_argument("--local-epochs", type=int, default=None, help="of a delta: passes over the batch")
    attack.add_argument("--local-lr", type=float, default=None, help="of a delta: of its steps")
    attack.add_argument("--local-optimiser", choices=("sgd", "adam"), default=None, help="of a delta: what takes its steps")
    attack.add_argument("--local-momentum", type=float, default=None, help="of a delta: of sgd")
    attack.add_argument("--device", default=None)
    attack.add_argument("--threads", type=int, default=None, help="threads inside one operator (default: as the run; they decide the last bits)")
    attack.add_argument("--at-once", type=int, default=None, help="attacks in one vectorised program")
    attack.add_argument("--mode", choices=("auto", "loop", "vmap", "traced", "compiled"), default=None, help="how a program of attacks runs")
    attack.add_argument("--compile", action="store_true", help="let the calibration try compiled programs")
    attack.add_argument("--schedule", choices=("longest_first", "static", "dynamic"), default=None, help="how attacks go to ranks")
    attack.add_argument("--part", default=None, metavar="I/N", help="only the I-th of N shares of the attacks, I from 0, e.g. of an array job's task")
    attack.add_argument("--out", default=None, help="folder for the results (default RUN/attacked/<time>)")
    attack.add_argument("--allow-code", action="store_true", help="import the modules that the run's recipe, or --attack, names")
    attack.set_defaults(run=_attack)

    report = commands.add_parser("report", help="rebuild tables, pictures and report.html from a run's record")
    report.add_argument("folder", metavar="RUN", nargs="+", help="a run's folder; of several, report.html in the first shows all")
    report.set_defaults(run=_report)

    profile = commands.add_parser("profile", help="where the seconds of a recipe's training go: top costs, shares, a trace to look at")
    profile.add_argument("recipe", metavar="RECIPE", help="a recipe's file, e.g. recipes/tiny.py")
    profile.add_argument("rest", metavar="ARGS", nargs=argparse.REMAINDER, help="the recipe's own arguments, and --out FOLDER, --profiled-rounds N (default 2)")
    profile.set_defaults(run=_profile)

    plan = commands.add_parser("plan", help="forecast the round time on many GPUs from a run on one, or from numbers")
    plan.add_argument("folder", metavar="RUN", nargs="?", default=None, help="a run on one rank; what follows overrides what it measured")
    plan.add_argument("--times", type=float, nargs="+", default=None, metavar="S", help="seconds of each client's local training")
    plan.add_argument("--megabytes", type=float, default=None, help="of the sum over ranks: 8 bytes per shared number by default")
    plan.add_argument("--cohort", type=int, default=None, help="clients per round")
    plan.add_argument("--clients-per-rank", type=int, default=None, help="let the cohort grow with the ranks (weak scaling)")
    plan.add_argument("--scale", type=float, default=1.0, help="times a client's time: 0.1 for GPUs ten times as fast as what was measured")
    plan.add_argument("--spread", type=float, default=None, help="standard deviation of a client's log time over rounds")
    plan.add_argument("--rest", type=float, default=None, help="seconds of a round that more ranks do not shorten")
    plan.add_argument("--ranks", type=int, nargs="+", default=[8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096])
    for name, value in (("gpus-per-node", 8), ("intra-gbytes", 300.0), ("inter-gbytes", 20.0), ("intra-us", 5.0), ("inter-us", 15.0), ("meet-us", 40.0)):
        plan.add_argument(f"--{name}", type=type(value), default=value)
    plan.add_argument("--algorithm", choices=("ring", "tree", "hierarchical"), default="hierarchical")
    plan.add_argument("--out", default=None, help="folder for plan.csv and plan.png")
    plan.set_defaults(run=_plan)

    doctor = commands.add_parser("doctor", help="versions, devices, backends, stale locks; what is missing and how to get it")
    doctor.add_argument("--out", default=None, metavar="DIR", help="a run's folder: can it be written to, and under torchrun or srun, do all ranks share it?")
    doctor.set_defaults(run=_doctor)
    return parser


def _source(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", nargs="?", default="bloodmnist")
    parser.add_argument("--path", default=None, help="an .npz file, a folder of images, or a shard pattern")
    parser.add_argument("--size", type=int, default=None)


def _data_list(arguments: argparse.Namespace) -> None:
    from gidef.data import available
    from gidef.report import Console

    with Console() as console:
        for entry in available():
            sizes = "/".join(map(str, entry.sizes))
            status = "" if entry.supported else f"   not supported: {entry.why_not}"
            console.say(f"{entry.name:16} {entry.num_classes:3} classes  {sizes:15} {entry.modality}{status}")


def _load(arguments: argparse.Namespace, console: object) -> object:
    from gidef.data import load_dataset

    return load_dataset(arguments.name, path=getattr(arguments, "path", None), size=arguments.size, notice=console.notice)


def _data_download(arguments: argparse.Namespace) -> None:
    from gidef.errors import InputError
    from gidef.report import Console

    if arguments.name == "synthetic" or ":" in arguments.name:
        raise InputError(f"{arguments.name} is made by code: there is nothing to download.")
    with Console() as console:
        dataset = _load(arguments, console)
        if dataset.synthetic:
            raise InputError(f"{arguments.name} could not be downloaded: is this machine offline? Fetch the .npz elsewhere and set GIDEF_DATA to its folder.")
        console.say(f"{dataset.title}: {len(dataset.train)} / {len(dataset.val)} / {len(dataset.test)} images, from {dataset.source}")


def _data_convert(arguments: argparse.Namespace) -> None:
    from gidef.data import partition, write_webdataset
    from gidef.errors import InputError
    from gidef.report import Console

    if arguments.alpha is not None and arguments.clients is None:
        raise InputError("--alpha splits the images over clients: give their number as --clients.")
    with Console() as console:
        dataset, clients, use = _load(arguments, console), None, f"--data.path {arguments.out}"
        if arguments.clients is not None:
            cut = partition.iid if arguments.alpha is None else partition.dirichlet
            clients = cut(dataset.train.labels, num_clients=arguments.clients, seed=arguments.seed, **({} if arguments.alpha is None else {"alpha": arguments.alpha}))
            use = f"--data.stream --data.path {arguments.out} --data.num-clients {arguments.clients}"
        shards = write_webdataset(dataset, arguments.out, examples_per_shard=arguments.examples_per_shard, clients=clients, kind=arguments.kind)
        console.say(f"{dataset.title}: {len(shards)} shards in {arguments.out}; use them with {use}")


def _data_preview(arguments: argparse.Namespace) -> None:
    from gidef.errors import InputError
    from gidef.report import Console, preview

    if arguments.per_class < 1:
        raise InputError(f"--per-class {arguments.per_class}: give at least 1.")
    with Console() as console:
        dataset = _load(arguments, console)
        path = preview(
            arguments.out, dataset.train.images, dataset.train.labels, dataset.class_names, per_class=arguments.per_class, title=dataset.title
        )
        console.say(f"{dataset.title}: {path}")


def _attack(arguments: argparse.Namespace) -> None:
    part = share(arguments.part) if arguments.part is not None else (0, 1)
    from gidef.job import attack_again

    attack_again(arguments, part)


def _report(arguments: argparse.Namespace) -> None:
    from gidef.job import report_again

    report_again(arguments.folder)


def _profile(arguments: argparse.Namespace) -> None:
    os.environ.setdefault("KINETO_LOG_LEVEL", "5")  # the profiler's library reads it when it is loaded; it would tell of every start and stop
    from gidef.profiling import profile

    profile(arguments.recipe, arguments.rest)


def _plan(arguments: argparse.Namespace) -> None:
    from gidef.forecasts import plan

    plan(arguments)


def _doctor(arguments: argparse.Namespace) -> None:
    from gidef.doctor import examine, examine_ranks

    marks = {"ok": "  ok     ", "note": "  note   ", "problem": "  PROBLEM"}
    findings = examine_ranks(arguments.out) if launched() else examine(arguments.out)
    problems = sum(finding.level == "problem" for finding in findings)
    if speaks() or any("SOCKET_IFNAME" in finding.what or "did not meet" in finding.what for finding in findings if finding.level == "problem"):
        for finding in findings:
            print(f"{marks[finding.level]} {finding.what}" + (f"\n            -> {finding.cure}" if finding.cure else ""))
        print(f"{problems} problem{'s' if problems != 1 else ''} found." if problems else "Everything that gidef needs is here.", flush=True)
    sys.exit(1 if problems else 0)
