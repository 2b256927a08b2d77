"""In-context evaluation of a classification task: demonstrations computed once against the usual ways.

    python benchmarks/bench_icl.py --json docs/benchmarks/bench_icl-cpu.json

RTE's 277 validation examples behind 16 balanced demonstrations, SmolLM2-135M. All implementations read the same prompts
and compare the logits of the two label words at the last position; a time is that of a whole evaluation, from texts to
predictions, tokenising included.

    padded        as uds-lsv/llmft's eval.py does it (commit 3acc389): demonstrations and query are one string per
                  example, padded on the right to max_seq_length = min(2048, the tokenizer's maximum); the head gives
                  logits [B, T, V], of which the last real position is used. Not copied: its fp16 on GPUs, its
                  Trainer, and the blank at the end of its prompts.
    unpadded      plain transformers at its strongest without a shared prefix: sorted by length, each batch padded to
                  its own longest on the right (no mask is needed then, and the flash kernel runs), head on the last
                  position only.
    shared_cache  plain transformers with the demonstrations' past_key_values computed once and repeated for each
                  batch of queries, padded to their longest; head on the last position only.
    fastft        fastft.methods.icl: one copy of the prefix, packed queries, the labels' rows of the head.

The peers run on evenly spaced examples of the length-sorted set (--padded, --unpadded, --shared: how many), as their
cost depends on an example's length alone; their times are scaled to all examples, and the rows say how many were run
(`measured`). Predictions are compared on the examples that both ran. Where a peer's differ in 16 bits, both sides are
computed again in float32 on those examples.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

import common
import torch
from transformers import AutoModelForCausalLM, DynamicCache

from fastft.config import Config, DataConfig
from fastft.distributed import Ranks
from fastft.methods import icl
from fastft.models import loading
from fastft.models.causal import PackedCausalLM
from fastft.models.text import Text
from fastft.tasks import CLASSIFICATION_TASKS, Example, Pattern, sample_demonstrations, select_pattern


@dataclass
class Evaluation:
    """What all implementations are given."""

    plain: torch.nn.Module  # transformers' model
    lm: PackedCausalLM  # the same weights behind fastft's attention
    tokenizer: object
    pattern: Pattern
    demonstrations: list[Example]
    labels: list[int]
    batch: int
    max_length: int

    @property
    def device(self) -> torch.device:
        return self.lm.device

    def prompts(self, examples: list[Example]) -> list[str]:
        shown = [self.pattern.demonstrate(d) for d in self.demonstrations]
        return [self.pattern.separator.join([*shown, self.pattern.ask(e)]) for e in examples]


@torch.no_grad()
def padded(e: Evaluation, examples: list[Example]) -> torch.Tensor:
    """Logits of the labels [N, labels]."""
    rows = []
    texts = e.prompts(examples)
    for start in range(0, len(texts), e.batch):
        inputs = e.tokenizer(
            texts[start : start + e.batch],
            padding="max_length",
            max_length=e.max_length,
            truncation=True,
            return_tensors="pt",
        ).to(e.device)
        logits = e.plain(**inputs, use_cache=False).logits
        last = inputs.attention_mask.sum(1) - 1
        rows.append(logits[torch.arange(len(last)), last][:, e.labels].float())
    return torch.cat(rows)


def batches(sequences: list[list[int]], size: int):
    """(indices, right-padded ids [B, T], position of each one's last token), sorted by length."""
    order = sorted(range(len(sequences)), key=lambda i: len(sequences[i]))
    for start in range(0, len(order), size):
        members = order[start : start + size]
        lengths = torch.tensor([len(sequences[i]) for i in members])
        ids = torch.zeros(len(members), int(lengths.max()), dtype=torch.long)
        for row, i in enumerate(members):
            ids[row, : len(sequences[i])] = torch.tensor(sequences[i])
        yield members, ids, lengths - 1


def at_last(e: Evaluation, hidden: torch.Tensor, last: torch.Tensor) -> torch.Tensor:
    return e.plain.lm_head(hidden[torch.arange(len(last)), last])[:, e.labels].float()


@torch.no_grad()
def unpadded(e: Evaluation, examples: list[Example]) -> torch.Tensor:
    found = torch.zeros(len(examples), len(e.labels), device=e.device)
    for members, ids, last in batches(e.tokenizer(e.prompts(examples)).input_ids, e.batch):
        hidden = e.plain.model(ids.to(e.device), use_cache=False).last_hidden_state
        found[members] = at_last(e, hidden, last)
    return found


@torch.no_grad()
def shared_cache(e: Evaluation, examples: list[Example]) -> torch.Tensor:
    shown = e.pattern.separator.join(map(e.pattern.demonstrate, e.demonstrations))
    shared = torch.tensor([e.tokenizer(shown).input_ids], device=e.device)
    prefix = e.plain.model(shared, use_cache=True).past_key_values
    queries = e.tokenizer([e.pattern.separator + e.pattern.ask(x) for x in examples], add_special_tokens=False)
    found = torch.zeros(len(examples), len(e.labels), device=e.device)
    for members, ids, last in batches(queries.input_ids, e.batch):
        cache = DynamicCache()
        for i, layer in enumerate(prefix.layers):
            cache.update(*(x.expand(len(members), -1, -1, -1) for x in (layer.keys, layer.values)), i)
        hidden = e.plain.model(ids.to(e.device), past_key_values=cache, use_cache=True).last_hidden_state
        found[members] = at_last(e, hidden, last)
    return found


def fastft(e: Evaluation, examples: list[Example]) -> torch.Tensor:
    text = Text(e.tokenizer)
    prefix = e.lm.encode_prefix(icl.encode_demonstrations(e.pattern, e.demonstrations, text))
    queries = icl.encode_queries(e.pattern, examples, text, behind_demonstrations=True)
    return icl.classify(e.lm, queries, Ranks(), prefix=prefix, batch_size=64).log_probs.float()


def flops(config, tokens: int, attended: int, logits: int) -> float:
    """Of `tokens` through the layers, `attended` (query, key) pairs and `logits` rows of the head."""
    H, D = config.hidden_size, config.hidden_size // config.num_attention_heads
    kv = config.num_key_value_heads * D
    layer = 2 * H * H + 2 * H * kv + 3 * H * config.intermediate_size
    return (2 * tokens * layer + 4 * attended * H) * config.num_hidden_layers + 2 * logits * H * config.vocab_size


def model_pair(path: str, dtype: str, device: str) -> tuple[torch.nn.Module, PackedCausalLM]:
    plain = AutoModelForCausalLM.from_pretrained(path, dtype=getattr(torch, dtype), attn_implementation="sdpa")
    return plain.to(device).eval(), PackedCausalLM(loading.load_model(path, dtype=dtype).to(device))


def timed(function: Callable[[], torch.Tensor], device: str) -> tuple[torch.Tensor, float]:
    begin = time.perf_counter()
    result = function()
    if device == "cuda":
        torch.cuda.synchronize()
    return result, time.perf_counter() - begin


def main() -> int:
    p = common.parser(__doc__.splitlines()[0])
    p.add_argument("--model", default="smollm2-135m", help="hub name, folder, or smollm2-135m")
    p.add_argument("--task", default="rte", choices=[n for n, t in CLASSIFICATION_TASKS.items() if t.has_train])
    p.add_argument("--pattern", default="eval_harness")
    p.add_argument("--shots", type=int, default=16)
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--batch", type=int, default=4, help="sequences per forward of the peers")
    p.add_argument("--padded", type=int, default=4, metavar="N", help="examples that `padded` is run on")
    p.add_argument("--unpadded", type=int, default=16, metavar="N", help="examples that `unpadded` is run on")
    p.add_argument("--shared", type=int, default=64, metavar="N", help="examples that `shared_cache` is run on")
    a = p.parse_args()

    path = loading.resolve(a.model, Config(output_dir="unused").cache_path)
    tokenizer = loading.load_tokenizer(path)
    tokenizer.padding_side = "right"
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    task = CLASSIFICATION_TASKS[a.task]
    _, pattern = select_pattern(DataConfig(task=a.task, pattern=a.pattern))
    demonstrations = sample_demonstrations(
        task.load("train", None), a.shots, len(pattern.verbalizer), balanced=True, seed=a.seed
    )
    examples = task.load("validation", None)

    text = Text(tokenizer)
    shared = icl.encode_demonstrations(pattern, demonstrations, text)
    queries = icl.encode_queries(pattern, examples, text, behind_demonstrations=True)
    if queries.labels is None:
        print(f"bench_icl: the label words of {a.pattern} are not single tokens of this model", file=sys.stderr)
        return 1
    max_length = min(2048, tokenizer.model_max_length)
    e = Evaluation(
        *model_pair(path, a.dtype, a.device), tokenizer, pattern, demonstrations, queries.labels, a.batch, max_length
    )
    whole = tokenizer(e.prompts(examples)).input_ids
    if any([*shared, *q] != w for q, w in zip(queries.prompts, whole, strict=True)):
        print("bench_icl: this tokenizer cuts prompt and query differently when they are one text", file=sys.stderr)
        return 1

    order = sorted(range(len(examples)), key=lambda i: len(whole[i]))

    def spaced(count: int) -> list[int]:
        count = min(count, len(order))
        return sorted(order[(2 * k + 1) * len(order) // (2 * count)] for k in range(count))

    config, C = e.plain.config, len(shared)
    tokens = [len(q) for q in queries.prompts]
    own = C * (C + 1) // 2 + sum(n * C + n * (n + 1) // 2 for n in tokens)
    shared_flops = flops(config, C + sum(tokens), own, len(examples))
    plain = [(C + n, (C + n) * (C + n + 1) // 2) for n in tokens]
    implementations = {
        "padded": (padded, spaced(a.padded), len(examples) * flops(config, max_length, max_length**2 // 2, max_length)),
        "unpadded": (unpadded, spaced(a.unpadded), sum(flops(config, n, pairs, 1) for n, pairs in plain)),
        "shared_cache": (shared_cache, spaced(a.shared), shared_flops),
        common.OURS: (fastft, list(range(len(examples))), shared_flops),
    }
    rounds = a.rounds or (5 if a.device == "cuda" else 2)
    for function, _, _ in implementations.values():  # warm up
        function(e, examples[:2])
    ceiling = common.peaks(a.device, common.DTYPES[a.dtype])

    seconds: dict[str, list[float]] = {name: [] for name in implementations}
    memory: dict[str, int | None] = {}
    logits: dict[str, torch.Tensor] = {}
    names = list(implementations)
    for r in range(rounds):
        for name in names[r % len(names) :] + names[: r % len(names)]:
            function, members, _ = implementations[name]
            chosen = [examples[i] for i in members]

            def once(name=name, function=function, chosen=chosen) -> None:
                logits[name], spent = timed(lambda: function(e, chosen), a.device)
                seconds[name].append(spent * len(examples) / len(chosen))

            if r == 0:
                memory[name] = common.peak_memory(once, a.device)
            else:
                once()
            took = seconds[name][-1]
            print(f"round {r + 1}  {name:<12}  {took:7.1f} s for all  ({len(chosen)} run)", file=sys.stderr, flush=True)

    ours = logits[common.OURS].cpu()
    predicted = ours.argmax(-1)
    gold = torch.tensor([x.label for x in examples])
    checks, failed = {}, False
    for name, (function, members, _) in implementations.items():
        if name == common.OURS:
            continue
        theirs = logits[name].cpu()
        different = [k for k, i in enumerate(members) if theirs[k].argmax() != predicted[i]]
        check = {"compared": len(members), "different": len(different)}
        if different:
            at = [members[k] for k in different]
            spread = [abs(float(theirs[k].max() - theirs[k].min())) for k in different]
            exact = Evaluation(*model_pair(path, "float32", a.device), *list(vars(e).values())[2:])
            chosen = [examples[i] for i in at]
            same = function(exact, chosen).argmax(-1).cpu() == fastft(exact, chosen).argmax(-1).cpu()
            check |= {"examples": at, "their_margins": spread, "equal_in_float32": bool(same.all())}
            failed |= not same.all()
        checks[name] = check

    median = {name: statistics.median(values) for name, values in seconds.items()}
    shape = {
        "examples": len(examples),
        "shots": a.shots,
        "prefix": C,
        "query_tokens": sum(tokens),
        "vocab": config.vocab_size,
    }
    rows = []
    for name, (_, members, work) in implementations.items():
        peers = [median[n] for n in names if n != common.OURS]
        other = min(peers) if name == common.OURS else median[name]
        rows.append(
            {
                "name": f"icl {a.task}",
                "impl": name,
                "shape": shape,
                "dtype": a.dtype,
                "device": a.device,
                "device_name": common.device_name(a.device),
                "torch": torch.__version__,
                "median_ms": 1e3 * median[name],
                "p20_ms": 1e3 * common.percentile(seconds[name], 0.2),
                "p80_ms": 1e3 * common.percentile(seconds[name], 0.8),
                "peak_memory_bytes": memory[name],
                "ratio_to_peer": median[common.OURS] / other,
                "roofline_fraction": work / ceiling[0] / median[name] if ceiling else None,
                "gb_per_s": None,
                "tflop_per_s": work / median[name] / 1e12,
                "error": None,
                "measured": len(members),
                "predictions": checks.get(name),
            }
        )
    common.print_rows(rows)
    accuracy = (predicted == gold).double().mean().item()
    majority = gold.bincount().max().item() / len(gold)
    print(f"\n  accuracy {100 * accuracy:.1f} % on {len(gold)} examples (majority {100 * majority:.1f} %)")
    for name, check in checks.items():
        print(f"  {name}: {implementations[name][0].__name__} on {check['compared']} examples, ", end="")
        print(f"{median[name] / median[common.OURS]:.1f}x ours; {check['different']} predictions differ", end="")
        if check["different"]:
            margins = ", ".join(f"{m:.3f}" for m in check["their_margins"])
            print(f" (margins {margins}; in float32 all equal: {check['equal_in_float32']})", end="")
        print()
    if a.json:
        a.json.parent.mkdir(parents=True, exist_ok=True)
        a.json.write_text(json.dumps(rows, indent=1))
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
