"""Command lines: parse, call, and turn a user's mistake into one message."""

from __future__ import annotations

import argparse
import copy
import json
import os
import sys
import traceback
from collections.abc import Callable
from contextlib import nullcontext, redirect_stdout
from pathlib import Path
from typing import Any

from rich.console import Console

from fastft import __version__
from fastft.config import ProfileConfig, check, describe, load_config, load_values, set_value, validate
from fastft.errors import ConfigError, FastftError, Interrupted

PROFILED_STEPS = 5


def main(argv: list[str] | None = None) -> int:
    """`fastft COMMAND ...`; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="fastft", description="Move what a prompt teaches into a few trained parameters."
    )
    parser.add_argument("--version", action="version", version=f"fastft {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    train = commands.add_parser(
        "train",
        help="run a config: prepare, teach, train, evaluate, report",
        usage="fastft train --cfg FILE [key.sub=value ...]   (or: deepspeed fastft/train.py --cfg FILE ...)",
        epilog=config_reference(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    train.add_argument("--cfg", required=True, metavar="FILE", help="YAML configuration")
    train.add_argument("--debug", action="store_true", help="show tracebacks")
    train.add_argument("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)  # from the deepspeed launcher
    train.add_argument("overrides", nargs="*", metavar="key.sub=value", help="values over those in FILE")
    train.set_defaults(function=_train)
    profile = commands.add_parser(
        "profile",
        help="where time and memory of a config's training steps go",
        usage="fastft profile --cfg FILE [key.sub=value ...]   (or: deepspeed fastft/train.py --cfg FILE "
        "profile.steps=5 ...)",
        description=f"A run of {PROFILED_STEPS} recorded training steps and those before them, in <output_dir>-profile "
        "unless output_dir is given: prints where a step's time goes and what to change first, and writes report.html, "
        "report.json and a trace for ui.perfetto.dev.",
    )
    profile.add_argument("--cfg", required=True, metavar="FILE", help="YAML configuration")
    profile.add_argument("--debug", action="store_true", help="show tracebacks")
    profile.add_argument("overrides", nargs="*", metavar="key.sub=value", help="values over those in FILE")
    profile.set_defaults(function=_profile)
    evaluate = commands.add_parser(
        "evaluate",
        help="accuracy of a classification config (method: icl), without writing anything",
        usage="fastft evaluate --cfg FILE [--json] [key.sub=value ...]",
    )
    evaluate.add_argument("--cfg", required=True, metavar="FILE", help="YAML configuration")
    evaluate.add_argument("--json", action="store_true", help="print the summary as JSON; all else goes to stderr")
    evaluate.add_argument("--debug", action="store_true", help="show tracebacks")
    evaluate.add_argument("overrides", nargs="*", metavar="key.sub=value", help="values over those in FILE")
    evaluate.set_defaults(function=_evaluate)
    plan = commands.add_parser(
        "plan",
        help="memory and time of a config on a device, and what to change where it does not fit",
        usage="fastft plan --cfg FILE --gpu NAME [--gpus N] [--memory 24GiB] [--host-memory 64GiB] [--out FILE] "
        "[--json] [key.sub=value ...]",
        description="Counts bytes and operations of a run from its config alone; no weights are loaded. Exit code 1 "
        "where it does not fit.",
    )
    plan.add_argument("--cfg", required=True, metavar="FILE", help="YAML configuration")
    plan.add_argument(
        "--gpu", required=True, metavar="NAME", help="rtx4090, a100-80gb, ..., cpu, or auto: this machine's"
    )
    plan.add_argument("--gpus", type=int, default=1, metavar="N", help="how many of them, one process each")
    plan.add_argument("--memory", metavar="24GiB", help="memory of the device, in place of its own")
    plan.add_argument("--host-memory", metavar="64GiB", help="memory of the host; default: this machine's")
    plan.add_argument("--out", metavar="FILE", help="write the config, with what makes it fit")
    plan.add_argument("--json", action="store_true", help="print JSON")
    plan.add_argument("--debug", action="store_true", help="show tracebacks")
    plan.add_argument("overrides", nargs="*", metavar="key.sub=value", help="values over those in FILE")
    plan.set_defaults(function=_plan)
    sweep = commands.add_parser(
        "sweep",
        help="a grid of runs: start those that are not done, and write one table",
        usage="fastft sweep --cfg FILE [--dry-run] [--part i/n] [key=value ...]",
        epilog=sweep_reference(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    sweep.add_argument("--cfg", required=True, metavar="FILE", help="YAML file of the sweep")
    sweep.add_argument("--dry-run", action="store_true", help="list the runs and which are done; start nothing")
    sweep.add_argument("--part", metavar="i/n", help="every n-th run, from the i-th: one part for each node")
    sweep.add_argument("--debug", action="store_true", help="show tracebacks")
    sweep.add_argument("overrides", nargs="*", metavar="key=value", help="values over those in FILE (base.seed=1)")
    sweep.set_defaults(function=_sweep)
    report = commands.add_parser(
        "report",
        help="compare runs: tables and pictures for a paper, training curves",
        usage="fastft report FOLDER [FOLDER ...] [--out DIR]",
        description="Compare finished runs on classification tasks: accuracy in and out of domain, by method, number "
        "of shots and cost, with 95 % intervals over seeds and examples. Writes tables (.md, .tex, .csv), pictures "
        "(.svg, .pdf, .png) and report.html, which holds them all and the runs' training curves; of other runs, and of "
        "such as failed, the curves alone.",
    )
    report.add_argument("folders", nargs="+", metavar="FOLDER", help="a sweep's output_dir, or a run's")
    report.add_argument("--out", metavar="DIR", help="where to write (FOLDER/comparison when there is one FOLDER)")
    report.add_argument("--debug", action="store_true", help="show tracebacks")
    report.set_defaults(function=_report)
    export = commands.add_parser(
        "export",
        help="what a run trained, as a PEFT adapter, a merged model or plain biases",
        usage="fastft export RUN [--format peft|merged|delta] [--checkpoint last|best|step_N] [--out DIR]",
    )
    export.add_argument("run", metavar="RUN", help="the output_dir of a run")
    export.add_argument(
        "--format",
        choices=["peft", "merged", "delta"],
        help="peft: PEFT's files, also for vLLM (default for LoRA); merged: the whole model and tokenizer; delta: "
        "biases minus the base's (default for BitFit)",
    )
    export.add_argument("--checkpoint", metavar="NAME", help="last, best or step_N; default: the run's end")
    export.add_argument("--out", metavar="DIR", help="a new folder (default RUN/export/FORMAT)")
    export.add_argument("--debug", action="store_true", help="show tracebacks")
    export.set_defaults(function=_export)
    doctor = commands.add_parser("doctor", help="what is built and installed, and what will be used")
    doctor.add_argument("--json", action="store_true", help="print JSON")
    doctor.add_argument("--debug", action="store_true", help=argparse.SUPPRESS)
    doctor.set_defaults(function=_doctor)
    arguments = parser.parse_args(argv)
    return guard(lambda: arguments.function(arguments), debug=arguments.debug)


def guard(function: Callable[[], int | None], *, debug: bool) -> int:
    """Run a command; what the user can mend is shown as one message, without a traceback unless `debug`."""
    try:
        return function() or 0
    except Interrupted as stopped:
        _say(f"fastft: {stopped}")
        return 128 + stopped.signum
    except FastftError as error:
        if debug:
            traceback.print_exc()
        _say(f"fastft: {type(error).__name__}: {error}")
        return 1
    except (OSError, RuntimeError, ValueError) as error:
        if debug or not _is_ours(error):
            raise
        _say(f"fastft: {type(error).__name__}: {error}")
        return 1


def _is_ours(error: Exception) -> bool:
    """A full disk, or a message of the ops layer, which raises Python's own kinds."""
    return (isinstance(error, OSError) and error.errno is not None) or str(error).startswith("fastft ")


def _say(message: str) -> None:
    # All ranks fail alike; one of them speaks.
    if os.environ.get("RANK", "0") == "0":
        sys.stdout.flush()
        print(message, file=sys.stderr, flush=True)


def _train(arguments: argparse.Namespace) -> int:
    config = load_config(arguments.cfg, arguments.overrides)
    if os.environ.get("RANK", "0") == "0":  # before the imports, which take seconds
        print(f"fastft     {config.method}: {arguments.cfg} -> {config.output_dir}", flush=True)
    from fastft.engine.quiet import quiet

    quiet()
    from fastft.engine.run import run

    run(config)
    return 0


def _profile(arguments: argparse.Namespace) -> int:
    given = load_values(arguments.cfg, arguments.overrides)
    config = validate(profiled_values(given, arguments.overrides), source=arguments.cfg)
    if config.method == "icl":
        raise ConfigError(f"fastft profile: {arguments.cfg} has method=icl, which trains nothing; expected another")
    print(f"fastft     profile: {arguments.cfg} -> {config.output_dir}", flush=True)
    from fastft.engine.quiet import quiet

    quiet()
    from fastft.engine.run import run
    from fastft.report.table import profile_tables

    run(config)
    report = json.loads((Path(config.output_dir) / "report.json").read_text(encoding="utf-8"))
    for table in profile_tables(report):
        Console().print(table)
    print(f"report     {Path(config.output_dir) / 'report.html'}")
    print(f"trace      {Path(config.output_dir) / 'profile' / 'rank_0.trace.json.gz'} (for ui.perfetto.dev)")
    return 0


def profiled_values(raw: dict[str, Any], overrides: list[str]) -> dict[str, Any]:
    """A config's plain values as those of a short run that is profiled; what `overrides` set stays as it is."""
    given = {override.partition("=")[0] for override in overrides}
    raw = copy.deepcopy(raw)

    def change(key: str, value: Any) -> None:
        if key not in given:
            set_value(raw, key, value)

    if raw.get("output_dir"):
        change("output_dir", f"{str(raw['output_dir']).rstrip('/')}-profile")
    for key, value in {"overwrite": True, "resume": "never", "profile.steps": PROFILED_STEPS}.items():
        change(key, value)
    profile, _ = check(raw["profile"], ProfileConfig)  # problems are told when the whole is validated
    short = {"save_every": 0, "eval_every": 0, "keep_best": False}
    for key, value in ({"steps": profile.needed_steps} | short if profile else short).items():
        change(f"train.{key}", value)
    return raw


def _evaluate(arguments: argparse.Namespace) -> int:
    config = load_config(arguments.cfg, arguments.overrides)
    if config.method != "icl":
        raise ConfigError(
            f"fastft evaluate: {arguments.cfg} has method={config.method}, whose run evaluates itself (fastft train); "
            "expected method=icl"
        )
    with redirect_stdout(sys.stderr) if arguments.json else nullcontext():
        print(f"fastft     {config.method}: {arguments.cfg}", flush=True)
        from fastft.engine.quiet import quiet

        quiet()
        from fastft.engine.icl import evaluate_in_context

        summary = evaluate_in_context(config, keep=False)
    if arguments.json:
        print(json.dumps(summary, indent=2))
    return 0


def _plan(arguments: argparse.Namespace) -> int:
    config = load_config(arguments.cfg, arguments.overrides)
    from fastft.engine.quiet import quiet

    quiet()
    from fastft.plan.command import run

    return run(config, arguments)


def _sweep(arguments: argparse.Namespace) -> int:
    from fastft.sweep.grid import load_sweep
    from fastft.sweep.runner import list_runs, run_sweep

    sweep = load_sweep(arguments.cfg, arguments.overrides)
    return (list_runs if arguments.dry_run else run_sweep)(sweep, part=arguments.part)


def _report(arguments: argparse.Namespace) -> int:
    from fastft.report.paper import write_comparison

    out = Path(arguments.out) if arguments.out else None
    path, missing = write_comparison([Path(folder) for folder in arguments.folders], out)
    for line in missing:
        print(f"missing    {line}")
    beside = "; its tables as .md, .tex and .csv, its pictures as .svg, .pdf and .png beside it"
    print(f"report     {path}{beside if path.with_name('accuracy.csv').is_file() else ''}")
    return 0


def _export(arguments: argparse.Namespace) -> int:
    from fastft.engine.quiet import quiet

    quiet()
    from fastft.export import export

    out = Path(arguments.out) if arguments.out else None
    print(f"export     {export(Path(arguments.run), kind=arguments.format, checkpoint=arguments.checkpoint, out=out)}")
    return 0


def _doctor(arguments: argparse.Namespace) -> int:
    from fastft.engine.quiet import quiet

    quiet()
    from fastft.doctor import doctor

    return doctor(as_json=arguments.json)


def config_reference() -> str:
    """Every configuration key with its type, default and meaning."""
    lines = ["configuration keys (key: type = default):"]
    for key, kind, default, text in describe():
        if kind == "section":
            lines += ["", f"{key}: {text}"]
        else:
            lines += [f"  {key}: {kind} = {default}", f"      {text}"]
    return "\n".join(lines)


def sweep_reference() -> str:
    """What a sweep's file looks like, and its keys."""
    from fastft.sweep import grid

    lines = [*grid.__doc__.splitlines(), "keys (key: type = default):"]
    for key, kind, default, text in describe(grid.SweepConfig):
        lines += [f"  {key}: {kind} = {default}", f"      {text}"]
    return "\n".join(lines)
