"""Context distillation and in-context evaluation on a model that fills the machine: memory, and seconds by phase.

python benchmarks/bench_large.py --size opt-30b --device cpu --batch 1 --queries 1 --steps 1 --asked 0
python benchmarks/bench_large.py --size opt-30b --device cuda --gpu-memory-gib 24 --plain

A random-weight OPT of a published size as nf4, a context of `--context` tokens, `--queries` queries of 256 tokens
behind it. Every row is a run of its own in a process of its own; weights are made on first use, in --folder.

fastft_lora, fastft_bitfit   `fastft train`: teach phase, then --steps optimizer steps of --batch queries
fastft_icl                   `fastft evaluate`: --asked queries behind demonstrations that fill the context
plain_lora                   transformers + PEFT + bitsandbytes: teacher (adapter disabled) on [context; query] and
                             student on [query] in every step, full logits, gradient checkpointing, torch's AdamW

JSON rows: name, impl, shape, dtype, device, median_ms (of a step; fastft_icl: of a query), peak_memory_bytes (GPU: the
allocator's; CPU: resident), planned_memory_bytes, roofline_fraction (time of the step by the roofline over measured),
tokens_per_s (student's), seconds by phase; or error, where a row does not fit.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))
import common
import random_model

POSITIONS = 2048  # OPT's
QUERY, PROMPT = 256, 24  # tokens of a passage, and those of them that the student is given
TRAINED = ("fastft_lora", "fastft_bitfit")


def text_of(tokenizer, tokens: int) -> str:
    """A text of at most so many tokens, from the documents that fastft ships."""
    from fastft.config import DataConfig
    from fastft.tasks import load_documents

    text = " ".join(d.text for d in load_documents(DataConfig()))
    while len(ids := tokenizer(text).input_ids) < tokens:
        text += " " + text
    cut = tokenizer.decode(ids[:tokens])
    while len(tokenizer(cut).input_ids) > tokens:
        cut = cut[: cut.rindex(" ")]
    return cut


def model_folder(a) -> Path:
    folder = a.folder / a.size
    if not (folder / "config.json").is_file():
        folder.mkdir(parents=True, exist_ok=True)
        random_model.write(a.size, folder)
    return folder


def train_config(a, kind: str) -> dict:
    from transformers import AutoTokenizer

    folder = model_folder(a)
    # One window: less the pattern's line breaks, what the tokenizer puts first, and what a window keeps for the query.
    room = min(a.context, POSITIONS - QUERY - 16) - 8
    text = text_of(AutoTokenizer.from_pretrained(folder), room)
    document = a.folder / "document.jsonl"
    document.write_text(json.dumps({"id": "one", "title": "one", "text": text}))
    # The passages begin where the last of `queries` still has all of its tokens.
    stride = room if a.queries == 1 else max(1, (room - QUERY) // (a.queries - 1))
    return {
        **opening(a, "distill", kind),
        "data": {"path": str(document), "control_documents": 0, "window": {"tokens": a.context}},
        "queries": {
            "passages": {"tokens": QUERY, "prompt_tokens": PROMPT, "stride": stride},
            "self_study": {"count": 0},
        },
        "peft": {"kind": kind, **({"r": 16} if kind == "lora" else {})},
        "train": {
            "steps": a.steps,
            "batch_size": a.batch,
            "micro_batches": a.micro_batches,
            "activation_checkpointing": a.activation_checkpointing,
            "warmup_steps": 0,
        },
        "deepspeed": {"zero_stage": 0},
        "evaluate": {"answers": False, "batch_size": a.batch},
    }


def opening(a, method: str, name: str) -> dict:
    """What the configs of all rows begin with."""
    model = {"name_or_path": str(model_folder(a)), "random_weights": True, "quantization": "nf4", "dtype": a.dtype}
    return {
        "method": method,
        "output_dir": str(a.folder / "runs" / f"{a.size}-{name}"),
        "cache_dir": str(a.folder / "cache"),
        "overwrite": True,
        "model": model,
    }


def icl_config(a) -> dict:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model_folder(a))
    words = text_of(tokenizer, 4000).split()
    shots = 8
    size = (a.context - 64) // shots * len(words) // 4000  # words of an example, so that 8 fill the context
    examples = [
        {"text": " ".join(words[(37 * i) % (len(words) - size) :][:size]), "label": "good" if i % 2 else "bad"}
        for i in range(a.asked + 4 * shots)
    ]
    files = {}
    for name, rows in (("train", examples[: 4 * shots]), ("validation", examples[4 * shots :])):
        path = a.folder / f"icl-{name}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        files[name] = str(path)
    return {
        **opening(a, "icl", "icl"),
        "data": {
            "task": "jsonl",
            "files": files,
            "pattern": "Text: {text}\nVerdict:",
            "verbalizer": {"good": "good", "bad": "bad"},
        },
        "icl": {"num_shots": shots},
        "deepspeed": {"zero_stage": 0},
        "evaluate": {"batch_size": 4 * a.batch},
    }


def fastft_row(a, impl: str) -> dict:
    """Run a config in this process; what its summary says."""
    os.environ.setdefault("DS_ACCELERATOR", a.device)
    from fastft.config import Config
    from fastft.engine.icl import evaluate_in_context
    from fastft.engine.quiet import quiet
    from fastft.engine.run import run

    quiet()
    if impl == "fastft_icl":
        summary = evaluate_in_context(Config.model_validate(icl_config(a)), keep=False)
        return {
            "median_ms": 1e3 * summary["seconds"]["evaluate"] / a.asked,
            "peak_memory_bytes": summary["peak_memory_bytes"],
            "seconds": summary["seconds"],
        }
    shutil.rmtree(a.folder / "cache" / "teacher", ignore_errors=True)  # every row has its own teach phase
    summary = run(Config.model_validate(train_config(a, impl.removeprefix("fastft_"))))
    plan = summary["plan"]
    seconds = summary["step_time_s"]
    return {
        "median_ms": 1e3 * seconds,
        "peak_memory_bytes": summary["peak_memory_bytes"],
        "planned_memory_bytes": plan["planned_peak_bytes"],
        "roofline_fraction": plan["planned_step_s"] / seconds if plan["planned_step_s"] else None,
        "tokens_per_s": a.batch * QUERY / seconds,
        "seconds": summary["seconds"],
    }


def plain_row(a) -> dict:
    """transformers + PEFT + bitsandbytes, the model made layer by layer as well."""
    import bitsandbytes
    import peft
    import torch.nn.functional as F
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(model_folder(a))
    config.use_cache = False
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    for name, module in list(model.named_modules()):
        if isinstance(module, torch.nn.Linear) and ".layers." in name:
            linear = bitsandbytes.nn.Linear4bit(
                module.in_features, module.out_features, compute_dtype=torch.bfloat16, quant_type="nf4", device="meta"
            )
            weight = torch.randn(module.weight.shape, dtype=torch.bfloat16, device="cuda") * config.init_std
            linear.weight = bitsandbytes.nn.Params4bit(weight, requires_grad=False, quant_type="nf4").to("cuda")
            linear.bias = torch.nn.Parameter(torch.zeros(module.out_features, dtype=torch.bfloat16, device="cuda"))
            del weight
            model.set_submodule(name, linear)
    for name, parameter in list(model.named_parameters()):
        if parameter.is_meta:
            place, _, kind = name.rpartition(".")
            own = torch.randn(parameter.shape, dtype=torch.bfloat16, device="cuda") * config.init_std
            if "norm" in name:
                own = torch.ones_like(own) if kind == "weight" else torch.zeros_like(own)
            setattr(model.get_submodule(place), kind, torch.nn.Parameter(own, requires_grad=False))
    model.tie_weights()
    model = peft.prepare_model_for_kbit_training(model, use_gradient_checkpointing=True)
    model = peft.get_peft_model(model, peft.LoraConfig(r=16, lora_alpha=32, target_modules="all-linear"))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    torch.manual_seed(0)
    context = torch.randint(4, config.vocab_size, (1, a.context), device="cuda").expand(a.batch, -1)
    queries = torch.randint(4, config.vocab_size, (a.batch, QUERY), device="cuda")
    times = []
    for _ in range(a.steps):
        torch.cuda.synchronize()
        begin = time.monotonic()
        for query, before in zip(queries.split(a.plain_batch), context.split(a.plain_batch), strict=True):
            with torch.no_grad(), model.disable_adapter():
                teacher = model(torch.cat([before, query], 1)).logits[:, -QUERY:]
            student = model(query).logits
            loss = F.kl_div(
                student.float().log_softmax(-1).flatten(0, 1),
                teacher.float().log_softmax(-1).flatten(0, 1),
                log_target=True,
                reduction="batchmean",
            )
            (loss * len(query) / a.batch).backward()
        optimizer.step()
        optimizer.zero_grad()
        torch.cuda.synchronize()
        times.append(time.monotonic() - begin)
    step = sorted(times)[len(times) // 2]
    return {
        "median_ms": 1e3 * step,
        "peak_memory_bytes": torch.cuda.max_memory_allocated(),
        "tokens_per_s": a.batch * QUERY / step,
    }


def one(a) -> int:
    """This process's row, as the last line that it prints."""
    if a.device == "cuda" and a.gpu_memory_gib:
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(a.gpu_memory_gib * 2**30 / total)
    found = plain_row(a) if a.row == "plain_lora" else fastft_row(a, a.row)
    print(json.dumps(found))
    return 0


def main() -> int:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--size", default="opt-30b", choices=random_model.SIZES)
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cpu", "cuda"])
    p.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    p.add_argument("--json", type=Path, metavar="FILE")
    p.add_argument("--folder", type=Path, default=Path("runs/large"), help="models, caches and runs")
    for name, value in (("context", 1792), ("queries", 16), ("batch", 8), ("steps", 6), ("asked", 1000)):
        p.add_argument(f"--{name}", type=int, default=value)
    p.add_argument("--micro-batches", type=int, default=1)
    p.add_argument("--activation-checkpointing", default="full", choices=["full", "none"])
    p.add_argument("--gpu-memory-gib", type=float, help="cap of the allocator")
    p.add_argument("--plain", action="store_true", help="also transformers + PEFT + bitsandbytes (GPU)")
    p.add_argument("--plain-batch", type=int, default=1, help="queries that the plain form takes at a time")
    p.add_argument("--rows", default="", help="only these, separated by commas")
    p.add_argument("--limit-s", type=float, default=3600.0, help="seconds for each row")
    p.add_argument("--row", help=argparse.SUPPRESS)
    a = p.parse_args()
    a.folder = a.folder.resolve()
    a.folder.mkdir(parents=True, exist_ok=True)
    if a.row:
        return one(a)
    impls = [*TRAINED, *(["fastft_icl"] if a.asked else []), *(["plain_lora"] if a.plain else [])]
    rows, asked = [], [r for r in a.rows.split(",") if r]
    for impl in asked or impls:
        row = {
            "name": "large",
            "impl": impl,
            "shape": {"size": a.size, "context": a.context, "query": QUERY, "queries": a.queries, "batch": a.batch},
            "dtype": a.dtype,
            "device": a.device,
            "device_name": common.device_name(a.device),
            "torch": torch.__version__,
        }
        command = [sys.executable, __file__, *sys.argv[1:], "--row", impl]
        print(f"{impl} ...", flush=True)
        try:
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, timeout=a.limit_s, check=False)
            lines = done.stdout.strip().splitlines()
            print("\n".join(f"  {line}" for line in lines[:-1]))
            row |= json.loads(lines[-1]) if done.returncode == 0 else {"error": f"exit code {done.returncode}"}
        except subprocess.TimeoutExpired:
            row["error"] = f"more than {a.limit_s:.0f} s"
        rows.append(row)
        if a.json:
            a.json.write_text(json.dumps(rows, indent=1))
    show(rows)
    return 0 if all("error" not in row for row in rows) else 1


def show(rows: list[dict]) -> None:
    print(f"{'row':<15} {'step or query':>14} {'tokens/s':>9} {'peak GiB':>9} {'planned':>8} {'roofline':>9}")
    for row in rows:
        if "error" in row:
            print(f"{row['impl']:<15} {row['error']}")
            continue
        planned, fraction = row.get("planned_memory_bytes"), row.get("roofline_fraction")
        print(
            f"{row['impl']:<15} {row['median_ms'] / 1e3:>12.2f} s {row.get('tokens_per_s', float('nan')):>9.1f} "
            f"{row['peak_memory_bytes'] / 2**30:>9.2f} {planned / 2**30 if planned else float('nan'):>8.2f} "
            f"{fraction if fraction else float('nan'):>9.0%}"
        )


if __name__ == "__main__":
    raise SystemExit(main())
