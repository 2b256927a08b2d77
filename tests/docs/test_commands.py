"""Every command and every snippet of the documentation: run with a tiny model, or parsed where that is not possible."""

from __future__ import annotations

import argparse
import io
import json
import re
import runpy
import shutil
import signal
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pytest

from fastft.cli import main
from fastft.config import Config, load_config
from fastft.reference import markdown
from fastft.tasks import load_documents, select
from tests.conftest import FACTS, ROOT
from tests.docs.pages import Block, Command, blocks, commands

# What stands for a file or a folder of the reader's own.
PLACEHOLDERS = {"FILE": "configs/quickstart.yaml", "RUN": "runs/mine", "FOLDER": "runs/laptop", "DIR": "out"}

# Commands that are parsed and not run, and why. The parser is the program's own.
PARSED = {
    r"make ": "installs packages; make reads the rules",
    r"pip install": "installs packages",
    r"python benchmarks/": "takes minutes to hours, or a GPU; short ones: tests/test_benchmarks.py",
    r"fastft sweep": "starts a process for each of many runs; its --dry-run is run",
}
OPTIONAL = {"lm_eval"}  # packages that a script is for, and tests do without

# Less work of the same kind, over what a command says.
SMALL = {
    "": ["overwrite=true", "model.dtype=float32", "deepspeed.threads_per_rank=1", "evaluate.batch_size=8"],
    "train": ["peft.r=2", "train.steps=1", "train.batch_size=2", "train.warmup_steps=0"],
    "documents": [
        *("data.task=documents", "data.path=facts.jsonl", "data.documents=[0]", "data.control_documents=1"),
        *("queries.self_study.count=2", "queries.self_study.examples=''", "queries.self_study.max_question_tokens=4"),
        *("queries.passages={tokens: 16, prompt_tokens: 6, stride: 8}", "evaluate.max_new_tokens=2"),
    ],
    "classification": ["icl.num_shots=2", "evaluate.max_examples=4"],
}


@pytest.fixture(scope="module")
def world(tmp_path_factory, tiny):
    """A folder with what the commands name: configs, data, a model, and finished runs to report and export."""
    folder = tmp_path_factory.mktemp("docs")
    for name in ("configs", "fastft", "benchmarks"):
        (folder / name).symlink_to(ROOT / name)
    (folder / "MODEL").symlink_to(tiny("llama"))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("FASTFT_CACHE", str(folder / "cache"))
        patch.setenv("FASTFT_DATA", str(folder / "data"))
        patch.setattr(sys, "path", [*sys.path, str(ROOT / "benchmarks")])
        write_data(folder)
        yield folder


def write_data(folder: Path) -> None:
    def lines(path: str, rows: list[dict]) -> None:
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text("".join(json.dumps(row) + "\n" for row in rows))

    facts = [fact for _, fact, *_ in FACTS]
    pairs = [{"sentence1": facts[i % 3][:30], "sentence2": facts[i % 2][:20], "label": i % 2} for i in range(12)]
    lines("data/rte/train.jsonl", pairs)
    lines("data/rte/validation.jsonl", pairs[:6])
    groups = {"heuristic": "lexical_overlap", "subcase": "swap"}
    hans = [{"premise": p["sentence1"], "hypothesis": p["sentence2"], "label": p["label"], **groups} for p in pairs]
    lines("data/hans/validation.jsonl", hans)
    asked = [(fact, {"question": q, "answers": [a]}) for _, fact, q, a in FACTS]
    documents = [{"id": str(i), "title": "A fact", "text": t, "questions": [q]} for i, (t, q) in enumerate(asked)]
    lines("facts.jsonl", documents)
    shutil.copy(folder / "facts.jsonl", folder / "my.jsonl")
    reviews = [{"text": fact, "sentiment": ("pos", "neg")[i % 2]} for i, fact in enumerate(facts * 2)]
    for name in ("reviews", "films"):
        lines(f"{name}.jsonl", reviews)
    (folder / "dev.csv").write_text("text,sentiment\nWarm and funny.,pos\nOver too late.,neg\n")
    (folder / "hosts").write_text("localhost slots=2\n")


DONE: dict[tuple[str, ...], None] = {}  # what has been run here


def fastft(*arguments: str, codes: tuple[int, ...] = (0,)) -> None:
    """`fastft ...` in this process, once."""
    if arguments in DONE:
        return
    out, handlers = io.StringIO(), {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)}
    try:
        with redirect_stdout(out), redirect_stderr(out):
            code = main(list(arguments))
    except SystemExit as exit:  # --help, and what argparse refuses
        code = exit.code
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    assert code in codes, f"fastft {' '.join(arguments)}: {code}\n{out.getvalue()[-3000:]}"
    DONE[arguments] = None


def small(config: Config, world: Path) -> list[str]:
    """Overrides that make a run of this method and kind small; documents that are named must be there."""
    if config.data.task == "documents" and config.data.path is None:
        select(load_documents(config.data), config.data.documents)
    parts = ["", config.kind, *(["train"] if config.method != "icl" else [])]
    values = [value for part in parts for value in SMALL[part]] + [f"model.name_or_path={world / 'MODEL'}"]
    if config.method == "distill" and config.kind == "classification":
        values.append("distill.examples=4")
    if config.deepspeed.offload_param == "none":
        values.append("deepspeed.zero_stage=0")
    return values


def fill(words: tuple[str, ...]) -> list[str]:
    return [PLACEHOLDERS.get(word, word) for word in words]


def run_config(words: list[str], world: Path, command: str) -> None:
    """A command that takes --cfg: its config is validated as it stands, and a small one is run."""
    if "--help" in words:
        return fastft(command, *words)
    if command == "evaluate":
        words = [word.replace("quickstart", "icl_rte") for word in words]
    config = load_config(words[words.index("--cfg") + 1], [w for w in words if re.match(r"[a-z_.]+=", w)])
    profiles = command == "profile" or any(word.startswith("profile.") for word in words)
    recorded = ["train.steps=2", "profile.steps=1", "profile.wait=0"] if profiles else []
    fastft(command, *words, *small(config, world), *recorded)


def run_plan(words: list[str], world: Path) -> None:
    """Exit code 1: it was counted, and does not fit."""
    cfg = words[words.index("--cfg") + 1]
    config = load_config(cfg, [w for w in words if re.match(r"[a-z_.]+=", w)])
    is_large = config.model.quantization != "none"  # of a published shape: counted without its weights
    more = [] if is_large else [f"model.name_or_path={world / 'MODEL'}"]
    fastft("plan", *words, *more, codes=(0, 1))


def run_deepspeed(words: list[str], world: Path) -> None:
    """The launcher's own parser reads its options; the script runs in this process."""
    from deepspeed.launcher.runner import parse_args

    launcher = parse_args(words)
    assert launcher.user_script == "fastft/train.py"
    run_config(launcher.user_args, world, "train")


# Runs that commands and snippets read. runs/laptop is in a sweep's place: a run's folder serves as well.
DOCUMENTS = ["configs/quickstart.yaml", "data.path=my.jsonl", "data.documents=null"]
RUNS = {
    "runs/mine": [*DOCUMENTS, "output_dir=runs/mine"],
    "runs/parity": [*DOCUMENTS, "peft.activation=relu", "output_dir=runs/parity"],
    "runs/ft_rte": ["configs/ft_rte.yaml"],
    "runs/mlp": ["configs/ft_rte.yaml", "ft.head=mlp", "output_dir=runs/mlp"],
    "runs/laptop": ["configs/pbft_rte.yaml", "output_dir=runs/laptop"],
}


def make_runs(text: str, world: Path) -> None:
    """Leave the runs that a text names."""
    for folder, words in RUNS.items():
        if folder in text:
            run_config(["--cfg", *words], world, "train")


def run_report(words: list[str], world: Path) -> None:
    make_runs(" ".join(words), world)
    fastft("report", *dict.fromkeys(words))


def run_export(words: list[str], world: Path) -> None:
    make_runs(" ".join(words), world)
    shutil.rmtree(world / "runs/mine/export", ignore_errors=True)
    DONE.pop(("export", *words), None)
    fastft("export", *words)


def parse(command: Command) -> None:
    """Read a command that is not run by the parser that it has."""
    words = fill(command.words)
    if words[0] == "make":
        done = subprocess.run(["make", "-n", *words[1:]], cwd=ROOT, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
    elif words[0] == "pip":
        from pip._internal.commands import create_command

        create_command(words[1]).parse_args(words[2:])
    elif words[0] == "fastft":
        fastft(*words[1:], "--dry-run")
    else:
        script = ROOT / words[1].replace("bench_NAME", "bench_kl")
        parse_script(script, words[2:])


class Parsed(Exception):
    """The arguments were read without an error."""


def parse_script(script: Path, arguments: list[str]) -> None:
    """Run a script up to where it has read its arguments."""
    read = argparse.ArgumentParser.parse_args

    def parse_args(self, *args, **kwargs):
        read(self, *args, **kwargs)
        raise Parsed

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, "parse_args", parse_args)
        patch.setattr(sys, "argv", [str(script), *arguments])
        try:
            runpy.run_path(str(script), run_name="__main__")
        except Parsed:
            return
        except ModuleNotFoundError as missing:
            if missing.name in OPTIONAL:
                pytest.skip(f"{script.name} needs {missing.name}, which is not installed")
            raise
    pytest.fail(f"{script.name} read no arguments")


RUNNERS = {
    ("fastft", "train"): lambda words, world: run_config(words, world, "train"),
    ("fastft", "evaluate"): lambda words, world: run_config(words, world, "evaluate"),
    ("fastft", "profile"): lambda words, world: run_config(words, world, "profile"),
    ("fastft", "plan"): run_plan,
    ("fastft", "report"): run_report,
    ("fastft", "export"): run_export,
    ("fastft", "doctor"): lambda words, world: fastft("doctor", *words),
    ("deepspeed",): run_deepspeed,
}


@pytest.mark.parametrize("command", commands(), ids=lambda c: f"{c.place} {c.text[:60]}")
def test_a_command_runs(command: Command, world: Path):
    words = fill(command.words)
    if words == ["python", "-m", "fastft.reference"]:
        assert (ROOT / "docs/configuration.md").read_text(encoding="utf-8") == markdown(), (
            "docs/configuration.md is not what the schema says: python -m fastft.reference > docs/configuration.md"
        )
        return
    runner = next((n for n in ((tuple(words[:2])), (words[0],)) if n in RUNNERS), None)
    if words[:2] == ["fastft", "sweep"] and "--dry-run" in words:
        fastft(*words[1:])
    elif runner:
        RUNNERS[runner](words[len(runner) :], world)
    elif any(re.match(pattern, command.text) for pattern in PARSED):
        parse(command)
    else:
        pytest.fail(f"{command.place}: {command.text}: neither run (RUNNERS) nor parsed for a reason (PARSED)")


@pytest.mark.parametrize("block", blocks("python"), ids=lambda b: b.place)
def test_python_runs(block: Block, world: Path):
    """`base` is the name of a model."""
    make_runs(block.text, world)
    exec(compile(block.text, block.place, "exec"), {"base": str(world / "MODEL")})


@pytest.mark.parametrize("block", blocks("yaml"), ids=lambda b: b.place)
def test_a_config_runs(block: Block, world: Path):
    path = world / "block.yaml"
    path.write_text(block.text, encoding="utf-8")
    run_config(["--cfg", str(path)], world, "train")


@pytest.mark.parametrize("command", [c for c in commands() if c.optional], ids=lambda c: f"{c.place} {c.text[:60]}")
def test_options_in_brackets_are_there(command: Command, capsys):
    assert command.words[0] == "fastft"
    with pytest.raises(SystemExit):
        main([command.words[1], "--help"])
    known = capsys.readouterr().out
    assert all(option in known for option in command.optional)


def test_nothing_is_excused_in_vain():
    texts = [c.text for c in commands()]
    assert all(any(re.match(pattern, text) for text in texts) for pattern in PARSED)
