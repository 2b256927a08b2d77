"""What the planner counts against what runs take: peak memory of the first process, seconds of an optimizer step.

python benchmarks/plan_check.py --threads 1 --json docs/benchmarks/plan-cpu.json [--only lora]

Every case is a whole run (`fastft train`, for two processes through the `deepspeed` launcher) of a random-weight OPT of
a published size on a text of a thousand tokens, and its plan is made before the run starts, as `fastft plan --gpu
cpu` does. Memory is the process's peak resident size, as the kernel reports it. Seconds are the roofline's: a measured
step can only take longer, and takes much longer while the machine is shared.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parent))
import random_model

import fastft
from fastft.config import Config, DataConfig, set_value, validate
from fastft.plan import planner
from fastft.tasks import load_documents

GIB = 2**30
SMALL = 1024  # tokens of a micro-batch, up to which hidden states come from glibc's heap, which grows for some steps


@dataclass(frozen=True)
class Case:
    """A run: model size, trained parameters, processes, and other values of its config."""

    size: str
    peft: str
    values: dict[str, Any]
    processes: int = 1

    @property
    def micro_batch(self) -> int:
        """Tokens of it, on one process."""
        whole = self.values["queries.passages.tokens"] * self.values["train.batch_size"]
        return whole // self.values.get("train.micro_batches", 1)

    @property
    def name(self) -> str:
        values = ", ".join(f"{key.rpartition('.')[2]}={value}" for key, value in self.values.items())
        return (
            f"{self.size} {self.peft}" + (f" x{self.processes}" if self.processes > 1 else "") + f" {values}".rstrip()
        )


def tokens(length: int, batch: int) -> dict[str, Any]:
    return {"queries.passages.tokens": length, "train.batch_size": batch}


CASES = [
    Case("opt-125m", "lora", tokens(64, 4)),
    Case("opt-125m", "lora", tokens(128, 8)),
    Case("opt-125m", "lora", tokens(256, 16)),
    Case("opt-125m", "lora", tokens(256, 16) | {"train.micro_batches": 4}),
    Case("opt-125m", "lora", tokens(256, 16) | {"train.activation_checkpointing": "full"}),
    Case("opt-125m", "lora", tokens(128, 8) | {"model.dtype": "float32"}),
    Case("opt-125m", "bitfit", tokens(128, 8)),
    Case("opt-125m", "bitfit", tokens(256, 16)),
    Case("opt-125m", "bitfit", tokens(256, 16) | {"train.activation_checkpointing": "attention"}),
    Case("opt-125m", "full", tokens(64, 4)),
    Case("opt-125m", "full", tokens(64, 4) | {"deepspeed.zero_stage": 2}),
    Case("opt-125m", "lora", tokens(64, 4) | {"evaluate.answers": True, "evaluate.batch_size": 64}),
    Case("opt-125m", "lora", tokens(64, 4) | {"deepspeed.zero_stage": 3}, processes=2),
    Case("opt-125m", "full", tokens(64, 4) | {"deepspeed.zero_stage": 3}, processes=2),
    Case("opt-1.3b", "bitfit", tokens(64, 4) | {"model.quantization": "nf4"}),
    Case("opt-1.3b", "lora", tokens(64, 4) | {"model.quantization": "int8"}),
    Case("opt-1.3b", "lora", tokens(64, 4)),
    Case("opt-1.3b", "lora", tokens(128, 8) | {"train.activation_checkpointing": 12}),
    Case("opt-1.3b", "lora", tokens(64, 4) | {"deepspeed.zero_stage": 3}, processes=2),
]


def write_documents(path: Path, characters: int = 2500) -> None:
    """Two documents with two questions each."""
    source = load_documents(DataConfig())
    text = " ".join(d.text for d in source)
    with open(path, "w", encoding="utf-8") as file:
        for i, document in enumerate(source[:2]):
            questions = [{"question": q.text, "answers": list(q.answers)} for q in document.questions[:2]]
            record = {"id": f"d{i}", "title": document.title, "text": text[:characters], "questions": questions}
            file.write(json.dumps(record) + "\n")


def config_of(case: Case, folder: Path, threads: int | None) -> Config:
    model = folder / case.size
    if not model.is_dir():
        random_model.write(case.size, model)
    raw = {
        "output_dir": str(folder / "run"),
        "overwrite": True,
        "cache_dir": str(folder / "cache"),
        "model": {"name_or_path": str(model), "random_weights": True},
        "data": {
            "path": str(folder / "documents.jsonl"),
            "documents": ["d0"],
            "control_documents": 1,
            "window": {"tokens": 512},
        },
        "queries": {"passages": {"prompt_tokens": 24, "stride": 64}, "self_study": {"count": 0}},
        "peft": {"kind": case.peft},
        "train": {"steps": 12 if case.micro_batch <= SMALL else 2},
        "evaluate": {"answers": False, "batch_size": 8},
        "deepspeed": {"zero_stage": 0, "threads_per_rank": threads},
    }
    for key, value in case.values.items():
        set_value(raw, key, value)
    return validate(raw)


def run(config: Config, case: Case, folder: Path) -> dict[str, Any]:
    """summary.json of the run."""
    path = folder / "config.yaml"
    path.write_text(config.dump(), encoding="utf-8")
    command = [sys.executable, "-m", "fastft", "train", "--cfg", str(path)]
    if case.processes > 1:
        launcher = [str(Path(sys.executable).with_name("deepspeed")), "--num_accelerators", str(case.processes)]
        command = [*launcher, str(Path(fastft.__file__).with_name("train.py")), "--cfg", str(path)]
    environment = {**os.environ, "DS_ACCELERATOR": "cpu"}
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    if result.returncode:
        raise SystemExit(f"{case.name}:\n{result.stdout}\n{result.stderr}")
    return json.loads((folder / "run" / "summary.json").read_text(encoding="utf-8"))


def check(case: Case, folder: Path, threads: int | None, measured: dict[str, Any] | None) -> dict[str, Any]:
    """A row: bytes and seconds, planned and measured; measured: the row of a run that need not be repeated."""
    config = config_of(case, folder, threads)
    prepared, _ = planner(config, "cpu", gpus=case.processes)
    plan = prepared.plan()
    if measured is None:
        summary = run(config, case, folder)
        measured = {"measured_peak_bytes": summary["peak_memory_bytes"], "measured_step_s": summary["step_time_s"]}
    return {
        "case": case.name,
        "phase": plan.largest.name,
        "planned_peak_bytes": plan.total_bytes,
        "measured_peak_bytes": measured["measured_peak_bytes"],
        "ratio": plan.total_bytes / measured["measured_peak_bytes"],
        "roofline_step_s": plan.step_time_s,
        "measured_step_s": measured["measured_step_s"],
        "parts": plan.largest.device,
    }


def show(rows: list[dict[str, Any]]) -> None:
    table = Table(title="planned and measured", title_justify="left")
    for column in ("case", "phase", "planned GiB", "measured GiB", "planned/measured", "roofline s", "step s"):
        table.add_column(column, justify="left" if column in ("case", "phase") else "right")
    for r in rows:
        table.add_row(
            r["case"],
            r["phase"],
            f"{r['planned_peak_bytes'] / GIB:.3f}",
            f"{r['measured_peak_bytes'] / GIB:.3f}",
            f"{r['ratio']:.3f}",
            f"{r['roofline_step_s']:.2f}",
            f"{r['measured_step_s']:.2f}",
        )
    Console(width=150).print(table)


def main() -> int:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--json", type=Path, metavar="FILE", help="write the rows there")
    p.add_argument("--only", default="", help="only cases whose name contains this")
    p.add_argument("--threads", type=int, help="threads of each process (default: as a run has)")
    p.add_argument("--measured", type=Path, metavar="FILE", help="plan anew beside what these rows measured; no run")
    a = p.parse_args()
    earlier = {r["case"]: r for r in json.loads(a.measured.read_text(encoding="utf-8"))} if a.measured else {}
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        write_documents(Path(folder) / "documents.jsonl")
        for case in CASES:
            if a.only in case.name:
                rows.append(check(case, Path(folder), a.threads, earlier[case.name] if a.measured else None))
                print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
    show(rows)
    if a.json:
        a.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
