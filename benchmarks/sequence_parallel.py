"""A teach phase behind one long context, each process alone with it and all together (model.sequence_parallel).

python benchmarks/sequence_parallel.py --ranks 2 --context 16384

A Llama of SmolLM2-135M's shape with random weights (--heads, --kv-heads, --hidden, --ffn, --layers for another), one
context, and queries of 64 tokens behind it in batches that are dealt out to the processes; on a GPU one process for
each. For each way the seconds of encoding the context and computing all targets, and of them those of the processor,
which others on the machine disturb less; the bytes of its keys and values on a process, and how far the phase raised
the process's memory (on a GPU the allocator's); the largest of all processes. The targets of both ways are compared.
"""

from __future__ import annotations

import json
import os
import shlex
import socket
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from transformers import LlamaConfig, LlamaForCausalLM

from fastft.config import DistillConfig
from fastft.data.sequences import Sequence, Window
from fastft.distributed import Ranks
from fastft.engine.launch import MALLOC_LIMITS
from fastft.methods.distill import teach
from fastft.models.attention import IMPLEMENTATION
from fastft.models.causal import PackedCausalLM

sys.path.insert(0, str(Path(__file__).resolve().parent))
import common

WAYS = ("none", "ulysses")
VOCABULARY = 49152


class Written:
    """Takes a rank's targets in place of a store."""

    error = None

    def __init__(self):
        self.targets: list[torch.Tensor] = []

    def write(self, members: list[int], targets: dict[str, torch.Tensor]) -> None:
        self.targets.append(targets["hidden"])


def build(args) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=args.hidden,
        intermediate_size=args.ffn,
        num_hidden_layers=args.layers,
        num_attention_heads=args.heads,
        num_key_value_heads=args.kv_heads,
        vocab_size=VOCABULARY,
        max_position_embeddings=args.context + args.query,
    )
    with torch.device(args.device):
        model = LlamaForCausalLM(config).to(common.DTYPES[args.dtype]).eval().requires_grad_(False)
    model.set_attn_implementation(IMPLEMENTATION)
    return model


def work(rank: int, args, port: int, connection) -> None:
    torch.set_num_threads(args.threads)
    device = torch.device("cuda", rank) if args.device == "cuda" else torch.device("cpu")
    if args.device == "cuda":
        torch.cuda.set_device(device)
    backend = "nccl" if args.device == "cuda" else "gloo"
    dist.init_process_group(backend, init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=args.ranks)
    ranks, model = Ranks(rank, args.ranks, device), build(args)
    ids = torch.randint(0, VOCABULARY, (args.context + args.queries * args.query,)).tolist()
    windows = [Window("d", "", tuple(ids[: args.context]))]
    starts = range(args.context, len(ids), args.query)
    sequences = [Sequence(0, "passage", tuple(ids[i : i + args.query]), ()) for i in starts]
    found, kept = {}, {}
    for way in WAYS:
        lm = PackedCausalLM(model, shared_by=ranks if way == "ulysses" else None)
        written = Written()
        phase = {}

        def run(windows=windows, lm=lm, written=written, phase=phase) -> None:
            begin, of_processor = time.perf_counter(), time.process_time()
            phase["prefix_bytes"] = teach(
                lm,
                windows,
                sequences,
                DistillConfig(),
                written,
                ranks,
                batch_size=args.batch,
                advance=lambda n: None,
            )
            if args.device == "cuda":
                torch.cuda.synchronize()
            phase["seconds"] = time.perf_counter() - begin
            phase["cpu_seconds"] = time.process_time() - of_processor

        run([Window("d", "", tuple(ids[:64]))])  # warm: threads, connections
        written.targets.clear()
        ranks.barrier()
        phase["peak_bytes"] = common.peak_memory(run, args.device)
        ranks.barrier()
        found[way] = {
            name: None if None in of_ranks else max(of_ranks) for name, of_ranks in _columns(ranks.gather(phase))
        }
        kept[way] = torch.cat(written.targets)
    error = common.relative_error((kept["ulysses"],), (kept["none"],))
    errors = ranks.gather(error)
    if rank == 0:
        connection.send((found, max(errors)))
    dist.destroy_process_group()


def _columns(rows: list[dict]) -> list[tuple[str, list]]:
    return [(name, [row[name] for row in rows]) for name in rows[0]]


def main() -> int:
    p = common.parser(__doc__.splitlines()[0])
    p.add_argument("--ranks", type=int, default=2)
    p.add_argument("--threads", type=int, default=1, help="of each process")
    p.add_argument("--context", type=int, default=16384)
    p.add_argument("--queries", type=int, default=32)
    p.add_argument("--query", type=int, default=64, help="tokens of a query")
    p.add_argument("--batch", type=int, default=8, help="queries in a batch")
    for name, default in (("hidden", 576), ("ffn", 1536), ("layers", 30), ("heads", 9), ("kv-heads", 3)):
        p.add_argument(f"--{name}", type=int, default=default)
    args = p.parse_args()
    if args.queries < args.ranks * args.batch:
        p.error(f"--queries: {args.queries} are less than a batch of {args.batch} for each of {args.ranks} processes")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    for variable, (_, limit) in MALLOC_LIMITS.items():  # as in a run
        os.environ.setdefault(variable, str(limit))
    ours, theirs = mp.get_context("spawn").Pipe(duplex=False)
    mp.spawn(work, (args, port, theirs), args.ranks)
    found, error = ours.recv()
    allowed = 16 * torch.finfo(common.DTYPES[args.dtype]).eps
    if error > allowed:
        raise SystemExit(f"the targets of both ways differ by {error:.4f} of the largest value, allowed {allowed:.4f}")
    print(
        f"{common.device_name(args.device)}, torch {torch.__version__}, {args.dtype}; {args.ranks} processes x "
        f"{args.threads} threads; context {args.context:,}, {args.queries} queries of {args.query}; targets differ "
        f"by {error:.1e} of the largest value\n"
        "sequence_parallel  seconds  of the CPU  MiB: keys and values  growth of memory",
        flush=True,
    )
    rows = []
    for way, row in found.items():
        mib = [row[name] / 2**20 if row[name] is not None else float("nan") for name in ("prefix_bytes", "peak_bytes")]
        print(f"{way:17}  {row['seconds']:7.1f}  {row['cpu_seconds']:10.1f}  {mib[0]:20.1f}  {mib[1]:16.1f}")
        rows.append({"name": "teach", "impl": way, "dtype": args.dtype, "device": args.device, **row})
    if args.json:
        args.json.write_text(json.dumps({"command": shlex.join(sys.argv), "rows": rows}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
