"""How much of a document's effect ends up in the adapter, how soon, and against a plain transformers + PEFT loop.

python benchmarks/narrativeqa_recovery.py --documents 0:10 --plain 0:3 --json recovery.json --plot recovery.png

One adapter for each NarrativeQA summary (`--config` says how), scored on all of its questions; `--plain` runs
`plain_distillation.py` on these documents too, alternating with fastft on the same machine. Each side's recovery is
relative to its own prompt: `--plain-options` may give the plain loop another pattern than the config's.

Seconds to a recovery count everything that a new document costs: writing questions, the teacher, and the training steps
until the first evaluation that reaches it. Loading the model and the evaluations themselves are left out on both sides.
fastft starts with an empty cache.
"""

from __future__ import annotations

import argparse
import json
import shlex
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from fastft.config import load_config
from fastft.models import loading
from fastft.tasks import load_documents

sys.path.insert(0, str(Path(__file__).resolve().parent))
import common

ROOT = Path(__file__).resolve().parent.parent


def span(text: str) -> range:
    """ "3" -> 3..3, "0:10" -> 0..9, "" -> nothing."""
    first, colon, last = text.partition(":")
    return range(0) if not text else range(int(first), int(last) if colon else int(first) + 1)


def run_fastft(config: str, index: int, folder: Path, model: str, overrides: list[str]) -> dict[str, Any]:
    output = folder / f"fastft-{index}"
    # A port of its own: two of these scripts may run at once.
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [shutil.which("deepspeed"), "--master_port", str(port), str(ROOT / "fastft/train.py"), "--cfg", config]
    command += [f"data.documents=[{index}]"]
    command += [f"output_dir={output}", f"cache_dir={folder / 'cache'}", f"model.name_or_path={model}"]
    command += ["overwrite=true", "evaluate.answers=false", "train.eval_every=2", *overrides]
    shutil.rmtree(folder / "cache", ignore_errors=True)
    subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    summary = json.loads((output / "summary.json").read_text())
    gain = summary["nll_no_context"] - summary["nll_teacher"]
    seconds = summary["seconds"]["prepare"] + summary["seconds"]["teach"]
    curve = []
    for line in (output / "metrics.jsonl").read_text().splitlines():
        row = json.loads(line)
        seconds += row.get("time_s", 0.0)
        if "evaluated_nll" in row:
            recovery = (summary["nll_no_context"] - row["evaluated_nll"]) / gain
            curve.append({"step": row["step"], "recovery": recovery, "seconds": seconds})
    curve.append({"step": summary["steps"], "recovery": summary["recovery"], "seconds": seconds})
    keys = ("nll_no_context", "nll_student", "nll_teacher", "recovery", "control_recovery", "steps", "seconds")
    return {k: summary[k] for k in keys} | {"curve": curve, "document": index}


def run_plain(index: int, document, folder: Path, model: str, target: float, extra: list[str]) -> dict[str, Any]:
    source, result = folder / f"document-{index}.json", folder / f"plain-{index}.json"
    questions = [{"question": q.text, "answers": list(q.answers)} for q in document.questions]
    source.write_text(json.dumps({"text": document.text, "questions": questions}))
    command = [sys.executable, str(ROOT / "benchmarks/plain_distillation.py"), "--model", model]
    command += ["--document", str(source), "--json", str(result), "--target", str(target), "--eval-every", "2", *extra]
    subprocess.run(command, check=True)
    return json.loads(result.read_text()) | {"document": index}


def seconds_to(run: dict[str, Any], target: float) -> float | None:
    return next((p["seconds"] for p in run["curve"] if p["recovery"] >= target), None)


def spread(values: list[float]) -> str:
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.mean(values):.2f} ± {deviation:.2f} ({min(values):.2f} to {max(values):.2f})"


def show(ours: list[dict], plain: dict[int, dict], target: float) -> None:
    table = Table(title=f"NarrativeQA summaries, seconds to recovery {target:g}")
    for name in ("doc", "none", "trained", "prompt", "recovery", "control", "seconds", "plain", "ratio"):
        table.add_column(name, justify="right", no_wrap=True)
    for run in ours:
        mine = seconds_to(run, target)
        theirs = seconds_to(plain[run["document"]], target) if run["document"] in plain else None
        control = run["control_recovery"]
        cells = [run["nll_no_context"], run["nll_student"], run["nll_teacher"], run["recovery"]]
        table.add_row(
            str(run["document"]),
            *(f"{c:.2f}" for c in cells),
            "-" if control is None else f"{control:.2f}",
            "-" if mine is None else f"{mine:.0f}",
            "" if run["document"] not in plain else "-" if theirs is None else f"{theirs:.0f}",
            f"{theirs / mine:.1f}" if mine and theirs else "",
        )
    console = Console()
    console.print(table)
    console.print(f"recovery {spread([r['recovery'] for r in ours])}, mean ± standard deviation (range)")
    controls = [r["control_recovery"] for r in ours if r["control_recovery"] is not None]
    if controls:
        console.print(f"control  {spread(controls)}")


def plot(ours: list[dict], plain: dict[int, dict], target: float, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4.2), layout="constrained")
    groups = ((ours, "tab:blue", "fastft"), (plain.values(), "tab:orange", "transformers + PEFT loop"))
    for runs, color, label in groups:
        for i, run in enumerate(runs):
            points = [(p["seconds"], p["recovery"]) for p in run["curve"]]
            axes.plot(*zip(*points, strict=True), color=color, alpha=0.75, label=label if i == 0 else None)
    axes.axhline(target, color="gray", linewidth=0.8, linestyle="--")
    axes.set(xlabel="seconds, from the document alone to the adapter", ylabel="recovery")
    axes.set_xlim(left=0)
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False, loc="lower right")
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=160)


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--config", default=str(ROOT / "configs/narrativeqa.yaml"))
    p.add_argument("--split", default="validation")
    p.add_argument("--documents", type=span, default=range(10), metavar="FIRST:LAST", help="last one excluded")
    p.add_argument("--plain", type=span, default=range(0), metavar="FIRST:LAST", help="run the plain loop on these too")
    p.add_argument("--plain-options", default="", help="for plain_distillation.py, for example '--pattern plain'")
    p.add_argument("--target", type=float, default=0.8)
    p.add_argument("--json", type=Path)
    p.add_argument("--plot", type=Path)
    p.add_argument("overrides", nargs="*", help="key.sub=value for fastft")
    a = p.parse_args()
    overrides = [f"data.split={a.split}", *a.overrides]
    config = load_config(a.config, [*overrides, "output_dir=unused"])
    documents = load_documents(config.data)
    model = loading.resolve(config.model.name_or_path, config.cache_path)
    ours, plain = [], {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        for index in a.documents:
            if index in a.plain:
                plain[index] = run_plain(index, documents[index], folder, model, a.target, a.plain_options.split())
            ours.append(run_fastft(a.config, index, folder, model, overrides))
            run = ours[-1]
            print(f"fastft document {index}: recovery {run['recovery']:.2f}", flush=True)
            if a.json:
                device = common.device_name("cuda" if torch.cuda.is_available() else "cpu")
                packages = {name: version(name) for name in ("torch", "transformers", "deepspeed", "peft")}
                found = {"date": date.today().isoformat(), "command": shlex.join(sys.argv)}
                found |= {"device": device, "packages": packages, "config": config.model_dump(mode="json")}
                found |= {"target": a.target, "fastft": ours, "plain": list(plain.values())}
                a.json.write_text(json.dumps(found, indent=2) + "\n")
    show(ours, plain, a.target)
    if a.plot:
        plot(ours, plain, a.target, a.plot)


if __name__ == "__main__":
    main()
