"""Everything that needs a GPU, in one go and within a time limit: build, tests, sanitizer, training, benchmarks.

python benchmarks/gpu_suite.py --out DIR [--limit-s 540] [--skip build,bench_kl]

lora_linear's form main_loop needs CUTLASS's headers for the build: the package nvidia-cutlass, or CUTLASS_DIR.

Goes on past a part that fails or runs out of time and says so at the end. Writes DIR/<part>.log for every part,
DIR/<bench>.json for every benchmark, and DIR/summary.json:
{"device", "torch", "parts": [{"name", "status", "seconds", "detail"}]}, status one of ok, failed, timeout, skipped.
Exit status 0 only if no part failed or timed out.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

# A short run of every kernel, for compute-sanitizer: sizes that are no multiple of anything, rows that are not
# aligned to 16 bytes, rows of one warp, of one block and of a cluster of blocks.
SANITIZED = """
import torch
from fastft import ops
from fastft.optim import BiasAdamW
torch.manual_seed(0)
for dtype in (torch.float32, torch.bfloat16):
    for vocab in (1, 9, 1001, 50257, 50272):
        wide = torch.randn(5, vocab + 3, device="cuda").to(dtype)
        s = wide[:, 1 : vocab + 1].requires_grad_()
        t = torch.randn(5, vocab, device="cuda").to(dtype)
        for direction in ("forward", "reverse", "jsd"):
            ops.log_softmax_kl(s, t, direction=direction).backward()
        h = torch.randn(5, 16, device="cuda").to(dtype).requires_grad_()
        w = torch.randn(vocab, 16, device="cuda").to(dtype)
        ids = torch.stack([torch.randperm(vocab)[: min(vocab, 7)] for _ in range(5)]).cuda()
        log_probs = torch.full(ids.shape, -2.5, device="cuda")
        ops.linear_log_softmax_kl(h, h.detach() * 2, w, chunk_rows=2).backward()
        for direction in ("forward", "reverse", "jsd"):
            ops.linear_topk_kl(h, w, ids, log_probs, direction=direction, chunk_rows=2).backward()
            ops.linear_topk_kl(h, w, ids, log_probs, direction=direction, tail=False).backward()
        ops.linear_cross_entropy(h, w, ids[:, 0], chunk_rows=2).backward()
    for state_bits in (32, 8):
        wide = [torch.randn(n + 1, device="cuda").to(dtype) for n in (0, 1, 257, 4097, 9001)]
        optimizer = BiasAdamW([x[1:].requires_grad_() for x in wide], state_bits=state_bits, max_grad_norm=1.0)
        for p in optimizer.param_groups[0]["params"]:
            p.grad = torch.ones_like(p)
        optimizer.step()
for dtype in (torch.float32, torch.bfloat16, torch.float16):
    for n in (1, 9, 2049, 40000):
        ops.relu(torch.randn(n + 1, device="cuda").to(dtype)[1:].requires_grad_()).sum().backward()
        gate, up = (torch.randn(n + 1, device="cuda").to(dtype)[1:].requires_grad_() for _ in range(2))
        ops.swiglu(gate, up).sum().backward()
    for width in (1, 64, 250, 576, 4100, 8200, 9001):
        x, w = (torch.randn(s, device="cuda").to(dtype).requires_grad_() for s in ((37, width), (width,)))
        ops.rms_norm(x, w, 1e-5).sum().backward()
        ops.rms_norm(x, w.detach().float(), 1e-5).sum().backward()
    for batch, heads, tokens, size, rotated in ((1, 3, 33, 64, 64), (2, 2, 5, 21, 12)):
        q, k = (torch.randn(batch, tokens, n, size + 1, device="cuda").to(dtype)[..., 1:] for n in (heads, 1))
        cos, sin = (torch.randn(1, tokens, rotated, device="cuda").to(dtype) for _ in range(2))
        leaves = [x.transpose(1, 2).requires_grad_() for x in (q, k)]
        sum(y.sum() for y in ops.rotary(*leaves, cos, sin)).backward()
    for M, K, N, r in ((1, 1, 1, 1), (65, 130, 129, 16), (300, 1100, 72, 20), (64, 128, 256, 64)):
        x, w, A, B = (torch.randn(s, device="cuda").to(dtype) for s in ((M, K + 3), (N, K), (r, K), (N, r)))
        leaves = [x[:, 1 : K + 1].requires_grad_(), A.requires_grad_(), B.requires_grad_()]
        for form in ("kernels", "epilogue"):
            ops.lora_linear(leaves[0], w, *leaves[1:], 0.5, form=form).sum().backward()
    # Its matrix product: multiples of 8 and two bytes an element, where it was built.
    from fastft.ops.summed_products import obstacle
    for M, K, N, r in ((1, 8, 8, 8), (130, 136, 264, 16), (700, 200, 1032, 24)):
        x, w, A, B = (torch.randn(s, device="cuda").to(dtype) for s in ((M, K + 3), (N, K), (r, K), (N, r)))
        if obstacle(x.device, dtype, 2, {"sizes": [K, N, r]}) is None:
            leaves = [x[:, 1 : K + 1].requires_grad_(), A.requires_grad_(), B.requires_grad_()]
            ops.lora_linear(leaves[0], w, *leaves[1:], 0.5, form="main_loop").sum().backward()
torch.cuda.synchronize()
print("done")
"""


@dataclass
class Part:
    name: str
    status: str
    seconds: float
    detail: str


class Suite:
    def __init__(self, out: Path, limit_s: float, skip: set[str]):
        self.out, self.skip = out, skip
        self.end = time.monotonic() + limit_s
        self.parts: list[Part] = []

    def run(self, name: str, command: list[str], share_s: float, env: dict[str, str] | None = None) -> bool:
        """Runs a part for at most share_s, and never past the suite's end. True if it succeeded."""
        if name in self.skip:
            return self.note(name, "skipped", 0, "asked for")
        timeout = min(share_s, self.end - time.monotonic())
        if timeout < 5:
            return self.note(name, "skipped", 0, "no time left")
        print(f"== {name}: {' '.join(command)[:160]}", flush=True)
        start = time.monotonic()
        log = self.out / f"{name}.log"
        with log.open("w") as stream:
            process = subprocess.Popen(
                command,
                cwd=ROOT,
                stdout=stream,
                stderr=subprocess.STDOUT,
                env={**os.environ, "PYTHONPATH": str(ROOT), **(env or {})},
                start_new_session=True,  # so that a timeout ends its children too
            )
            try:
                code = process.wait(timeout)
                status = "ok" if code == 0 else "failed"
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
                status, code = "timeout", None
        lines = [x for x in log.read_text(errors="replace").splitlines() if x.strip()]
        detail = lines[-1][:300] if lines else ""
        if code:
            detail = f"exit status {code}; {detail}"
        return self.note(name, status, time.monotonic() - start, detail)

    def note(self, name: str, status: str, seconds: float, detail: str) -> bool:
        self.parts.append(Part(name, status, round(seconds, 1), detail))
        print(f"   {name}: {status} in {seconds:.0f} s  {detail}", flush=True)
        self.write()
        return status == "ok"

    def write(self) -> None:
        summary = {"device": None, "torch": None, "parts": [asdict(p) for p in self.parts]}
        info = self.out / "info.json"
        if info.exists():
            summary |= json.loads(info.read_text())
        (self.out / "summary.json").write_text(json.dumps(summary, indent=1))


# In this order: kernels before whole steps. Of benchmarks that are run more than once the first part has all peers, the
# others none of torch.compile, whose compilation takes longer than everything else.
BENCHES = {
    "bench_bias_adamw": {"bench_bias_adamw": []},
    "bench_relu": {"bench_relu": ["--tokens", "2048"]},
    "bench_norms": {"bench_norms": []},
    "bench_elementwise": {"bench_elementwise": ["--model", "llama-3-8b", "--tokens", "2048"]},
    "bench_kl": {
        "bench_kl": ["--model", "opt-30b", "--rows", "2048"],
        "bench_kl_llama": ["--model", "llama-3-8b", "--rows", "2048", "--no-compile"],
        "bench_kl_rows": ["--model", "opt-125m", "--rows", "64", "512", "8192", "--no-compile"],
    },
    # All forms are rows of each table; PICKED in fastft/ops/lora_linear.py follows from them.
    "bench_lora_linear": {
        "bench_lora_linear": ["--model", "opt-30b", "--rows", "8192", "--form", "epilogue"],
        "bench_lora_linear_256": ["--model", "opt-30b", "--rows", "256", "--form", "epilogue", "--no-compile"],
        "bench_lora_linear_llama": ["--model", "llama-3-8b", "--rows", "2048", "--form", "epilogue", "--no-compile"],
    },
    "bench_attention": {
        f"bench_attention{suffix}": ["--model", model, "--sequences", "32", "--longest", "512", "--context", "2048"]
        for suffix, model in (("", "llama-3-8b"), ("_opt", "opt-1.3b"))
    },
    "bench_distill_step": {  # OPT-1.3B's shape
        "bench_distill_step": [
            *("--hidden", "2048", "--layers", "24", "--heads", "32", "--ffn", "8192"),
            *("--context", "1792", "--query", "256"),
        ],
    },
    "bench_context_length": {"bench_context_length": ["--limit-gib", "16"]},
    # Needs the packaged SmolLM2 and RTE (FASTFT_DATA, or the hub).
    "bench_icl": {"bench_icl": ["--batch", "16", "--padded", "32", "--unpadded", "64"]},
    # OPT-30B in 24 GiB. Of the suite's time it gets what is left; alone: benchmarks/bench_large.py with these options.
    "bench_large": {"bench_large": ["--gpu-memory-gib", "24", "--plain"]},
}
SHARES_S = {"bench_large": 400}

TESTS = "cuda or row_math or extension or summed_products"  # the last have no parameter by whose name to know them

INFO = """
import json, sys, torch
from fastft import ops
info = {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "build": ops.build_info()}
open(sys.argv[1], "w").write(json.dumps(info, indent=1, default=str))
assert info["build"]["cuda"], info["build"]["cuda_reason"]
assert info["build"]["torch_has_cuda_stream"], "this torch offers no CUDA stream"
print(info["device"], info["torch"], info["build"]["cuda_archs"], "CUTLASS", info["build"]["cutlass"] or "none")
"""


def main() -> int:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--out", type=Path, required=True)
    p.add_argument("--limit-s", type=float, default=540)
    p.add_argument("--skip", default="", help="parts to leave out, comma-separated")
    p.add_argument("--archs", default="90a", help="FASTFT_CUDA_ARCHS of the build here")
    args = p.parse_args()
    args.out = args.out.resolve()
    args.out.mkdir(parents=True, exist_ok=True)
    suite = Suite(args.out, args.limit_s, set(filter(None, args.skip.split(","))))
    python = sys.executable

    if shutil.which("nvcc"):
        # Wheels for machines without a toolkit are built elsewhere; here one architecture is enough.
        env = {"FASTFT_CUDA_ARCHS": args.archs, "FASTFT_CUDA": "1"}
        suite.run("build", [python, "setup.py", "build_ext", "--inplace"], 240, env)
    else:
        # Building would replace an extension that was brought along by one without CUDA.
        suite.note("build", "skipped", 0, "nvcc is not on PATH; using the extension that is there")
    suite.run("info", [python, "-c", INFO, str(args.out / "info.json")], 60)
    suite.run("test_ops", [python, "-m", "pytest", "-q", "tests/ops", "-k", TESTS], 240)
    sanitizer = shutil.which("compute-sanitizer")
    for tool in ("memcheck", "racecheck"):
        if sanitizer:
            suite.run(tool, [sanitizer, "--tool", tool, "--error-exitcode", "9", python, "-c", SANITIZED], 90)
        else:
            suite.note(tool, "skipped", 0, "compute-sanitizer is not on PATH")
    for bench, parts in BENCHES.items():
        for part, options in parts.items():
            command = [python, str(ROOT / f"benchmarks/{bench}.py"), "--device", "cuda"]
            command += ["--json", str(args.out / f"{part}.json"), *options]
            suite.run(part, command, SHARES_S.get(part, 150 if part == bench else 60))
    suite.run("test_trainer", [python, "-m", "pytest", "-q", "tests/models", "tests/methods", "tests/engine"], 240)
    model = args.out / "opt-1.3b"
    suite.run("model", [python, str(ROOT / "benchmarks/random_model.py"), "opt-1.3b", str(model)], 60)
    train = [python, "-m", "deepspeed.launcher.runner", "--num_gpus", "1", "fastft/train.py"]
    train += ["--cfg", "configs/quickstart.yaml", f"model.name_or_path={model}", "model.random_weights=true"]
    train += ["queries.self_study.count=0", "queries.passages.stride=8", "train.steps=20", "train.batch_size=32"]
    for kind, stage in (("lora", 0), ("lora", 3), ("bitfit", 3)):
        name = f"train_{kind}_zero{stage}"
        own = [f"peft.kind={kind}", f"deepspeed.zero_stage={stage}", f"output_dir={args.out / name}"]
        suite.run(name, [*train, *own, f"cache_dir={args.out / 'cache'}"], 90)
    shutil.rmtree(args.out / "cache", ignore_errors=True)

    suite.write()
    bad = [p for p in suite.parts if p.status in ("failed", "timeout")]
    for part in bad:
        print(f"{part.status.upper()}: {part.name} ({part.detail}); see {args.out / part.name}.log")
    print(f"{len(suite.parts) - len(bad)} of {len(suite.parts)} parts without failure; {args.out / 'summary.json'}")
    return 1 if bad else 0


if __name__ == "__main__":
    raise SystemExit(main())
