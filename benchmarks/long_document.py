"""A document that is longer than the model's window, distilled through windows, against cutting it to the window.

python benchmarks/long_document.py --json long.json [key.sub=value ...]

The document is NarrativeQA summaries end to end, as many as it takes to `--tokens`; its questions are those of all of
them. The model is SmolLM2-135M with its window set to `--window` positions. Scored are, without training, the questions
alone, behind the document cut to its first window, and behind the window that suits each question best (an upper bound
on what retrieving one window could give); and the trained model without any document.
"""

from __future__ import annotations

import argparse
import json
import shlex
import shutil
import subprocess
import sys
import tempfile
from datetime import date
from importlib.metadata import version
from pathlib import Path

import torch

from fastft.config import load_config
from fastft.models import loading
from fastft.tasks import load_documents

sys.path.insert(0, str(Path(__file__).resolve().parent))
import common

ROOT = Path(__file__).resolve().parent.parent


def write_documents(config, tokenizer, tokens: int, controls: int, path: Path) -> int:
    """One long document and `controls` short ones whose questions measure the control; returns its length in tokens."""
    found = load_documents(config.data)
    text, questions, length = [], [], 0
    while length < tokens:
        document = found.pop(0)
        text.append(document.text)
        questions += document.questions
        length = len(tokenizer("\n\n".join(text), add_special_tokens=False).input_ids)
    documents = [("long", "\n\n".join(text), questions), *((d.id, d.text, d.questions) for d in found[:controls])]
    with open(path, "w", encoding="utf-8") as file:
        for name, body, asked in documents:
            pairs = [{"question": q.text, "answers": list(q.answers)} for q in asked]
            file.write(json.dumps({"id": name, "title": name, "text": body, "questions": pairs}) + "\n")
    return length


def narrow(source: str, window: int, target: Path) -> None:
    """The model with `window` positions, its weights linked."""
    target.mkdir()
    for file in Path(source).iterdir():
        if file.name != "config.json":
            (target / file.name).symlink_to(file.resolve())
    config = json.loads((Path(source) / "config.json").read_text())
    (target / "config.json").write_text(json.dumps(config | {"max_position_embeddings": window}))


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--config", default=str(ROOT / "configs/narrativeqa.yaml"))
    p.add_argument("--split", default="validation")
    p.add_argument("--tokens", type=int, default=8000)
    p.add_argument("--window", type=int, default=2048)
    p.add_argument("--json", type=Path)
    p.add_argument("overrides", nargs="*", help="key.sub=value for fastft")
    a = p.parse_args()
    config = load_config(a.config, [f"data.split={a.split}", *a.overrides, "output_dir=unused"])
    model = loading.resolve(config.model.name_or_path, config.cache_path)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        length = write_documents(config, loading.load_tokenizer(model), a.tokens, 3, folder / "documents.jsonl")
        narrow(model, a.window, folder / "model")
        command = [shutil.which("deepspeed"), str(ROOT / "fastft/train.py"), "--cfg", a.config, "data.task=documents"]
        command += [f"data.path={folder / 'documents.jsonl'}", "data.documents=[long]", "data.split=validation"]
        command += [f"model.name_or_path={folder / 'model'}", f"output_dir={folder / 'run'}", *a.overrides]
        subprocess.run(command, cwd=ROOT, check=True)
        summary = json.loads((folder / "run/summary.json").read_text())
        resolved = load_config(str(folder / "run/config.yaml"))
    print(f"{length:,} tokens through windows of {a.window:,} positions")
    for name in ("no_context", "truncated", "student", "teacher"):
        print(f"  {name:<12} {summary[f'nll_{name}']:.3f} nats per gold-answer token")
    print(f"  recovery {summary['recovery']:.2f}, control {summary['control_recovery']:.2f}")
    if a.json:
        packages = {name: version(name) for name in ("torch", "transformers", "deepspeed")}
        found = {"date": date.today().isoformat(), "command": shlex.join(sys.argv), "packages": packages}
        found |= {"device": common.device_name("cuda" if torch.cuda.is_available() else "cpu"), "tokens": length}
        found |= {"window": a.window, "config": resolved.model_dump(mode="json"), "summary": summary}
        # Names within the temporary folder, which is gone.
        a.json.write_text(json.dumps(found, indent=2).replace(f"{folder}/", "") + "\n")


if __name__ == "__main__":
    main()
