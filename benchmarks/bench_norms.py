"""rms_norm against transformers' module, torch's own function and torch.compile; and a model's step with and without.

python benchmarks/bench_norms.py --device cpu
python benchmarks/bench_norms.py --device cpu --hidden 2048 --tokens 64 256 1024 4096 --only rms_norm
python benchmarks/bench_norms.py --device cuda --json norms.json

Shapes: 300 tokens of SmolLM2 (H 576) and of a Llama of 1B (2,048), 2,048 tokens of an 8B (4,096). Of s bytes an element
forward reads x and writes y, 2 s; backward reads x and dy and writes dx, 3 s. `transformers` is its LlamaRMSNorm,
`compile` the same module through torch.compile, `liger` Liger-Kernel's where it is installed, on a GPU.

"a step": forward and backward, LoRA r 16 on all linear layers, of SmolLM2-135M's 30 layers with random weights on one
sequence of 300 tokens; `transformers` has its norms and is the same otherwise.
"""

from __future__ import annotations

import copy
import functools
import itertools
import sys
from pathlib import Path

import torch
from torch.nn import functional as F
from transformers import AutoModelForCausalLM
from transformers.models.llama.modeling_llama import LlamaRMSNorm

sys.path.insert(0, str(Path(__file__).resolve().parent))
import common

from fastft import peft
from fastft.config import PeftConfig
from fastft.models.attention import PackedSequences, implementation
from fastft.models.causal import PackedCausalLM
from fastft.models.norms import fuse_norms
from fastft.ops import linear_cross_entropy, reference, rms_norm
from fastft.plan.architecture import PUBLISHED

SHAPES = [(300, 576), (300, 2048), (2048, 4096)]
EPS = 1e-5


def liger():
    try:
        from liger_kernel.transformers import LigerRMSNorm
    except ImportError:
        return None
    return LigerRMSNorm


def case(args, shape: tuple[int, int], passes: str, trained: bool) -> common.Case:
    tokens, hidden = shape
    generator = torch.Generator().manual_seed(0)
    x, dy = (torch.randn(shape, generator=generator).to(args.device, common.DTYPES[args.dtype]) for _ in range(2))
    weight = (0.5 + torch.rand(hidden, generator=generator)).to(x)
    leaves = [x.requires_grad_(), weight.requires_grad_()] if trained else [x.requires_grad_()]
    calls = max(1, 2**22 // x.numel())  # one of the small ones is near what the clock's own call takes

    def module(kind, **options):
        norm = kind(hidden, eps=EPS, **options)
        norm.weight = torch.nn.Parameter(weight, requires_grad=False)
        if trained:
            del norm.weight  # the leaf itself, so that all have the gradient of one tensor
            norm.weight = weight
        return norm

    def implementation(function):
        def run():
            for _ in range(calls):
                y = function(x)
                found = (y.detach(),) if passes == "forward" else torch.autograd.grad(y, leaves, dy)
            return found

        return run

    def truth():
        exact = [t.detach().double().requires_grad_() for t in (x, weight)]
        y = reference.rms_norm(*exact, EPS)
        return (y.detach(),) if passes == "forward" else torch.autograd.grad(y, exact[: len(leaves)], dy.double())

    functions = {
        "fastft": lambda x: rms_norm(x, weight, EPS),
        "transformers": module(LlamaRMSNorm),
        "F.rms_norm": lambda x: F.rms_norm(x, (hidden,), weight, EPS),
    }
    if not args.no_compile:
        functions["compile"] = torch.compile(module(LlamaRMSNorm))
    if args.device == "cuda" and (kind := liger()):
        functions["liger"] = module(kind)
    arrays = 2 if passes == "forward" else 5
    return common.Case(
        name=f"rms_norm {passes}{', trained weight' if trained else ''}",
        shape={"tokens": tokens, "hidden": hidden},
        implementations={name: implementation(f) for name, f in functions.items()},
        bytes=arrays * x.nbytes + arrays // 2 * weight.nbytes,
        reference=truth,
        tolerance=dict.fromkeys(functions, 16 * torch.finfo(x.dtype).eps),  # two roundings, and sums of rounded numbers
        units=dict.fromkeys(functions, calls),
    )


def step(args) -> common.Case:
    config = copy.deepcopy(PUBLISHED["smollm2-135m"])
    config.use_cache = False
    torch.manual_seed(0)
    plain = AutoModelForCausalLM.from_config(config, dtype=common.DTYPES[args.dtype]).to(args.device)
    plain.set_attn_implementation(implementation("auto"))
    plain.eval().requires_grad_(False)
    fused = copy.deepcopy(plain)
    fuse_norms(fused)
    ids = torch.randint(config.vocab_size, (1, 300), device=args.device)

    def run(model):
        torch.manual_seed(0)
        trained = peft.inject(model, PeftConfig(kind="lora", r=16))
        for name, p in trained.items():
            if "lora_B" in name:
                torch.nn.init.normal_(p, std=0.02)
        lm = PackedCausalLM(model)

        def forward_and_backward():
            packed = PackedSequences([ids.shape[1]], device=ids.device)
            loss = lm(ids, packed, lambda hidden, head: linear_cross_entropy(hidden, head, ids[0], reduction="mean"))
            gradients = torch.autograd.grad(loss, list(trained.values()))
            return loss.detach(), torch.cat([g.flatten() for g in gradients]).float()

        return forward_and_backward

    weights = sum(p.nbytes for p in plain.parameters())
    return common.Case(
        name="a step",
        shape={"tokens": ids.shape[1], "hidden": config.hidden_size, "layers": config.num_hidden_layers},
        implementations={"fastft": run(fused), "transformers": run(plain)},
        bytes=2 * weights,
        tolerance=dict.fromkeys(("fastft", "transformers"), 0.2),  # gradients through 30 layers that round differently
    )


if __name__ == "__main__":
    p = common.parser(__doc__.splitlines()[0])
    p.add_argument("--hidden", type=int, nargs="+", default=[h for _, h in SHAPES], help="only shapes of these widths")
    p.add_argument("--tokens", type=int, nargs="+", help="numbers of tokens, each at every width, in place of those")
    args = p.parse_args()
    shapes = [shape for shape in SHAPES if shape[1] in args.hidden]
    if args.tokens:
        shapes = list(itertools.product(args.tokens, args.hidden))
    forms = [("forward", False), ("forward+backward", False), ("forward+backward", True)]
    cases = [functools.partial(case, args, shape, *form) for shape in shapes for form in forms]
    sys.exit(common.main(args, [*cases, functools.partial(step, args)]))
