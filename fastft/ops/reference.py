"""The ops' mathematics in plain PyTorch: the truth for tests, and the clearest statement of what each is.

Differentiable by autograd, any device, any floating dtype; in the losses float64 inputs give float64 arithmetic,
everything else float32. Every function has the signature and the conventions of its op (0 log 0 = 0; a row of weight 0
is left out; a mean over no weight at all is 0).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def _compute_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """sum_j p_j (log p_j - log q_j), 0 (...) = 0; masked before the product, so gradients stay finite."""
    zero = log_p.exp() == 0
    difference = log_p.masked_fill(zero, 0) - log_q.masked_fill(zero, 0)
    return (log_p.exp() * difference).sum(-1)


def _reduce(values: Tensor, weights: Tensor | None, reduction: str) -> Tensor:
    weights = torch.ones_like(values) if weights is None else weights.to(values.dtype)
    weighted = torch.where(weights == 0, torch.zeros_like(values), values) * weights
    if reduction == "none":
        return weighted
    total = weighted.sum()
    if reduction == "mean":
        mass = weights.sum()
        total = total / mass if mass != 0 else total * 0
    return total


def log_softmax_kl(
    student_logits: Tensor, teacher_logits: Tensor, *, temperature: float = 1.0, direction: str = "forward",
    beta: float = 0.5, weights: Tensor | None = None, reduction: str = "mean",
) -> Tensor:  # fmt: skip
    dtype = _compute_dtype(student_logits)
    log_s = torch.log_softmax(student_logits.to(dtype) / temperature, -1)
    log_t = torch.log_softmax(teacher_logits.detach().to(dtype) / temperature, -1)
    if direction == "forward":
        kl = _kl(log_t, log_s)
    elif direction == "reverse":
        kl = _kl(log_s, log_t)
    else:
        mixture = beta * log_t.exp() + (1 - beta) * log_s.exp()
        log_m = mixture.masked_fill(mixture == 0, 1).log()
        kl = beta * _kl(log_t, log_m) + (1 - beta) * _kl(log_s, log_m)
    return _reduce(kl * temperature**2, weights, reduction)


def linear_log_softmax_kl(
    student_hidden: Tensor, teacher_hidden: Tensor, weight: Tensor, *, teacher_weight: Tensor | None = None,
    chunk_rows: int | None = None, **options,
) -> Tensor:  # fmt: skip
    teacher_weight = weight.detach() if teacher_weight is None else teacher_weight
    return log_softmax_kl(student_hidden @ weight.t(), teacher_hidden @ teacher_weight.t(), **options)


def linear_topk_kl(
    student_hidden: Tensor, weight: Tensor, topk_ids: Tensor, topk_log_probs: Tensor, *, tail: bool = True,
    direction: str = "forward", chunk_rows: int | None = None, **options,
) -> Tensor:  # fmt: skip
    ids = topk_ids.to(torch.int64)
    dtype = _compute_dtype(student_hidden)
    logits = (student_hidden @ weight.t()).to(dtype)
    student, teacher = logits.gather(-1, ids), topk_log_probs.to(dtype)
    if tail and ids.shape[-1] < weight.shape[0]:
        rest = logits.scatter(-1, ids, -torch.inf).logsumexp(-1, keepdim=True)
        mass = teacher.double().exp().sum(-1, keepdim=True)
        left = (1 - mass).clamp_min(2.0**-24 if direction == "reverse" else 0)
        student, teacher = torch.cat([student, rest], -1), torch.cat([teacher, left.log().to(dtype)], -1)
    return log_softmax_kl(student, teacher, direction=direction, **options)


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, labels: Tensor, *, ignore_index: int = -100, reduction: str = "mean",
    chunk_rows: int | None = None,
) -> Tensor:  # fmt: skip
    counted = labels != ignore_index
    logits = (hidden @ weight.t()).to(_compute_dtype(hidden))
    index = torch.where(counted, labels, 0).to(torch.int64)
    nll = logits.logsumexp(-1) - logits.gather(-1, index[..., None])[..., 0]
    return _reduce(nll, counted, reduction)


def lora_linear(
    x: Tensor, weight: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float, bias: Tensor | None = None,
) -> Tensor:  # fmt: skip
    return torch.nn.functional.linear(x, weight, bias) + scaling * (x @ lora_A.t()) @ lora_B.t()


def bias_adamw(
    params: list[Tensor], grads: list[Tensor], state: list[dict[str, Tensor]], hyperparameters: list[float], *,
    grad_scale: Tensor | None = None, found_inf: Tensor | None = None, max_grad_norm: float = 0.0,
    skip_non_finite: bool = False,
) -> Tensor:  # fmt: skip
    """In place, with each tensor's state apart: step, exp_avg, exp_avg_sq, and master_param where there is one.

    hyperparameters: lr, beta1, beta2, eps, weight_decay of all tensors. Returns the norm of all gradients.
    """
    lr, beta1, beta2, eps, weight_decay = hyperparameters
    dtype = _compute_dtype(params[0])
    scale = 1.0 if grad_scale is None else grad_scale.to(dtype)
    grads = [g.to(dtype) / scale for g in grads]
    norm = torch.stack([g.norm() for g in grads]).norm()
    checked = max_grad_norm > 0 or skip_non_finite
    if (checked and not norm.isfinite()) or (found_inf is not None and found_inf != 0):
        return norm
    clip = (max_grad_norm / (norm + 1e-6)).clamp_max(1) if max_grad_norm > 0 else 1.0
    for p, g, s in zip(params, grads, state, strict=True):
        g = g * clip
        s["step"] += 1
        step = s["step"].item()
        s["exp_avg"] += (1 - beta1) * (g - s["exp_avg"])
        s["exp_avg_sq"].copy_(beta2 * s["exp_avg_sq"] + (1 - beta2) * g * g)
        new = s.get("master_param", p).to(dtype) * (1 - lr * weight_decay)
        denominator = s["exp_avg_sq"].sqrt() / (1 - beta2**step) ** 0.5 + eps
        new -= lr / (1 - beta1**step) * s["exp_avg"] / denominator
        p.copy_(new)
        if "master_param" in s:
            s["master_param"].copy_(new)
    return norm


def adamw_decode(state: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """(exp_avg, exp_avg_sq) of a tensor's 8-bit state (csrc/include/fastft/adamw_math.h), in its scales' dtype."""

    def expand(scale):
        return scale.repeat_interleave(256)[: state["exp_avg"].numel()].view(state["exp_avg"].shape)

    code1, code2 = (state[name].to(state["exp_avg_scale"].dtype) for name in ("exp_avg", "exp_avg_sq"))
    root = (code2 / 254.99) ** 2 * expand(state["exp_avg_sq_scale"])
    return (code1 / 127) ** 4 * code1.sign() * expand(state["exp_avg_scale"]), root * root


def adamw_encode(exp_avg: Tensor, exp_avg_sq: Tensor) -> dict[str, Tensor]:
    """8-bit state of these float32 moments, one scale for 256 elements, with `adamw_decode`'s keys.

    exp_avg_sq is rounded to nearest here: what is encoded once needs no dither.
    """

    def scaled(x):
        blocks = F.pad(x.reshape(-1), (0, -x.numel() % 256)).view(-1, 256)
        scale = blocks.abs().amax(1)
        return (blocks / scale.clamp_min(torch.finfo(x.dtype).tiny)[:, None]).reshape(-1)[: x.numel()], scale

    average, scale = scaled(exp_avg)
    root, root_scale = scaled(exp_avg_sq.sqrt())
    return {
        "exp_avg": (127 * average.abs().sqrt().sqrt()).round().mul(average.sign()).to(torch.int8).view(exp_avg.shape),
        "exp_avg_sq": (254.99 * root.sqrt()).round().clamp(1, 255).to(torch.uint8).view(exp_avg.shape),
        "exp_avg_scale": scale,
        "exp_avg_sq_scale": root_scale,
    }


def attention(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor | None = None, *,
    seqused_k: Tensor | None = None, prefix_k: Tensor | None = None, prefix_v: Tensor | None = None, scale: float,
    is_causal: bool = True,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    q_ends = cu_seqlens_q.tolist()
    k_starts = q_ends if cu_seqlens_k is None else cu_seqlens_k.tolist()
    k_ends = k_starts[1:]
    if seqused_k is not None:
        k_ends = [start + used for start, used in zip(k_starts, seqused_k.tolist(), strict=False)]
    before = 0 if prefix_k is None else len(prefix_k)
    outs, lses = [q.new_empty(0, *q.shape[1:])], [q.new_empty(q.shape[1], 0, dtype=_compute_dtype(q))]
    for i in range(len(q_ends) - 1):
        own_q = q[q_ends[i] : q_ends[i + 1]].transpose(0, 1)
        keys, values = (
            torch.cat([p, x] if before else [x]).repeat_interleave(q.shape[1] // k.shape[1], 1).transpose(0, 1)
            for p, x in ((prefix_k, k[k_starts[i] : k_ends[i]]), (prefix_v, v[k_starts[i] : k_ends[i]]))
        )
        scores = (own_q @ keys.transpose(1, 2)).to(_compute_dtype(q)) * scale
        if is_causal:
            queries, seen = scores.shape[1:]
            visible = torch.ones(queries, seen, dtype=torch.bool, device=q.device).tril(seen - queries)
            visible[:, :before] = True
            scores = scores.masked_fill(~visible, -torch.inf)
        lses.append(scores.logsumexp(-1))
        weights = (scores - lses[-1][..., None]).exp().nan_to_num(0) if scores.isneginf().any() else scores.softmax(-1)
        outs.append((weights.to(v.dtype) @ values).transpose(0, 1))
    return torch.cat(outs), torch.cat(lses, 1)


def relu(x: Tensor) -> Tensor:
    return x.clamp_min(0)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    wide = x.to(_compute_dtype(x))
    normalised = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return weight * normalised.to(x.dtype)


def rotary(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    rotated = cos.shape[-1]

    def rotate(x: Tensor) -> Tensor:
        x1, x2 = x[..., :rotated].chunk(2, -1)
        (c1, c2), (s1, s2) = (angles[:, None].chunk(2, -1) for angles in (cos, sin))
        return torch.cat((x1 * c1 - x2 * s1, x2 * c2 + x1 * s2, x[..., rotated:]), -1)

    return rotate(q), rotate(k)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    return F.silu(gate) * up
