"""Low-rank adapted linear layers with a frozen base weight."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastft.ops import _extension, products
from fastft.ops._common import check_float, check_like, refuse_create_graph, shape_of
from fastft.ops.frozen_weight import FrozenWeight, add_input_grad, add_linear, linear
from fastft.ops.summed_products import obstacle, summed_products

# How the adapter's small products are computed. What passes over tensors of the size of x or y a layer's forward and
# backward take beyond the two frozen products, each read and each write counted as one:
#   products   8: torch's products (oneDNN, cuBLAS) read x and dy for u and du, and again for both gradients; y and dx
#              are read and written once more for what the adapter adds
#   kernels    7: this project's kernels; dy is read once for du and d_lora_B
#   epilogue   5: also, u lora_B^T and du lora_A are written first and the frozen products add to them in their
#              epilogue, where the reads can hide behind the next tile's multiplication
#   main_loop  3: also, lora_A and lora_B are more depth of the frozen products, and the layers of one x more depth of
#              their dx: matrix products of this project's (`summed_products`), for compute capability 9.0 and 16 bits;
#              on a CPU torch's, one after the other
FORMS = ("kernels", "products", "epilogue", "main_loop")
# By device type: (form, the summed rank up to which it is taken) in the order in which they are tried; "products" where
# none fits.
# cpu: bench_lora_linear.py on AVX-512 with bf16 products; time of the kernels' form over that of the products', forward
# and backward of a layer: 0.85 to 0.97 at r 16, 0.89 to 1.00 at r 64, 1.00 to 1.03 at r 128 (M 330 to 1024, K and N
# 576 to 8192). cuda: nothing has been measured yet, so the vendor's products are used; bench_lora_linear.py has a row
# for each form.
PICKED = {"cpu": (("kernels", 64),), "cuda": ()}


def lora_linear(
    x: Tensor,
    weight: Tensor | FrozenWeight,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    bias: Tensor | None = None,
    *,
    form: str | None = None,
) -> Tensor:
    """x @ weight.T + bias + scaling * (x @ lora_A.T) @ lora_B.T

    x [..., K], weight [N, K], lora_A [r, K], lora_B [N, r], bias [N] or None -> [..., N]; one dtype (float64, float32,
    bfloat16, float16) and device. weight may be quantised (`Weight4bit`, `Weight8bit`). Under autocast all of them are
    first cast, as by torch.nn.functional.linear.

    With u = scaling * x @ lora_A.T and du = scaling * dy @ lora_B, backward is
        dx = dy @ weight + du @ lora_A,  d_lora_A = du.T @ x,  d_lora_B = dy.T @ u,  d_bias = sum(dy);
        d_weight = dy.T @ x only if weight requires a gradient.
    Nothing of size [..., N] is written besides the result. Saves x, u [..., r] and the parameters themselves (not
    views of them), so ZeRO-3 can release a gathered weight.

    form: one of `FORMS`, how the products with lora_A and lora_B are computed; None picks what was measured to be the
    fastest.
    Raises ValueError for a shape, dtype or device that does not fit, naming the argument, and RuntimeError in a
    backward with create_graph: it is not twice differentiable.
    Hu et al. 2021, https://arxiv.org/abs/2106.09685.
    """
    return lora_linears(x, [weight], [lora_A], [lora_B], scaling, [bias], form=form)[0]


def lora_linears(
    x: Tensor,
    weights: Sequence[Tensor | FrozenWeight],
    lora_As: Sequence[Tensor],
    lora_Bs: Sequence[Tensor],
    scaling: float,
    biases: Sequence[Tensor | None] | None = None,
    *,
    form: str | None = None,
) -> tuple[Tensor, ...]:
    """`lora_linear` of one x with each (weight, lora_A, lora_B, bias): query, key and value, or gate and up.

    x is read once for all lora_A; backward sums the layers' dx in place and reads x once for all d_lora_A.
    The layers may differ in N and r.
    """
    biases = [None] * len(weights) if biases is None else biases
    device = x.device.type
    autocast = torch.is_autocast_enabled(device)
    _check(x, weights, lora_As, lora_Bs, biases, same_dtype=not autocast)
    tensors = (*weights, *lora_As, *lora_Bs, *biases)
    dtype = torch.get_autocast_dtype(device) if autocast else x.dtype
    form = pick_form(form, x.device, dtype, weights, lora_As)
    if not autocast:
        return _LoraLinears.apply(x, scaling, form, len(weights), *tensors)
    x, *tensors = (t.to(dtype) if isinstance(t, Tensor) else t for t in (x, *tensors))
    with torch.amp.autocast(device, enabled=False):
        return _LoraLinears.apply(x, scaling, form, len(weights), *tensors)


def pick_form(
    form: str | None,
    device: torch.device,
    dtype: torch.dtype,
    weights: Sequence[Tensor | FrozenWeight],
    lora_As: Sequence[Tensor],
) -> str:
    """The form asked for, or the one that was measured to be the fastest of those that can be used.

    Raises ValueError for a form that cannot.
    """
    if form is None:
        rank = lora_As[0].shape[0] if len(lora_As) == 1 else sum(A.shape[0] for A in lora_As)
        for picked, up_to_rank in PICKED.get(device.type, ()) if _extension.available() else ():
            can = picked != "main_loop" or _no_main_loop(device, dtype, weights, lora_As) is None
            if can and rank <= up_to_rank:
                return picked
        return "products"
    if form not in FORMS:
        raise ValueError(f"lora_linear: form is {form!r}, expected one of {', '.join(FORMS)}, or None")
    if form != "products":
        _extension.load()
    if form == "main_loop" and (why := _no_main_loop(device, dtype, weights, lora_As)) is not None:
        raise ValueError(f"lora_linear: form is 'main_loop', but {why}; expected another form, or None")
    return form


def _no_main_loop(device: torch.device, dtype: torch.dtype, weights, lora_As) -> str | None:
    """Why these layers cannot be multiplied by `summed_products`."""
    if any(isinstance(weight, FrozenWeight) for weight in weights):
        return "a weight is quantised"
    sizes = {"out features": [weight.shape[0] for weight in weights], "in features": [lora_As[0].shape[1]]}
    sizes["rank"] = [A.shape[0] for A in lora_As]
    return obstacle(device, dtype, len(weights) + 1, sizes)


def _check(x: Tensor, weights, lora_As, lora_Bs, biases, *, same_dtype: bool) -> None:
    """Raises ValueError unless the arguments of lora_linears fit together; layers are named where there are several."""
    op = "lora_linear"
    check_float(op, "x", x)
    counts = len(weights), len(lora_As), len(lora_Bs), len(biases)
    if len(set(counts)) > 1 or not weights:
        found = ", ".join(str(count) for count in counts)
        raise ValueError(f"{op}: weights, lora_As, lora_Bs, biases have {found} elements, expected as many of each")
    for i, (weight, A, B, bias) in enumerate(zip(weights, lora_As, lora_Bs, biases, strict=True)):
        of = f" of layer {i}" if len(weights) > 1 else ""
        for name, t in (("weight", weight), ("lora_A", A), ("lora_B", B), ("bias", bias)):
            if t is not None and not isinstance(t, FrozenWeight):
                check_like(op, name + of, t, "x", x, dtype=same_dtype)
        if len(weight.shape) != 2:
            raise ValueError(f"{op}: weight{of} is {list(weight.shape)}, expected [N, K]")
        N, K = weight.shape
        if x.dim() < 1 or x.shape[-1] != K:
            raise ValueError(f"{op}: x is {shape_of(x)}, expected [..., {K}] like weight{of} {list(weight.shape)}")
        if A.dim() != 2 or A.shape[1] != K:
            raise ValueError(f"{op}: lora_A{of} is {shape_of(A)}, expected [r, {K}]")
        if B.dim() != 2 or B.shape[0] != N or B.shape[1] != A.shape[0]:
            raise ValueError(f"{op}: lora_B{of} is {shape_of(B)}, expected {[N, A.shape[0]]}")
        if bias is not None and (bias.dim() != 1 or bias.shape[0] != N):
            raise ValueError(f"{op}: bias{of} is {shape_of(bias)}, expected [{N}]")


def _down(x: Tensor, a: Tensor, scaling: float, u: Tensor, form: str) -> None:
    """u = scaling * x @ a.T"""
    if form == "products":
        u.copy_(products.mm(x, a.t()).mul_(scaling))
    else:
        torch.ops.fastft.lora_down.default(x, a, scaling, u)


def _down_outer(y: Tensor, a: Tensor, scaling: float, du: Tensor, u: Tensor, form: str) -> Tensor:
    """du = scaling * y @ a.T; y.T @ u"""
    if form == "products":
        _down(y, a, scaling, du, form)
        return products.mm(y.t(), u)
    return torch.ops.fastft.lora_down_outer.default(y, a, scaling, du, u)


def _up(y: Tensor, u: Tensor, b: Tensor, form: str) -> None:
    """y += u @ b.T"""
    if form == "products":
        products.addmm_(y, u, b.t())
    else:
        torch.ops.fastft.lora_up.default(y, u, b)


def _outer(u: Tensor, y: Tensor, transposed: bool, form: str) -> Tensor:
    """u.T @ y, or its transpose"""
    if form != "products":
        return torch.ops.fastft.lora_outer.default(u, y, transposed)
    return products.mm(y.t(), u) if transposed else products.mm(u.t(), y)


def _rows(x: Tensor) -> Tensor:
    x = x.reshape(-1, x.shape[-1])
    return x if x.stride(-1) == 1 or x.shape[-1] <= 1 else x.contiguous()


def _stacked(lora_As: Sequence[Tensor]) -> Tensor:
    return lora_As[0] if len(lora_As) == 1 else torch.cat(list(lora_As))


def _columns(u: Tensor, lora_As: Sequence[Tensor]) -> Sequence[Tensor]:
    """The columns of u that belong to each of several layers."""
    return (u,) if len(lora_As) == 1 else u.split([A.shape[0] for A in lora_As], dim=1)


class _LoraLinears(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, scaling, form, n, *tensors):
        weights, As, Bs, biases = (tensors[i * n : (i + 1) * n] for i in range(4))
        rows = _rows(x)
        u = rows.new_empty(rows.shape[0], sum(A.shape[0] for A in As))
        _down(rows, _stacked(As), scaling, u, form)
        outputs = []
        for weight, B, bias, u_of_layer in zip(weights, Bs, biases, _columns(u, As), strict=True):
            if form == "main_loop":
                y = summed_products([rows, u_of_layer], [_rows(weight), _rows(B)], bias)
            elif form == "epilogue":
                y = linear(u_of_layer, B, bias)
                add_linear(y, rows, weight)
            else:
                y = linear(rows, weight, bias)
                _up(y, u_of_layer, B, form)
            outputs.append(y if x.dim() == 2 else y.view(*x.shape[:-1], y.shape[1]))
        ctx.scaling, ctx.form, ctx.n = scaling, form, n
        ctx.set_materialize_grads(False)
        ctx.quantised = [w if isinstance(w, FrozenWeight) else None for w in weights]
        keep_x = any(ctx.needs_input_grad[4 : 4 + 2 * n])
        ctx.save_for_backward(
            x if keep_x else None, u, *(None if isinstance(w, FrozenWeight) else w for w in weights), *As, *Bs
        )
        return tuple(outputs)

    @staticmethod
    def backward(ctx, *dys):
        refuse_create_graph("lora_linear", "its gradient is computed in place")
        n, form = ctx.n, ctx.form
        x, u, *saved = ctx.saved_tensors
        weights, As, Bs = (saved[i * n : (i + 1) * n] for i in range(3))
        weights = [q or w for q, w in zip(ctx.quantised, weights, strict=True)]
        need_x, need = ctx.needs_input_grad[0], ctx.needs_input_grad[4:]
        need_weight, need_A, need_B, need_bias = (need[i * n : (i + 1) * n] for i in range(4))
        used = [i for i in range(n) if dys[i] is not None]
        rows = None if x is None else _rows(x)
        shape = [*dys[used[0]].shape[:-1], As[0].shape[1]] if used else []
        dys = [None if dy is None else _rows(dy) for dy in dys]
        us = _columns(u, As)
        dWs, dAs, dBs, dbs = ([None] * n for _ in range(4))
        dx = None
        need_du = bool(used) and (need_x or any(need_A))
        du = torch.empty_like(u) if need_du else None
        for i, du_of_layer in enumerate(_columns(du, As) if need_du else [None] * n):
            if dys[i] is None:
                if need_du:
                    du_of_layer.zero_()
            elif need_du and need_B[i]:
                dBs[i] = _down_outer(dys[i], Bs[i].t(), ctx.scaling, du_of_layer, us[i], form)
            elif need_du:
                _down(dys[i], Bs[i].t(), ctx.scaling, du_of_layer, form)
            elif need_B[i]:
                dBs[i] = _outer(us[i], dys[i], True, form)
        if need_du and any(need_A):
            dA = _outer(du, rows, False, form)
            # Each in memory of its own: a view would keep the other layers' alive.
            dAs = [dA] if n == 1 else [part.clone() for part in dA.split([A.shape[0] for A in As])]
        if need_du and need_x and form == "main_loop":
            by_depth = [_rows(w).t() for w in (*(weights[i] for i in used), _stacked(As))]
            dx = summed_products([*(dys[i] for i in used), du], by_depth).view(shape)
        elif need_du and need_x:
            dx = products.mm(du, _stacked(As)) if form == "epilogue" else None
            for i in used:
                dx = add_input_grad(dx, dys[i], weights[i])
            if form != "epilogue":
                _up(dx, du, _stacked(As).t(), form)
            dx = dx if len(shape) == 2 else dx.view(shape)
        for i in used:
            if need_weight[i]:
                dWs[i] = products.mm(dys[i].t(), rows)
            if need_bias[i]:
                dbs[i] = dys[i].sum(0)
        return dx, None, None, None, *dWs, *dAs, *dBs, *dbs


def register() -> None:
    """Completes the C++ ops with fakes; their gradients are those of `lora_linears`."""
    library = torch.library
    library.register_fake("fastft::lora_down")(lambda x, a, scaling, u: None)
    library.register_fake("fastft::lora_up")(lambda y, u, b: None)
    library.register_fake("fastft::lora_outer")(
        lambda u, y, transposed: y.new_empty((y.shape[1], u.shape[1]) if transposed else (u.shape[1], y.shape[1]))
    )
    library.register_fake("fastft::lora_down_outer")(lambda y, a, scaling, du, u: y.new_empty(y.shape[1], u.shape[1]))
