"""Kills a run at random moments (SIGKILL), starts it again until it is done, and compares it with one left alone.

python benchmarks/kill_proof.py --phase train teach checkpoint --times 20 --json kills.json

The run is a distillation of the documents that fastft ships into a small random Llama, made here; `--phase` says when
it is killed, `--times` how often in each phase. After each kill every file in output_dir and cache_dir must be whole.
At the end losses, rates and gradient norms of every step, all final figures and the adapter must equal, bit for bit,
those of a run that nobody killed. A kill in the checkpoint phase counts when it left an unfinished checkpoint behind.
Exit code 0 if all of it holds.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import yaml
from rich.console import Console
from rich.table import Table
from safetensors import safe_open
from safetensors.torch import load_file
from tokenizers import ByteLevelBPETokenizer
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from fastft.config import DataConfig
from fastft.engine.checkpoints import Checkpoint, list_checkpoints
from fastft.tasks import load_documents

ROOT = Path(__file__).resolve().parent.parent
PHASES = ("train", "teach", "checkpoint")
# A kill comes after up to so many steps, blocks of targets or checkpoints of the process, and so many seconds more.
WORK = {"train": 15, "teach": 60, "checkpoint": 4}
DELAY_S = {"train": 0.1, "teach": 0.03, "checkpoint": 0.006}
TIMEOUT_S = 900.0
# What may differ between two runs of the same config: time, memory and how often it was resumed.
OWN_FIGURES = ("seconds", "peak_memory_bytes", "resumed_from", "step_time_s", "plan")


def write_model(folder: Path) -> None:
    """A Llama of a few hundred thousand random parameters with a tokenizer of the shipped documents."""
    bpe = ByteLevelBPETokenizer()
    texts = [d.text for d in load_documents(DataConfig())]
    bpe.train_from_iterator(texts, vocab_size=1000, special_tokens=["<s>"])
    PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, bos_token="<s>").save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=1000, hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=2048, bos_token_id=0, initializer_range=0.1,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)


def config_of(phases: list[str], times: int, model: Path, folder: Path) -> dict[str, Any]:
    """A run whose phases last long enough to be killed in."""
    teaches, many = "teach" in phases, times > 4
    return {
        "output_dir": str(folder / "run"),
        "cache_dir": str(folder / "cache"),
        "model": {"name_or_path": str(model), "dtype": "float32"},
        "data": {"documents": None if teaches and many else [0], "control_documents": 0},
        "queries": {
            "passages": {"tokens": 48, "prompt_tokens": 16, "stride": 1 if teaches else 16},
            "self_study": {"count": 4, "examples": "", "max_question_tokens": 8, "max_answer_tokens": 8},
        },
        "peft": {"kind": "lora", "r": 256 if "checkpoint" in phases else 8},
        "train": {
            "steps": 30 + 20 * times * ("train" in phases) + 8 * times * ("checkpoint" in phases),
            "batch_size": 4,
            "lr": 1.0e-3,
            "eval_every": 10 if many else 20,
            "save_every": 1 if "checkpoint" in phases else 5,
            "keep_checkpoints": 2,
            "keep_best": True,
        },
        "deepspeed": {"zero_stage": 3, "threads_per_rank": 1},
        "evaluate": {"answers": False, "batch_size": 4},
        "resume": "auto",
    }


def start(raw: dict[str, Any], folder: Path) -> subprocess.Popen:
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(raw), encoding="utf-8")
    with open(folder / "log", "ab") as log:
        command = [sys.executable, str(ROOT / "fastft/train.py"), "--cfg", str(path)]
        return subprocess.Popen(command, stdout=log, stderr=log, cwd=folder)


def work_done(phase: str, folder: Path) -> Callable[[], int]:
    """Counts what the process that starts now has done in the phase: steps, blocks of targets, begun checkpoints."""
    output, since, seen = folder / "run", time.time_ns(), []

    def count() -> int:
        if phase == "train":  # it rewrites this file just before its first step, with the steps that it goes on from
            path = output / "metrics.jsonl"
            lines = path.read_bytes().count(b"\n") if _modified(path) > since else 0
            if lines and not seen:
                seen.append(lines)
            return lines - seen[0] if seen else 0
        if phase == "teach":  # each process writes a shard of its own
            journals = (folder / "cache").glob("teacher/*/shard-*.jsonl")
            return sum(p.read_bytes().count(b"\n") for p in journals if _modified(p) > since)
        partial = {p.name for p in (output / "checkpoints").glob(".step_*.partial") if _modified(p) > since}
        seen.extend(sorted(partial - set(seen)))
        return len(seen) if partial else 0

    return count


def _modified(path: Path) -> int:
    try:
        return path.stat().st_mtime_ns
    except FileNotFoundError:
        return 0


def whole_files(folder: Path) -> Iterator[str]:
    """What is wrong with the files below `folder`; those with a name that says they are partial are nobody's."""
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        if any(".partial" in part for part in path.relative_to(folder).parts):
            continue
        try:
            if path.suffix == ".json":
                json.loads(path.read_text(encoding="utf-8"))
            elif path.suffix == ".jsonl":
                for line in path.read_text(encoding="utf-8").splitlines():
                    json.loads(line)
            elif path.suffix == ".yaml":
                yaml.safe_load(path.read_text(encoding="utf-8"))
            elif path.suffix == ".safetensors":
                with safe_open(path, "pt") as file:
                    for key in file.offset_keys():
                        file.get_tensor(key)
            elif path.suffix in (".html", ".svg") and not path.read_text(encoding="utf-8").rstrip().endswith(">"):
                yield f"{path}: cut off"
        except Exception as error:  # whatever a reader says of a file that is not whole
            yield f"{path}: {type(error).__name__}: {error}"
    for path in list_checkpoints(folder / "run" / "checkpoints"):
        try:
            Checkpoint.verified(path)
        except Exception as error:
            yield str(error)


def kill_once(raw: dict[str, Any], folder: Path, phase: str, draw: random.Random) -> dict[str, Any] | None:
    """Start the run and kill it in a phase, at a drawn moment; None where it came to its end before."""
    before = (folder / "log").stat().st_size if (folder / "log").is_file() else 0
    count, work, delay = work_done(phase, folder), draw.randint(1, WORK[phase]), draw.uniform(0, DELAY_S[phase])
    process = start(raw, folder)
    deadline = time.monotonic() + TIMEOUT_S
    while count() < work:
        if process.poll() is not None:
            if process.returncode:
                raise SystemExit(f"the run failed by itself: see {folder / 'log'}")
            return None
        if time.monotonic() > deadline:
            process.kill()
            raise SystemExit(f"no {phase} phase within {TIMEOUT_S:.0f} s: see {folder / 'log'}")
        time.sleep(0.0003)
    time.sleep(delay)
    process.kill()
    process.wait()
    output = folder / "run"
    said = (folder / "log").read_bytes()[before:].decode()
    complete = [int(p.name.removeprefix("step_")) for p in list_checkpoints(output / "checkpoints")]
    partial = [int(p.name.split("_")[1].split(".")[0]) for p in (output / "checkpoints").glob(".step_*.partial")]
    unfinished = [step for step in partial if step > max(complete, default=0)]  # others are old ones, half deleted
    metrics = output / "metrics.jsonl"
    inside = {
        "teach": ", written to " not in said and ", found in " not in said,
        "train": "adapter    " not in said,
        "checkpoint": bool(unfinished),
    }
    return {
        "phase": phase,
        "work": work,
        "delay_s": round(delay, 4),
        "steps_done": len(losses(metrics)) if metrics.is_file() else 0,
        "checkpoints": complete,
        "unfinished_checkpoint": unfinished[0] if unfinished else None,
        "inside": inside[phase],
        "problems": list(whole_files(folder)),
    }


def losses(path: Path) -> list[dict[str, Any]]:
    """What each step and each evaluation gave, without the times."""
    timed = ("tokens_per_s", "peak_memory_bytes", "time_s")
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [{key: value for key, value in line.items() if key not in timed} for line in lines]


def differences(found: Path, expected: Path) -> Iterator[str]:
    """Where the results of two runs differ at all."""
    if (a := losses(found / "metrics.jsonl")) != (b := losses(expected / "metrics.jsonl")):
        first = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
        yield f"metrics.jsonl: line {first + 1} of {len(a)} and {len(b)}"
    a, b = (json.loads((folder / "summary.json").read_text(encoding="utf-8")) for folder in (found, expected))
    for key in sorted(a.keys() | b.keys()):
        if key not in OWN_FIGURES and a.get(key) != b.get(key):
            yield f"summary.json: {key}: {a.get(key)} and {b.get(key)}"
    a, b = (load_file(folder / "adapter/adapter_model.safetensors") for folder in (found, expected))
    for name in sorted(a.keys() | b.keys()):
        if name not in a or name not in b or not torch.equal(a[name], b[name]):
            yield f"adapter: {name}"


def prove(phases: list[str], times: int, seed: int, model: Path, folder: Path, say: Callable) -> dict[str, Any]:
    """Kill one run `times` times in each of the phases, and compare it with one that was left alone."""
    draw, kills, missed = random.Random(seed), [], 0
    alone, killed = folder / "alone", folder / "killed"
    for place in (alone, killed):
        place.mkdir(parents=True)
    undisturbed = start(config_of(phases, times, model, alone), alone)
    begin = time.monotonic()
    raw = config_of(phases, times, model, killed)
    for phase in sorted(phases, key=("teach", "train", "checkpoint").index):
        hit = 0
        while hit < times:
            kill = kill_once(raw, killed, phase, draw)
            if kill is None:
                raise SystemExit(f"{phase}: the run was done after {hit} kills of {times}; it needs more steps")
            if kill["problems"]:
                raise SystemExit("\n".join(["files that are not whole:", *kill["problems"]]))
            kills.append(kill)
            hit, missed = hit + kill["inside"], missed + (not kill["inside"])
            say(f"{phase} {hit}/{times}  steps {kill['steps_done']}  checkpoints {kill['checkpoints']}")
    if start(raw, killed).wait(TIMEOUT_S) != 0 or undisturbed.wait(TIMEOUT_S) != 0:
        raise SystemExit(f"a run failed: see {killed / 'log'} and {alone / 'log'}")
    problems = [*whole_files(killed), *differences(killed / "run", alone / "run")]
    left = [str(p) for p in killed.rglob("*") if ".partial" in p.name]
    summary = json.loads((killed / "run/summary.json").read_text(encoding="utf-8"))
    said = (killed / "log").read_text(encoding="utf-8")
    return {
        "phases": phases,
        "kills": kills,
        "missed": missed,
        "starts": len(kills) + 1,
        "resumes": said.count("resume     from step") + said.count("teach      goes on: "),
        "steps": summary["steps"],
        "loss": summary["loss"],
        "nll_student": summary["nll_student"],
        "seconds": round(time.monotonic() - begin),
        "differences": problems + [f"left behind: {path}" for path in left],
    }


def main() -> int:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--phase", nargs="+", choices=PHASES, default=list(PHASES), help="when to kill")
    p.add_argument("--times", type=int, default=20, help="kills in each phase")
    p.add_argument("--seed", type=int, default=0, help="of the moments")
    p.add_argument("--together", action="store_true", help="all phases in one run, not a run for each")
    p.add_argument("--json", type=Path, metavar="FILE", help="write every kill and figure there")
    p.add_argument("--folder", type=Path, help="a folder that does not exist, kept; default: a temporary one")
    a = p.parse_args()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    console = Console(highlight=False)
    with tempfile.TemporaryDirectory() as temporary:
        folder = a.folder or Path(temporary) / "proof"
        folder.mkdir(parents=True)
        write_model(folder / "model")
        rows = [
            prove(phases, a.times, a.seed, folder / "model", folder / "-".join(phases), console.print)
            for phases in ([a.phase] if a.together else [[phase] for phase in a.phase])
        ]
    versions = {name: version(name) for name in ("torch", "transformers", "deepspeed", "safetensors")}
    table = Table(title=f"SIGKILL at random moments, {date.today()}, seed {a.seed}")
    for column in ("phase", "kills", "resumes", "steps", "last loss", "NLL", "half-written", "different", "s"):
        table.add_column(column, justify="left" if column == "phase" else "right", no_wrap=True)
    for row in rows:
        inside = sum(kill["inside"] for kill in row["kills"])
        table.add_row(
            "+".join(row["phases"]), str(inside), str(row["resumes"]), str(row["steps"]), f"{row['loss']:.6f}",
            f"{row['nll_student']:.6f}", "0", str(len(row["differences"])), str(row["seconds"]),
        )  # fmt: skip
    console.print(table)
    for row in rows:
        for line in row["differences"]:
            console.print(f"{'+'.join(row['phases'])}: {line}")
    if a.json:
        a.json.write_text(json.dumps({"versions": versions, "date": str(date.today()), "rows": rows}, indent=1) + "\n")
    return int(any(row["differences"] for row in rows))


if __name__ == "__main__":
    sys.exit(main())
