"""What a teacher's target costs against the length of the context behind it.

python benchmarks/bench_context_length.py --json context_length.json --plot context_length.png

A Llama of SmolLM2-135M's shape with random weights, contexts of 64 to 16,384 tokens, a batch of queries of 64 tokens
behind each. Milliseconds are per example (one query), the context's own forward is a row of its own:

    fastft          the context's keys and values once, all queries of the batch one block against them
    expanded past   transformers' past_key_values, one copy of them for every example of the batch (expanded once,
                    outside the timing, and cropped after each forward)
    whole           plain: [context; query] through the model for every example
    prefill         the context's keys and values, once per context, for both of the first two

A form is left out once a call of it took longer than --limit-s, or where it would hold more than --limit-gib. What
fastft's time grows by is set against the counted work of attention to the context: 4 H D C Q products and H C Q
exponentials a layer, at the rates that plain torch.mm and torch.exp reach in this process.
"""

from __future__ import annotations

import json
import shlex
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from fastft.data.sequences import pack
from fastft.models.attention import IMPLEMENTATION, PackedSequences, Prefix
from fastft.models.causal import PackedCausalLM

sys.path.insert(0, str(Path(__file__).resolve().parent))
import common

# SmolLM2-135M; its positions end at 8192, which rotary embeddings do not mind as far as time is concerned.
SHAPE = {
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "vocab_size": 49152,
    "max_position_embeddings": 65536,
}
PREFILL = "prefill"
SLOW_MS = 2000.0


class Bench:
    """The model, and the forms of one batch of teacher targets behind a context."""

    def __init__(self, args):
        self.args, self.dtype = args, common.DTYPES[args.dtype]
        torch.manual_seed(0)
        self.config = LlamaConfig(**SHAPE)
        with torch.device(args.device):
            model = LlamaForCausalLM(self.config).to(self.dtype).eval().requires_grad_(False)
        self.model, self.lm = model, PackedCausalLM(model)
        self.queries = [tuple(torch.randint(0, 49152, (args.query,)).tolist()) for _ in range(args.batch)]
        self.past_bytes = 2 * self.config.num_hidden_layers * 3 * 64 * self.dtype.itemsize  # a token, a copy
        self.clock = common.Clock(args.device)

    def flops(self, context: int) -> tuple[float, float, float]:
        """Of one example: products of the linear layers, products of attention to the context, its exponentials."""
        c, tokens = self.config, self.args.query
        linears = sum(m.weight.numel() for m in self.lm.layers[0].modules() if isinstance(m, torch.nn.Linear))
        scores = c.num_attention_heads * context * tokens * c.num_hidden_layers
        return 2.0 * linears * c.num_hidden_layers * tokens, 4.0 * 64 * scores, float(scores)

    def random_prefix(self, context: int) -> Prefix:
        """For contexts whose forward is left out: the time does not depend on what the keys and values are."""
        prefix, shape = Prefix(), (1, 3, context, 64)
        for layer in range(self.config.num_hidden_layers):
            k, v = (torch.randn(shape, dtype=self.dtype, device=self.args.device) for _ in range(2))
            prefix.put(layer, k, v)
        return prefix

    def prefill(self, tokens: tuple[int, ...]) -> Prefix:
        self.model.set_attn_implementation(IMPLEMENTATION)
        return self.lm.encode_prefix(tokens)

    def ours(self, prefix: Prefix) -> torch.Tensor:
        """Hidden states [batch * query, H] of all examples."""
        self.model.set_attn_implementation(IMPLEMENTATION)
        input_ids, lengths = pack(self.queries, [], self.args.device)
        packed = PackedSequences(lengths, prefixes=[(prefix, len(lengths))], device=self.args.device)
        return self.lm(input_ids, packed)

    def expand(self, prefix: Prefix) -> DynamicCache:
        cache, batch = DynamicCache(), self.args.batch
        for layer in range(self.config.num_hidden_layers):
            cache.update(*(x.expand(batch, -1, -1, -1) for x in prefix.fetch(layer)), layer)
        return cache

    def expanded(self, cache: DynamicCache) -> torch.Tensor:
        self.model.set_attn_implementation("sdpa")
        input_ids = torch.tensor(self.queries, device=self.args.device)
        hidden = self.model.model(input_ids, past_key_values=cache, use_cache=True).last_hidden_state
        cache.crop(-self.args.query)
        return hidden.flatten(0, 1)

    def whole(self, tokens: tuple[int, ...]) -> torch.Tensor:
        """Hidden states [query, H] of the first example."""
        self.model.set_attn_implementation("sdpa")
        input_ids = torch.tensor([(*tokens, *self.queries[0])], device=self.args.device)
        return self.model.model(input_ids, use_cache=False).last_hidden_state[0, len(tokens) :]


def measure(bench: Bench, functions: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Milliseconds of each call, rounds alternating; what takes more than SLOW_MS is called once."""
    times: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(rounds):
        due = {name: f for name, f in functions.items() if not times[name] or times[name][0] < SLOW_MS}
        for name, ms in bench.clock.round(due).items():
            times[name].append(ms)
    return times


@torch.no_grad()
def run(bench: Bench, peak: tuple[float, float, float]) -> list[dict]:
    args, rows = bench.args, []
    left_out: set[str] = set()
    for context in args.contexts:
        tokens = tuple(torch.randint(0, 49152, (context,)).tolist())
        prefix = bench.random_prefix(context) if PREFILL in left_out else bench.prefill(tokens)
        functions: dict[str, Callable[[], object]] = {common.OURS: lambda p=prefix: bench.ours(p)}
        memory: dict[str, Callable[[], object]] = dict(functions)
        # The cache, and the copy of it that every forward makes of one layer after another.
        if 2 * args.batch * context * bench.past_bytes > args.limit_gib * 2**30:
            left_out.add("expanded past")
        if "expanded past" not in left_out:
            cache = bench.expand(prefix)
            functions["expanded past"] = lambda c=cache: bench.expanded(c)
            memory["expanded past"] = lambda p=prefix: bench.expanded(bench.expand(p))
        for name, function in (("whole", bench.whole), (PREFILL, bench.prefill)):
            if name not in left_out:
                functions[name] = memory[name] = lambda f=function, t=tokens: f(t)
        check(bench, functions, PREFILL in left_out)
        used = {name: common.peak_memory(f, args.device) for name, f in memory.items()}
        times = measure(bench, functions, args.rounds or 5)
        left_out |= {n for n, ms in times.items() if n != common.OURS and min(ms) > args.limit_s * 1e3}
        linear, attention, exponentials = bench.flops(context)
        floor_ms = 1e3 * ((linear + attention) / peak[0] + exponentials / peak[2])
        examples = {common.OURS: args.batch, "expanded past": args.batch}
        per_example = {name: [t / examples.get(name, 1) for t in ms] for name, ms in times.items()}
        median = {name: statistics.median(ms) for name, ms in per_example.items()}
        peers = [median[name] for name in ("expanded past", "whole") if name in median]
        for name, ms in per_example.items():
            other = (min(peers) if peers else None) if name == common.OURS else median[name]
            rows.append(
                {
                    "name": f"teach C={context}",
                    "impl": name,
                    "shape": {"context": context, "query": args.query, "batch": examples.get(name, 1)},
                    "dtype": args.dtype,
                    "device": args.device,
                    "device_name": common.device_name(args.device),
                    "torch": torch.__version__,
                    "median_ms": median[name],
                    "p20_ms": common.percentile(ms, 0.2),
                    "p80_ms": common.percentile(ms, 0.8),
                    "peak_memory_bytes": used[name],
                    "ratio_to_peer": median[common.OURS] / other if other and name != PREFILL else None,
                    "roofline_fraction": floor_ms / median[name] if name == common.OURS else None,
                    "floor_ms": floor_ms,
                    "attention_gflop": attention / 1e9,
                    "prefix_bytes": prefix.nbytes,
                    "past_bytes": args.batch * prefix.nbytes,
                }
            )
        print_row(rows, context, peak)
        if args.json:
            args.json.write_text(json.dumps({"command": shlex.join(sys.argv), "rows": rows}, indent=1) + "\n")
    return rows


def check(bench: Bench, functions: dict[str, Callable[[], object]], random_prefix: bool) -> None:
    """The forms agree: the batch's first example, to rounding."""
    size = bench.args.query
    ours = functions[common.OURS]()[:size]
    for name in ("expanded past", "whole"):
        if name in functions and not (name == "whole" and random_prefix):
            error = common.relative_error((ours,), (functions[name]()[:size],))
            allowed = 16 * torch.finfo(bench.dtype).eps + 1e-4
            if error > allowed:
                raise SystemExit(f"{name} and fastft differ by {error:.3f} of the largest value, allowed {allowed:.3f}")


def print_row(rows: list[dict], context: int, peak: tuple[float, float, float]) -> None:
    own = {r["impl"]: r for r in rows if r["shape"]["context"] == context}
    first, last = (r for r in (rows[0], own[common.OURS]))
    if context == rows[0]["shape"]["context"]:
        print(
            f"{last['device_name']}, torch {last['torch']}, {last['dtype']}; torch.mm {peak[0] / 1e9:.0f} GFLOP/s, "
            f"torch.exp {peak[2] / 1e9:.2f} G/s\nms per example; prefill: per context\n"
            "context   fastft  expanded     whole  whole/fastft  prefill |  growth  counted  | MiB: prefix  expanded"
        )

    def ms(name: str) -> str:
        return f"{own[name]['median_ms']:.1f}" if name in own else "-"

    growth = last["median_ms"] - first["median_ms"]
    counted = last["floor_ms"] - first["floor_ms"]
    ratio = f"{own['whole']['median_ms'] / last['median_ms']:.1f}" if "whole" in own else "-"
    forms = f"{ms(common.OURS):>7}  {ms('expanded past'):>8}  {ms('whole'):>8}  {ratio:>12}  {ms(PREFILL):>7}"
    held = f"{last['prefix_bytes'] / 2**20:11.1f}  {last['past_bytes'] / 2**20:8.1f}"
    print(f"{context:7}  {forms} | {growth:7.1f}  {counted:7.1f}  | {held}", flush=True)


def rates(device: str, dtype: torch.dtype) -> tuple[float, float, float]:
    """(FLOP/s, bytes/s, exponentials/s)."""
    known = common.peaks(device, dtype)
    if known is None:
        raise SystemExit("no peaks are known for this GPU: add it to fastft/plan/hardware.py")
    x = torch.randn(2**18 if device == "cpu" else 2**26, device=device)
    y = torch.empty_like(x)

    def exponentials():
        torch.exp(x, out=y)
        if device == "cuda":
            torch.cuda.synchronize()

    seconds = []
    for _ in range(20):
        begin = time.perf_counter()
        exponentials()
        seconds.append(time.perf_counter() - begin)
    return (*known, x.numel() / min(seconds))


def plot(rows: list[dict], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4.6), layout="constrained")
    forms = {
        "whole": ("tab:red", "o-", "[context; query] for every example"),
        "expanded past": ("tab:orange", "o-", "past_key_values copied per example"),
        common.OURS: ("tab:blue", "o-", "fastft: one copy of the context"),
    }
    for name, (color, style, label) in forms.items():
        points = [(r["shape"]["context"], r["median_ms"]) for r in rows if r["impl"] == name]
        if points:
            axes.plot(*zip(*points, strict=True), style, color=color, label=label, markersize=4)
    floor = [(r["shape"]["context"], r["floor_ms"]) for r in rows if r["impl"] == common.OURS]
    axes.plot(*zip(*floor, strict=True), "--", color="gray", linewidth=1, label="counted products and exponentials")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks([c for c, _ in floor], [f"{c:,}" for c, _ in floor])
    axes.set(xlabel="tokens of context", ylabel="ms per example of 64 tokens")
    axes.grid(axis="y", which="major", alpha=0.3)
    axes.legend(frameon=False, loc="upper left")
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=160)


def main() -> int:
    p = common.parser(__doc__.splitlines()[0])
    p.add_argument("--contexts", type=int, nargs="+", default=[2**i for i in range(6, 15)])
    p.add_argument("--query", type=int, default=64, help="tokens of a query with its answer")
    p.add_argument("--batch", type=int, default=8, help="queries in a batch")
    p.add_argument("--limit-s", type=float, default=5.0, help="leave a form out after a call that took longer")
    p.add_argument("--limit-gib", type=float, default=2.0, help="leave the expanded past out where it takes more")
    p.add_argument("--plot", type=Path)
    args = p.parse_args()
    rows = run(Bench(args), rates(args.device, common.DTYPES[args.dtype]))
    if args.plot:
        plot(rows, args.plot)
    return 0


if __name__ == "__main__":
    sys.exit(main())
