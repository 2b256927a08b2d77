"""BiasAdamW: AdamW for models whose trained parameters are many and small."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor

from fastft.ops import bias_adamw
from fastft.ops.bias_adamw import AdamWPlan, AdamWState, check_params

_NAME = "BiasAdamW"
# More combinations of parameters with a gradient than this are not worth remembering.
_MAX_PLANS = 64
# Hundreds of attributes a step: map over this takes half the time of a loop.
_grad_of = attrgetter("grad")


class BiasAdamW(torch.optim.Optimizer):
    """torch.optim.AdamW in one launch for all tensors, with the state in flat buffers.

    The update is that of ``fastft.ops.bias_adamw``; in float32 it agrees with torch.optim.AdamW to rounding.

    params, lr (a number or a tensor), betas, eps, weight_decay: as in torch.optim.AdamW, also per group.
    state_bits: 32, or 8: 8-bit codes with one scale for 256 elements and moment, 2.03 bytes a parameter.
    master_weights: keep a float32 copy of bfloat16 and float16 parameters and round it into them; who changes such a
    parameter by other means after the first step must change ``state[p]["master_param"]`` as well.
    max_grad_norm: clip the global norm of the gradients to this, as torch.nn.utils.clip_grad_norm_ does (the
    gradients themselves stay as they are); 0 does not. Under ZeRO leave it to the engine, which sees all ranks.
    skip_non_finite: leave everything as it is where the norm is not finite; clipping does so in any case.

    Parameters: dense, contiguous, float32, bfloat16, float16 (float64 on the CPU and not beside others), on one device.
    One whose gradient is None is left alone. 32-bit state has torch.optim.AdamW's keys, shapes and meaning, so either
    loads the other's state_dict (a 16-bit parameter's state is float32 here). 8-bit state is kept under the same keys
    as integers, beside ``exp_avg_scale`` and ``exp_avg_sq_scale`` (csrc/include/fastft/adamw_math.h decodes them).
    ``state`` holds views of the flat buffers: change it by writing into them, by load_state_dict, or as a whole.

    Works with closures, schedulers, torch.amp.GradScaler (unscaling and skipping on the device), and as DeepSpeed's
    client optimizer under ZeRO-0 to 3. Nothing waits for the device; with a tensor lr a CUDA graph captures the step.
    Raises ValueError on an option or tensor that does not fit.
    """

    _step_supports_amp_scaling = True

    def __init__(
        self,
        params: Iterable,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        state_bits: int = 32,
        *,
        master_weights: bool = False,
        max_grad_norm: float = 0.0,
        skip_non_finite: bool = False,
    ):
        if state_bits not in (8, 32):
            raise ValueError(f"{_NAME}: state_bits is {state_bits!r}, expected 8 or 32")
        if not (max_grad_norm >= 0 and math.isfinite(max_grad_norm)):
            raise ValueError(f"{_NAME}: max_grad_norm is {max_grad_norm}, expected a finite number, 0 or above")
        self.state_bits, self.master_weights = state_bits, master_weights
        self.max_grad_norm, self.skip_non_finite = float(max_grad_norm), skip_non_finite
        self._forget_layout()
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @property
    def grad_norm(self) -> Tensor | None:
        """Norm of all gradients of the last step, unscaled, before clipping: [] on the device.

        None before the first step, and where neither clipping nor the check asks for it.
        """
        wanted = self._flat is not None and (self.max_grad_norm > 0 or self.skip_non_finite)
        return self._flat.status[0] if wanted else None

    @property
    def step_skipped(self) -> Tensor | None:
        """1 where the last step left everything alone, else 0: [] on the device. None before the first step."""
        return None if self._flat is None else self._flat.status[2]

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            _check_group(group)
            check_params(_NAME, group["params"], like=next((p for g in self.param_groups for p in g["params"]), None))
        except ValueError:
            self.param_groups.pop()
            raise

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step; returns what closure, called first with gradients on, returns."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        params, grads, group_sizes, hyperparameters = [], [], [], []
        device_lr = False
        for group in self.param_groups:
            group_params = group["params"]
            group_grads = list(map(_grad_of, group_params))
            if type(None) in set(map(type, group_grads)):
                group_params = [p for p in group_params if p.grad is not None]
                group_grads = list(map(_grad_of, group_params))
            params += group_params
            grads += group_grads
            group_sizes.append(len(group_params))
            lr, (beta1, beta2) = group["lr"], group["betas"]
            if isinstance(lr, Tensor) and lr.is_cuda:
                device_lr, lr = True, 0.0
            hyperparameters += [float(lr), beta1, beta2, group["eps"], group["weight_decay"]]
        if not params:
            return loss
        plan = self._plan(params, group_sizes)
        bias_adamw(
            params,
            grads,
            self._flat,
            plan,
            hyperparameters,
            lr=self._device_lr() if device_lr else None,
            # torch.amp.GradScaler sets these around step() and deletes them afterwards.
            grad_scale=getattr(self, "grad_scale", None),
            found_inf=getattr(self, "found_inf", None),
            max_grad_norm=self.max_grad_norm,
            skip_non_finite=self.skip_non_finite,
        )
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As in torch; the state keeps its own dtype. Raises ValueError where its width is another one."""
        # torch would cast the state to the parameter's dtype. What it does not know it passes on as it is.
        state = {k: _Opaque(v) if isinstance(v, dict) else v for k, v in state_dict["state"].items()}
        before = self.__dict__.copy()
        try:
            super().load_state_dict({**state_dict, "state": state})
        except Exception:
            self.__dict__.update(before)
            raise

    def __getstate__(self) -> dict[str, Any]:
        options = ("state_bits", "master_weights", "max_grad_norm", "skip_non_finite")
        return {**super().__getstate__(), **{name: getattr(self, name) for name in options}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for p, values in self.state.items():
            if isinstance(values, _Opaque):
                self.state[p] = values.value
        self._forget_layout()
        kept = [p for group in self.param_groups for p in group["params"] if self.state.get(p)]
        if kept:
            self._lay_out(kept)

    def _forget_layout(self) -> None:
        self._flat: AdamWState | None = None
        self._index: dict[Tensor, int] = {}
        self._views: dict[Tensor, Tensor] = {}  # each parameter's exp_avg
        self._plans: dict[tuple, AdamWPlan] = {}

    def _plan(self, params: list[Tensor], group_sizes: list[int]) -> AdamWPlan:
        # Loading by hand, as DeepSpeed does, replaces the state of all parameters; looking at one is enough.
        first = params[0]
        replaced = self.state.get(first, {}).get("exp_avg") is not self._views.get(first)
        replaced |= len(self.state) != len(self._index)
        # The parameters in a layout are alive, so their ids are theirs.
        key = (tuple(group_sizes), tuple(map(id, params)))
        plan = None if replaced else self._plans.get(key)
        if plan is None:
            if replaced or any(p not in self._index for p in params):
                # DeepSpeed puts another flat tensor into the group for each step: those that were there stay.
                self._lay_out(list(dict.fromkeys([*self.state, *params])))
            if len(self._plans) >= _MAX_PLANS:
                self._plans.clear()
            plan = AdamWPlan.make(self._flat, params, [self._index[p] for p in params], group_sizes)
            self._plans[key] = plan
        return plan

    def _lay_out(self, params: list[Tensor]) -> None:
        """Flat buffers for these parameters, with what self.state holds of them; its tensors become views."""
        check_params(_NAME, params)
        flat = AdamWState.zeros(params, state_bits=self.state_bits, master_weights=self.master_weights)
        for i, p in enumerate(params):
            old, views = self.state.get(p, {}), flat.views(i, p)
            for name, view in views.items():
                if name in old:
                    _check_state(name, old[name], view)
                    view.copy_(torch.as_tensor(old[name]).reshape(view.shape))
                elif old and name != "master_param":
                    raise ValueError(f"{_NAME}: the state of a parameter has no {name}, expected {', '.join(views)}")
            self.state[p] = {**old, **views}
        self._forget_layout()
        self._flat = flat
        self._index = {p: i for i, p in enumerate(params)}
        self._views = {p: self.state[p]["exp_avg"] for p in params}

    def _device_lr(self) -> Tensor:
        device = self._flat.status.device
        return torch.stack(
            [torch.as_tensor(g["lr"], dtype=torch.float32, device=device).reshape(()) for g in self.param_groups]
        )


class _Opaque:
    def __init__(self, value: dict[str, Any]):
        self.value = value


def _check_group(group: dict[str, Any]) -> None:
    lr, betas, eps, weight_decay = (group[k] for k in ("lr", "betas", "eps", "weight_decay"))
    if isinstance(lr, Tensor):
        if lr.numel() != 1:
            raise ValueError(f"{_NAME}: lr is a tensor of {list(lr.shape)}, expected one element")
    elif not (lr >= 0 and math.isfinite(lr)):
        raise ValueError(f"{_NAME}: lr is {lr}, expected a finite number, 0 or above")
    if len(betas) != 2 or not all(0 <= beta < 1 for beta in betas):
        raise ValueError(f"{_NAME}: betas is {betas}, expected two numbers, 0 or above and below 1")
    for name, value in (("eps", eps), ("weight_decay", weight_decay)):
        if not (value >= 0 and math.isfinite(value)):
            raise ValueError(f"{_NAME}: {name} is {value}, expected a finite number, 0 or above")


def _check_state(name: str, value: Any, view: Tensor) -> None:
    value = torch.as_tensor(value)
    if value.numel() != view.numel():
        raise ValueError(f"{_NAME}: {name} is {list(value.shape)}, expected {list(view.shape)} like its parameter")
    if name != "step" and value.is_floating_point() != view.is_floating_point():
        raise ValueError(f"{_NAME}: {name} is {value.dtype}, expected {view.dtype}; state_bits must be as it was saved")
