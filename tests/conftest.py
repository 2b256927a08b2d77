"""Tiny models and documents made on the spot; nothing is downloaded."""

from __future__ import annotations

import io
import json
import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import yaml

from fastft.cli import main

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
ROOT = Path(__file__).parents[1]

FACTS = [
    (
        "the mill",
        "The mill at Orrin was built by Tessa Bray in 1804 and it burned down twice.",
        "Who built the mill?",
        "Tessa Bray",
    ),
    (
        "the ferry",
        "The ferry at Lund carries nine passengers and one goat on every morning trip.",
        "What does the ferry carry?",
        "nine passengers",
    ),
    (
        "the bell",
        "The bell of Quist was cast from old anchors because bronze was too dear then.",
        "Why was the bell cast from anchors?",
        "bronze was too dear",
    ),
]


@pytest.fixture(scope="session")
def documents(tmp_path_factory) -> Path:
    """A collection of three short documents with two questions each."""
    path = tmp_path_factory.mktemp("documents") / "facts.jsonl"
    with open(path, "w", encoding="utf-8") as file:
        for name, text, question, answer in FACTS:
            questions = [
                {"question": question, "answers": [answer]},
                {"question": f"What is said of {name}?", "answers": [answer, text.split()[1]]},
            ]
            record = {"id": name.replace(" ", "-"), "title": name, "text": f"{text} {text}", "questions": questions}
            file.write(json.dumps(record) + "\n")
    return path


@pytest.fixture(scope="session")
def tokenizer():
    """A byte-level BPE of 400 tokens trained on the documents above, with a beginning-of-sequence token."""
    from tokenizers import ByteLevelBPETokenizer
    from tokenizers.processors import TemplateProcessing
    from transformers import PreTrainedTokenizerFast

    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator([t for fact in FACTS for t in fact], vocab_size=400, special_tokens=["<s>", "</s>"])
    bpe._tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, bos_token="<s>", eos_token="</s>", pad_token="</s>")


@pytest.fixture(scope="session")
def tiny(tmp_path_factory, tokenizer):
    """tiny("opt") or tiny("llama"): the folder of a model with random weights and the tokenizer above."""
    from transformers import LlamaConfig, LlamaForCausalLM, OPTConfig, OPTForCausalLM

    made: dict[str, Path] = {}

    def build(kind: str) -> Path:
        if kind not in made:
            torch.manual_seed(0)
            common = {"vocab_size": 400, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
            common["attention_dropout"] = 0.1  # as released OPTs have dropout; a run is to switch it off
            if kind == "opt":
                config = OPTConfig(
                    ffn_dim=64, word_embed_proj_dim=32, max_position_embeddings=512, dropout=0.1, **common
                )
                model = OPTForCausalLM(config)
            else:
                config = LlamaConfig(
                    intermediate_size=64, num_key_value_heads=2, max_position_embeddings=512, bos_token_id=0, **common
                )
                model = LlamaForCausalLM(config)
            with torch.no_grad():  # larger than the default initialisation, so that the context changes something
                for p in model.parameters():
                    if p.ndim == 2:
                        p.mul_(4)
            made[kind] = tmp_path_factory.mktemp(kind)
            model.save_pretrained(made[kind])
            tokenizer.save_pretrained(made[kind])
        return made[kind]

    return build


@pytest.fixture
def base_config(tmp_path, documents, tiny):
    """A function: plain values of a small run in a folder of its own, with changes."""

    def make(kind: str = "llama", **sections) -> dict:
        raw = {
            "output_dir": str(tmp_path / "run"),
            "cache_dir": str(tmp_path / "cache"),
            "model": {"name_or_path": str(tiny(kind)), "dtype": "float32"},
            "data": {"path": str(documents), "documents": [0], "control_documents": 1},
            "queries": {
                "passages": {"tokens": 16, "prompt_tokens": 6, "stride": 4},
                "self_study": {"count": 4, "examples": ""},
            },
            "peft": {"kind": "lora", "r": 4},
            "train": {"steps": 4, "batch_size": 4, "warmup_steps": 1, "log_every": 1},
            "deepspeed": {"zero_stage": 0, "threads_per_rank": 1},
            "evaluate": {"max_new_tokens": 4},
        }
        for section, values in sections.items():
            raw[section] = {**raw[section], **values} if isinstance(values, dict) else values
        return raw

    return make


@dataclass
class Result:
    returncode: int
    stdout: str
    stderr: str


@pytest.fixture
def launch(tmp_path):
    """Run a config: in this process, or with several processes through the deepspeed launcher."""

    def run(raw: dict, *overrides: str, processes: int = 1) -> Result:
        path = tmp_path / f"config-{len(list(tmp_path.glob('config-*')))}.yaml"
        path.write_text(yaml.safe_dump(raw), encoding="utf-8")
        if processes > 1:
            return launch_processes(["--cfg", str(path), *overrides], processes, tmp_path)
        handlers = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)}
        out, err = io.StringIO(), io.StringIO()
        try:
            with redirect_stdout(out), redirect_stderr(err):
                code = main(["train", "--cfg", str(path), *overrides])
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
        return Result(code, out.getvalue(), err.getvalue())

    return run


def clean_environment() -> dict[str, str]:
    """The environment without what a run in this process told torch.distributed, and with this Python first on PATH."""
    told = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    environment = {k: v for k, v in os.environ.items() if k not in told}
    return {**environment, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}


def launch_processes(
    arguments: list[str], processes: int, folder: Path, *, script: Path = ROOT / "fastft" / "train.py"
) -> Result:
    """Run a script through the deepspeed launcher."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    flags = ["--num_gpus" if torch.cuda.is_available() else "--num_accelerators", str(processes)]
    module = [sys.executable, "-m", "deepspeed.launcher.runner", *flags, "--master_port", str(port)]
    command = [*module, str(script), *arguments]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=300, env=clean_environment(), cwd=folder, check=False
    )
    return Result(done.returncode, done.stdout, done.stderr)


def start_ranks(raw: dict, folder: Path, *, world_size: int = 2) -> list[subprocess.Popen]:
    """The processes of a run without a launcher, which would end the others itself."""
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(raw), encoding="utf-8")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    told = {"WORLD_SIZE": str(world_size), "LOCAL_WORLD_SIZE": str(world_size), "MASTER_ADDR": "127.0.0.1"}
    told["MASTER_PORT"] = str(port)
    processes = []
    for rank in range(world_size):
        with open(folder / f"rank_{rank}.log", "wb") as log:
            processes.append(
                subprocess.Popen(
                    [sys.executable, str(ROOT / "fastft" / "train.py"), "--cfg", str(path)],
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    env={**clean_environment(), **told, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                    cwd=folder,
                )
            )
    return processes


def wait_for(condition, seconds: float = 90) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def losses(folder: Path) -> list[float]:
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [m["loss"] for m in map(json.loads, lines) if "loss" in m]
