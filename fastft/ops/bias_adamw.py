"""bias_adamw: one AdamW step of many small tensors at once, their state in flat buffers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fastft.ops import _extension
from fastft.ops._common import FLOAT_DTYPES, accumulate_dtype, check_float, check_like, shape_of

# csrc/include/fastft/types.h numbers the element types in this order.
_DTYPE_CODES = {dtype: code for code, dtype in enumerate(FLOAT_DTYPES)}
HYPERPARAMETERS = ("lr", "beta1", "beta2", "eps", "weight_decay")


@dataclass
class AdamWState:
    """Flat AdamW state of a list of tensors: tensor i has elements [offsets[i], offsets[i] + numels[i]).

    exp_avg, exp_avg_sq: [total] in the accumulation dtype (float64 for float64 parameters, else float32), total a
    multiple of the block size. With state_bits=8 they are int8 and uint8 codes, of which a block of 256 shares one
    scale per moment: scales [2 * total / 256], first those of exp_avg.
    master: [total], parameters of which the 16-bit ones are rounded copies; or None.
    steps: [tensors] float32, steps done. status: [3], of the last step: norm of all gradients (where it was asked
    for), the factor they were multiplied with, and 1 where the step was skipped. tickets: the kernel's own.
    """

    offsets: list[int]
    numels: list[int]
    exp_avg: Tensor
    exp_avg_sq: Tensor
    scales: Tensor | None
    master: Tensor | None
    steps: Tensor
    status: Tensor
    tickets: Tensor

    @classmethod
    def zeros(cls, params: Sequence[Tensor], *, state_bits: int = 32, master_weights: bool = False) -> AdamWState:
        """The state before the first step; master weights start as copies of the parameters."""
        block = _extension.load().ADAMW_CODE_BLOCK
        numels = [p.numel() for p in params]
        offsets, total = [], 0
        for numel in numels:
            offsets.append(total)
            total += -(-numel // block) * block
        device, acc = params[0].device, accumulate_dtype(params[0].dtype)
        codes = (torch.int8, torch.uint8) if state_bits == 8 else (acc, acc)

        def flat(n, dtype):
            x = torch.empty(n, dtype=dtype, device=device)
            if x.is_cpu:
                _extension.load().advise_huge_pages(x.data_ptr(), x.nbytes)
            return x.zero_()

        state = cls(
            offsets=offsets,
            numels=numels,
            exp_avg=flat(total, codes[0]),
            exp_avg_sq=flat(total, codes[1]),
            scales=flat(2 * total // block, acc) if state_bits == 8 else None,
            master=flat(total, acc) if master_weights and any(p.itemsize == 2 for p in params) else None,
            steps=flat(len(params), torch.float32),
            status=flat(3, acc),
            tickets=flat(2, torch.int32),
        )
        if state.master is not None:
            copies = [state.master[o : o + n] for o, n in zip(offsets, numels, strict=True)]
            torch._foreach_copy_(copies, [p.detach().reshape(-1) for p in params])
        return state

    def views(self, i: int, like: Tensor) -> dict[str, Tensor]:
        """Tensor i's state, under torch.optim.AdamW's names, as views of the flat buffers.

        step [], exp_avg and exp_avg_sq like the parameter; with 8-bit state also exp_avg_scale and
        exp_avg_sq_scale [blocks]; with master weights and a 16-bit parameter also master_param.
        """
        begin, end = self.offsets[i], self.offsets[i] + self.numels[i]
        views = {"step": self.steps[i]}
        for name in ("exp_avg", "exp_avg_sq"):
            views[name] = getattr(self, name)[begin:end].view(like.shape)
        if self.scales is not None:
            block = _extension.load().ADAMW_CODE_BLOCK
            scales = self.scales.view(2, -1)[:, begin // block : -(-end // block)]
            views["exp_avg_scale"], views["exp_avg_sq_scale"] = scales.unbind()
        if self.master is not None and like.itemsize == 2:
            views["master_param"] = self.master[begin:end].view(like.shape)
        return views


@dataclass
class AdamWPlan:
    """Which tensors of a state a step updates, and how they are cut into chunks; made once, used every step.

    plan: int64 on the CPU, device_plan the same where the state is: a row of AdamWTensor (bias_adamw.h) for each
    tensor, then each chunk's tensor. partials: [chunks] scratch.
    """

    plan: Tensor
    device_plan: Tensor
    partials: Tensor

    @classmethod
    def make(cls, state: AdamWState, params: Sequence[Tensor], indices: Sequence[int],
             group_sizes: Sequence[int]) -> AdamWPlan:  # fmt: skip
        """For params, the tensors `indices` of the state, of which the first group_sizes[0] form group 0, and so on."""
        chunk = _extension.load().ADAMW_CHUNK
        groups = [group for group, size in enumerate(group_sizes) for _ in range(size)]
        rows, chunk_tensors = [], []
        for i, (param, index, group) in enumerate(zip(params, indices, groups, strict=True)):
            numel = state.numels[index]
            rows += [state.offsets[index], numel, group, index, len(chunk_tensors), _DTYPE_CODES[param.dtype]]
            chunk_tensors += [i] * -(-numel // chunk)
        plan = torch.tensor(rows + chunk_tensors, dtype=torch.int64)
        partials = torch.empty(len(chunk_tensors), dtype=state.status.dtype, device=state.status.device)
        return cls(plan, plan.to(state.status.device), partials)


def bias_adamw(
    params: list[Tensor],
    grads: list[Tensor],
    state: AdamWState,
    plan: AdamWPlan,
    hyperparameters: list[float],
    *,
    lr: Tensor | None = None,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
    max_grad_norm: float = 0.0,
    skip_non_finite: bool = False,
) -> None:
    """One step of torch.optim.AdamW for all tensors in one launch (two with clipping or a check), in place.

    Equals, without waiting for the device and without changing the gradients::

        grads = [g / grad_scale for g in grads]
        norm = clip_grad_norm_(grads, max_grad_norm)      # where max_grad_norm > 0
        if found_inf == 0 and (norm.isfinite() or not (max_grad_norm or skip_non_finite)):
            for p, g, m, v, step in ...:
                step += 1
                p *= 1 - lr * weight_decay
                m += (1 - beta1) * (g - m)
                v = beta2 * v + (1 - beta2) * g * g
                p -= lr / (1 - beta1**step) * m / (sqrt(v) / sqrt(1 - beta2**step) + eps)

    params, grads: equally many tensors, each pair of one shape and dtype (float64 on the CPU only and not beside
    others, float32, bfloat16, float16), contiguous, on one device. state, plan: AdamWState, AdamWPlan.
    hyperparameters: lr, beta1, beta2, eps, weight_decay of each group in turn.
    lr: float32 [groups] on the device, instead of the numbers. grad_scale, found_inf: float32, one element, as
    torch.amp.GradScaler has them. max_grad_norm: 0 does not clip. skip_non_finite: skip the step where the norm of
    the gradients is not finite; clipping does so too.

    Arithmetic is in float32, float64 for float64. Two runs agree bit for bit, with any number of threads.
    state.status tells the norm, and whether the step was skipped (parameters, state and step counts stay).
    Raises ValueError where params or grads do not fit, RuntimeError without the extension.
    Loshchilov & Hutter 2019, https://arxiv.org/abs/1711.05101; the 8-bit state: csrc/include/fastft/adamw_math.h.
    """
    _extension.load()

    def run():
        torch.ops.fastft.bias_adamw.default(
            params, grads, state.exp_avg, state.exp_avg_sq, state.scales, state.master, state.steps, state.status,
            plan.partials, state.tickets, plan.plan, plan.device_plan, hyperparameters, lr, grad_scale, found_inf,
            max_grad_norm, skip_non_finite,
        )  # fmt: skip

    with torch.no_grad():
        try:
            run()
        except RuntimeError:
            # Looking at hundreds of tensors in Python would cost more than the step: only once something is wrong.
            check_tensors("bias_adamw", params, grads)
            if all(g.is_contiguous() for g in grads):
                raise
            grads = [g.contiguous() for g in grads]
            run()
    # A C++ op does not do it by itself.
    torch.autograd.graph.increment_version(params)


def check_params(op: str, params: Sequence[Tensor], like: Tensor | None = None) -> None:
    """Raises ValueError on a parameter that the kernel does not take, or not together with `like` (the first one)."""
    for i, p in enumerate(params):
        name = f"params[{i}]"
        check_float(op, name, p)
        like = p if like is None else like
        check_like(op, name, p, "the first one", like, dtype=False)
        if (p.dtype == torch.float64) != (like.dtype == torch.float64):
            raise ValueError(f"{op}: {name} is {p.dtype} beside {like.dtype}; float64 cannot be mixed with others")
        if p.dtype == torch.float64 and p.is_cuda:
            raise ValueError(f"{op}: {name} is float64 on {p.device}; float64 is a CPU dtype")
        if p.layout != torch.strided or not p.is_contiguous():
            kind = f"{p.layout}" if p.layout != torch.strided else f"not contiguous, with strides {list(p.stride())}"
            raise ValueError(f"{op}: {name} is {kind}; expected a dense tensor, contiguous in memory")


def check_tensors(op: str, params: Sequence[Tensor], grads: Sequence[Tensor]) -> None:
    """Raises ValueError on the first parameter or gradient that the kernel does not take."""
    if len(grads) != len(params):
        raise ValueError(f"{op}: grads has {len(grads)} tensors, expected {len(params)} like params")
    check_params(op, params)
    for i, (p, g) in enumerate(zip(params, grads, strict=True)):
        name = f"grads[{i}]"
        check_like(op, name, g, f"params[{i}]", p)
        if g.layout != torch.strided:
            raise ValueError(f"{op}: {name} is {g.layout}, expected a dense tensor; turn sparse gradients off")
        if g.shape != p.shape:
            raise ValueError(f"{op}: {name} is {shape_of(g)}, expected {shape_of(p)} like params[{i}]")


def register() -> None:
    """Completes the C++ op with its fake; called once, when the extension is loaded."""
    torch.library.register_fake("fastft::bias_adamw")(lambda *args: None)
