"""log_softmax_kl, linear_log_softmax_kl, linear_topk_kl and linear_cross_entropy against their peers.

python benchmarks/bench_kl.py --device cpu
python benchmarks/bench_kl.py --device cuda --model opt-30b --rows 64 512 2048 8192 --json kl.json

`eager` is PyTorch all in the inputs' dtype, `eager_float32` the same with the softmax in float32 (what we compare
accuracy with), `compile` torch.compile of the latter, `three_products` only the matrix products that the fused op
cannot do without. Liger's fused distillation always computes the head's weight gradient as well, and its divergences
take log-probabilities: `liger` is torch's log_softmax and Liger's kernel. `cce` is cut-cross-entropy, which leaves out
gradients below a threshold. On a CPU Liger has the chunked loss alone, and `cce` is not run.
"""

from __future__ import annotations

import argparse
import functools
import math
import sys
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent))
import common

import fastft.ops as ops
from fastft.ops import reference

# hidden size and vocabulary of the head
MODELS = {
    "opt-125m": (768, 50272),
    "opt-1.3b": (2048, 50272),
    "opt-30b": (7168, 50272),
    "llama-3-8b": (4096, 128256),
}


def kl_loss(student, teacher, dtype=None, direction="forward"):
    student, teacher = F.log_softmax(student, -1, dtype=dtype), F.log_softmax(teacher, -1, dtype=dtype)
    kl = functools.partial(F.kl_div, log_target=True, reduction="batchmean")
    if direction == "forward":
        return kl(student, teacher)
    if direction == "reverse":
        return kl(teacher, student)
    mixture = torch.logaddexp(student, teacher) - math.log(2)
    return (kl(mixture, teacher) + kl(mixture, student)) / 2


def with_gradient(loss, leaf):
    """(loss, gradient) of a function of one leaf."""

    def run():
        value = loss(leaf)
        value.backward()
        gradient, leaf.grad = leaf.grad, None
        return value.detach(), gradient

    return run


def without_gradient(loss, leaf):
    def run():
        with torch.no_grad():
            return (loss(leaf),)

    return run


def liger():
    """The installed Liger-Kernel, or None."""
    try:
        import liger_kernel.chunked_loss
        import liger_kernel.transformers
    except ImportError:
        return None
    return liger_kernel


def cut_cross_entropy():
    """The installed cut-cross-entropy, or None."""
    try:
        import cut_cross_entropy
    except ImportError:
        return None
    return cut_cross_entropy


def compiled(args, function):
    return {} if args.no_compile else {"compile": torch.compile(function)}


def exact(*tensors):
    """As the truth has them: it is computed in float32 of 16 bits, in float64 of float32."""
    return [t.double() if t.dtype == torch.float32 else t for t in tensors]


def tolerance(args, *peers):
    """Of peers whose softmax is in the dtype itself; in float32 a sum over the vocabulary has an error of its own."""
    summed = {"eager_float32": 1e-4, "compile": 1e-4} if args.dtype == "float32" else {}
    return summed | dict.fromkeys(peers, 0.2)


def log_softmax_kl(args, mode, direction="forward"):
    dtype = common.DTYPES[args.dtype]
    torch.manual_seed(0)
    teacher = (torch.randn(args.rows, args.vocab, device=args.device) * 3).to(dtype)
    student = (teacher + torch.randn(args.rows, args.vocab, device=args.device)).to(dtype).requires_grad_()
    wrap = with_gradient if mode == "forward+backward" else without_gradient
    eager = functools.partial(kl_loss, teacher=teacher, direction=direction)
    float32 = functools.partial(eager, dtype=torch.float32)
    losses = {
        "eager": eager,
        "eager_float32": float32,
        **compiled(args, float32),
        "fastft": lambda s: ops.log_softmax_kl(s, teacher, direction=direction),
    }
    if (package := liger()) and args.device == "cuda":
        if direction == "forward":
            kernel = package.transformers.LigerKLDIVLoss(log_target=True, reduction="batchmean")
        else:  # generalised JSD, whose ends are the two KL
            kernel = package.transformers.LigerJSD(beta={"reverse": 1.0, "jsd": 0.5}[direction])
        losses["liger"] = lambda s: kernel(F.log_softmax(s, -1), F.log_softmax(teacher, -1))
    passes = 5 if mode == "forward+backward" else 2  # forward reads two tensors; backward reads two, writes one
    return common.Case(
        name=f"log_softmax_kl {mode}" if direction == "forward" else f"log_softmax_kl {direction} {mode}",
        shape={"rows": args.rows, "vocab": args.vocab},
        implementations={name: wrap(loss, student) for name, loss in losses.items()},
        reference=wrap(lambda s: reference.log_softmax_kl(*exact(s, teacher), direction=direction), student),
        bytes=passes * student.numel() * student.element_size(),
        # log_softmax in the dtype itself has an error of its own, which is what `fastft` avoids
        tolerance=tolerance(args, "eager", "liger"),
    )


def head(args):
    dtype = common.DTYPES[args.dtype]
    torch.manual_seed(0)
    weight = (torch.randn(args.vocab, args.hidden, device=args.device) / args.hidden**0.5 * 3).to(dtype)
    teacher = torch.randn(args.rows, args.hidden, device=args.device).to(dtype)
    student = (teacher + 0.3 * torch.randn(args.rows, args.hidden, device=args.device)).to(dtype).requires_grad_()
    return student, teacher, weight


def products(args, count):
    """FLOPs of that many products of [rows, hidden] with the head, and the head's bytes for each read."""
    return 2.0 * count * args.rows * args.hidden * args.vocab


def linear_log_softmax_kl(args):
    student, teacher, weight = head(args)

    def eager(h, dtype=None):
        return kl_loss(F.linear(h, weight), F.linear(teacher, weight), dtype)

    logits = torch.empty(args.rows, args.vocab, device=args.device, dtype=weight.dtype).normal_()

    def three_products():
        with torch.no_grad():
            return F.linear(student, weight), F.linear(teacher, weight), logits @ weight

    float32 = functools.partial(eager, dtype=torch.float32)
    implementations = {
        "three_products": three_products,
        **{
            name: with_gradient(loss, student)
            for name, loss in {
                "eager": eager,
                "eager_float32": float32,
                **compiled(args, float32),
                "fastft": lambda h: ops.linear_log_softmax_kl(h, teacher, weight),
            }.items()
        },
    }
    if package := liger():
        loss = package.chunked_loss.LigerFusedLinearJSDLoss(
            weight_hard_loss=0.0, weight_soft_loss=1.0, beta=0.0, compiled=args.device == "cuda", chunk_size=256
        )
        labels = torch.zeros(args.rows, dtype=torch.int64, device=args.device)
        implementations["liger"] = with_gradient(lambda h: loss(h, weight, teacher, weight, labels), student)
        if args.device == "cuda":
            triton = package.transformers.LigerFusedLinearJSD(jsd_beta=0.0)
            implementations["liger_triton"] = with_gradient(lambda h: triton(h, weight, teacher, weight, None), student)
    return common.Case(
        name="linear_log_softmax_kl forward+backward",
        shape={"rows": args.rows, "hidden": args.hidden, "vocab": args.vocab},
        implementations=implementations,
        reference=with_gradient(lambda h: reference.linear_log_softmax_kl(*exact(h, teacher, weight)), student),
        bytes=2.0 * weight.numel() * weight.element_size(),
        flops=products(args, 3),
        tolerance=tolerance(args, "eager", "liger", "liger_triton"),
        not_peers=("three_products",),
    )


def linear_cross_entropy(args):
    student, teacher, weight = head(args)
    labels = F.linear(teacher, weight).argmax(-1)
    labels[::7] = -100

    def eager(h, upcast=False):
        logits = F.linear(h, weight)
        return F.cross_entropy(logits.float() if upcast else logits, labels)

    float32 = functools.partial(eager, upcast=True)
    losses = {
        "eager": eager,
        "eager_float32": float32,
        **compiled(args, float32),
        "fastft": lambda h: ops.linear_cross_entropy(h, weight, labels),
    }
    if hasattr(F, "linear_cross_entropy"):
        losses["torch_fused"] = lambda h: F.linear_cross_entropy(h, weight, labels)
    if (package := liger()) and args.device == "cuda":
        kernel = package.transformers.LigerFusedLinearCrossEntropyLoss()
        losses["liger"] = lambda h: kernel(weight, h, labels)
    if (cut := cut_cross_entropy()) and args.device == "cuda":
        losses["cce"] = lambda h: cut.linear_cross_entropy(h, weight, labels)
    return common.Case(
        name="linear_cross_entropy forward+backward",
        shape={"rows": args.rows, "hidden": args.hidden, "vocab": args.vocab},
        implementations={name: with_gradient(loss, student) for name, loss in losses.items()},
        reference=with_gradient(lambda h: reference.linear_cross_entropy(*exact(h, weight), labels), student),
        bytes=2.0 * weight.numel() * weight.element_size(),
        flops=products(args, 2),
        tolerance=tolerance(args, "eager", "torch_fused", "liger", "cce"),
    )


def linear_topk_kl(args, tail=True, direction="forward"):
    student, teacher, weight = head(args)
    log_probs, ids = torch.log_softmax(F.linear(teacher, weight).float(), -1).topk(args.k, -1)
    labels = ids[:, 0].contiguous()

    truth = functools.partial(reference.linear_topk_kl, tail=tail, direction=direction)

    def eager(h):
        return truth(h, weight, ids, log_probs)

    losses = {
        "linear_cross_entropy": lambda h: ops.linear_cross_entropy(h, weight, labels),
        "eager_float32": eager,
        **compiled(args, eager),
        "fastft": lambda h: ops.linear_topk_kl(h, weight, ids, log_probs, tail=tail, direction=direction),
    }
    variant = ([] if tail else ["no_tail"]) + ([] if direction == "forward" else [direction])
    listed = args.rows * args.k * args.hidden
    return common.Case(
        name=" ".join(["linear_topk_kl", *variant, "forward+backward"]),
        shape={"rows": args.rows, "hidden": args.hidden, "vocab": args.vocab, "k": args.k},
        implementations={name: with_gradient(loss, student) for name, loss in losses.items()},
        reference=with_gradient(lambda h: truth(*exact(h, weight), ids, log_probs), student),
        tolerance=tolerance(args),
        # without the tail, the listed rows of the head are read by two products
        bytes=2.0 * (weight.numel() if tail else min(listed, weight.numel())) * weight.element_size(),
        flops=products(args, 2) if tail else 4.0 * listed,
        not_peers=("linear_cross_entropy",),
    )


def cases_of(args, rows):
    args = argparse.Namespace(**{**vars(args), "rows": rows})
    return [
        functools.partial(log_softmax_kl, args, "forward"),
        functools.partial(log_softmax_kl, args, "forward+backward"),
        functools.partial(log_softmax_kl, args, "forward+backward", "reverse"),
        functools.partial(log_softmax_kl, args, "forward+backward", "jsd"),
        functools.partial(linear_log_softmax_kl, args),
        functools.partial(linear_cross_entropy, args),
        functools.partial(linear_topk_kl, args),
        functools.partial(linear_topk_kl, args, direction="reverse"),
        functools.partial(linear_topk_kl, args, direction="jsd"),
        functools.partial(linear_topk_kl, args, tail=False),
    ]


def main() -> int:
    p = common.parser(__doc__.splitlines()[0])
    p.add_argument("--model", default="opt-125m", choices=list(MODELS), help="whose hidden size and vocabulary")
    p.add_argument("--rows", type=int, nargs="+", default=[512])
    p.add_argument("--hidden", type=int, help="instead of the model's")
    p.add_argument("--vocab", type=int, help="instead of the model's")
    p.add_argument("--k", type=int, default=64)
    args = p.parse_args()
    hidden, vocab = MODELS[args.model]
    args.hidden, args.vocab = args.hidden or hidden, args.vocab or vocab
    return common.main(args, [case for rows in args.rows for case in cases_of(args, rows)])


if __name__ == "__main__":
    raise SystemExit(main())
