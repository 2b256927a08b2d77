"""All benchmarks that make sense on this device, and what moved since the kept result.

make bench                                      # this file, in an environment of its own
make bench QUICK=1                              # under five minutes on two cores: every kernel, without torch.compile
make bench KEEP=1                               # the result becomes the kept one
python benchmarks/run_all.py [--quick] [--keep] [--only kl lora] [--json FILE] [--list]

Every part is one run of a script. The result is a file of parts, {"parts": {name: {command, date, seconds, machine,
versions, busy_elsewhere, rows}}}; rows are those of benchmarks/common.py, busy_elsewhere is the share of the cores that
other processes took meanwhile. `--keep` replaces the parts that ran in docs/benchmarks/kept-cuda.json or
kept-cpu-CAPABILITY.json, which `compare.py` reads as well. A part that fails keeps nothing, and the exit code is 1.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import shlex
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import psutil
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))
import common
import compare
import gpu_suite

from fastft import ops

ROOT = Path(__file__).resolve().parent.parent
LOSSES = ("log_softmax_kl", "linear_topk_kl", "linear_cross_entropy")  # of names that contain one of these
PACKAGES = ("torch", "transformers", "deepspeed", "peft", "bitsandbytes", "liger-kernel", "flash-attn")


@dataclass(frozen=True)
class Part:
    """A run of a script; `quick`: whether the short form has it, without the peers that torch.compile makes."""

    script: str
    options: tuple[str, ...] = ()
    quick: bool = False
    compiles: bool = False
    needs: str | None = None  # why it cannot run here


def parts_of(device: str) -> dict[str, Part]:
    """name -> part; sweeps over sizes first, which benchmarks/plots.py draws; a script not named runs as it is."""
    if device == "cuda":
        whole = ("bench_distill_step", "bench_context_length", "bench_icl", "bench_large")
        return {
            name: Part(script, tuple(options), quick=script not in whole, compiles="--no-compile" not in options)
            for script, parts in gpu_suite.BENCHES.items()
            for name, options in parts.items()
        }
    rte = (Path(os.environ.get("FASTFT_DATA", "")) / "rte").is_dir()
    rows, tokens = ("32", "128", "512"), ("64", "256", "1024", "4096")
    parts = {
        "kl": Part(
            "bench_kl",
            ("--rows", *rows, "--only", *(f"{op} forward+backward" for op in LOSSES)),
            quick=True,
            compiles=True,
        ),
        "lora": Part(
            "bench_lora_linear",
            ("--rows", "64", "256", "1024", "--only", "lora_linear forward+backward", "lora_linears", "nf4"),
            quick=True,
            compiles=True,
        ),
        "adamw": Part("bench_bias_adamw", ("--dtype", "float32", "--layers", "3", "12", "48"), quick=True),
        "attention_pack": Part("bench_attention", ("--longest", "32", "128", "512", "--only", "a pack"), quick=True),
        "attention_prefix": Part("bench_attention", ("--context", *tokens, "--only", "a prefix"), quick=True),
        "quantise": Part("bench_quantise", ("--rows", "256", "1024", "4096"), quick=True),
        "elementwise": Part(
            "bench_elementwise",
            ("--tokens", *tokens, "--only", "rotary forward", "swiglu forward"),
            quick=True,
            compiles=True,
        ),
        "norms": Part(
            "bench_norms", ("--hidden", "2048", "--tokens", *tokens, "--only", "rms_norm"), quick=True, compiles=True
        ),
        "relu": Part("bench_relu", ("--tokens", *tokens[:3], "--only", "relu forward"), quick=True),
        "kl_more": Part("bench_kl", ("--only", "reverse", "jsd", "no_tail"), compiles=True),
        "lora_bias": Part("bench_lora_linear", ("--only", "trained bias")),
        "norms_step": Part("bench_norms", ("--only", "a step")),
        "distill_step": Part("bench_distill_step"),
        "context_length": Part("bench_context_length"),
        "icl": Part("bench_icl", needs=None if rte else "FASTFT_DATA has no rte"),
        "large": Part("bench_large", needs="OPT-30B takes 18 GiB and hours on a CPU; see benchmarks/bench_large.py"),
    }
    scripts = {path.stem for path in (ROOT / "benchmarks").glob("bench_*.py")}
    others = sorted(scripts - {part.script for part in parts.values()})
    return parts | {script.removeprefix("bench_"): Part(script) for script in others}


def machine() -> dict[str, object]:
    """What the figures are of."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "cpu": common.device_name("cpu").partition(",")[0],
        "cpu_capability": ops.cpu_capability(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_bytes": psutil.virtual_memory().total,
        "gpu": gpu,
        "gpu_memory_bytes": torch.cuda.get_device_properties(0).total_memory if gpu else None,
    }


def versions() -> dict[str, str | None]:
    """Python's, the packages' and this commit's; a commit with changes beside it ends in -dirty."""

    def version(package: str) -> str | None:
        try:
            return importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            return None

    git = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--exclude", "*"]
    described = subprocess.run(git, capture_output=True, text=True, check=False)
    return {
        "python": platform.python_version(),
        **{package: version(package) for package in PACKAGES},
        "commit": described.stdout.strip() or None,
    }


def run(part: Part, device: str, quick: bool) -> dict[str, object] | None:
    """The part's entry in the result; None where the script failed."""
    options = [*part.options, *(["--no-compile"] if quick and part.compiles else [])]
    command = ["python", f"benchmarks/{part.script}.py", "--device", device, *options]
    print(f"\n== {shlex.join(command)}", flush=True)
    begin, own, busy = time.monotonic(), own_seconds(), busy_seconds()
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "rows.json"
        done = subprocess.run([sys.executable, *command[1:], "--json", str(out)], cwd=ROOT, check=False)
        if done.returncode != 0 or not out.exists():
            return None
        found = json.loads(out.read_text())
    seconds = time.monotonic() - begin
    others = busy_seconds() - busy - (own_seconds() - own)
    return {
        "command": shlex.join(command),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "seconds": round(seconds, 3),
        "machine": machine(),
        "versions": versions(),
        "busy_elsewhere": round(min(1.0, max(0.0, others / seconds / psutil.cpu_count())), 3),
        "rows": found["rows"] if isinstance(found, dict) else found,
    }


def busy_seconds() -> float:
    """Seconds of all cores since the machine began in which they worked for anybody, or were taken from it."""
    times = psutil.cpu_times()
    return sum(getattr(times, name, 0.0) for name in ("user", "nice", "system", "irq", "softirq", "steal"))


def own_seconds() -> float:
    """Seconds of all cores that this process took, and those that it waited for."""
    return sum(os.times()[:4])


def add(path: Path, entries: dict[str, dict]) -> None:
    """Put parts into a result file, in place of those of the same name."""
    parts = json.loads(path.read_text())["parts"] if path.exists() else {}
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps({"parts": parts | entries}, indent=1) + "\n")
    partial.replace(path)


def main() -> int:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cpu", "cuda"])
    p.add_argument("--quick", action="store_true", help="kernels alone, without torch.compile")
    p.add_argument("--keep", action="store_true", help="the result becomes the kept one")
    p.add_argument("--only", nargs="+", metavar="PART", help="only these parts")
    p.add_argument("--json", type=Path, metavar="FILE", default=Path("runs/bench.json"), help="the result")
    p.add_argument("--list", action="store_true", help="list the parts; run nothing")
    args = p.parse_args()
    parts = parts_of(args.device)
    if unknown := set(args.only or ()) - set(parts):
        p.error(f"--only {' '.join(sorted(unknown))}: expected parts among {', '.join(parts)}")
    chosen = {n: q for n, q in parts.items() if (n in args.only if args.only else q.quick or not args.quick)}
    for name, part in chosen.items():
        if args.list or part.needs:
            print(f"{name:<24}{'left out: ' + part.needs if part.needs else shlex.join([part.script, *part.options])}")
    if args.list:
        return 0
    args.json.unlink(missing_ok=True)
    kept, failed = compare.kept(args.device), []
    for name, part in chosen.items():
        if part.needs:
            continue
        if (entry := run(part, args.device, args.quick)) is None:
            failed.append(name)
        else:  # after every part: what is done stays if a later one is cut off
            add(args.json, {name: entry})
    if args.json.exists():
        compare.report(args.json, kept)
        if args.keep:
            add(kept, json.loads(args.json.read_text())["parts"])
            print(f"kept in {kept}")
    if failed:
        print(f"failed: {' '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
