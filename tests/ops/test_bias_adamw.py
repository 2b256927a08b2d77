"""bias_adamw and BiasAdamW: the five tests of every op as they apply to an optimizer, then what is particular to it."""

import copy
import io

import pytest
import torch
from op_checks import DTYPES, accumulate_dtype, name, supported

from fastft import ops
from fastft.ops import reference
from fastft.ops.bias_adamw import AdamWPlan, AdamWState
from fastft.optim import BiasAdamW
from tests.ops.randomised import given, settings, st

# Around a block of codes and a chunk (kCodeBlock and kAdamWChunk in csrc/include/fastft/bias_adamw.h).
SIZES = [1, 7, 255, 256, 257, 4095, 4096, 4097, 10_001]
HYPERPARAMETERS = [1e-2, 0.9, 0.99, 1e-8, 0.1]


def tensors(sizes, dtype, device="cpu", scale=1.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [(torch.randn(n, generator=generator) * scale).to(dtype).to(device) for n in sizes]


def with_grads(params, grads):
    for p, g in zip(params, grads, strict=True):
        p.grad = g.to(p.dtype).clone()


def parameters(values, dtype=None):
    return [v.detach().to(dtype or v.dtype).clone().requires_grad_() for v in values]


def flat(params):
    return torch.cat([p.detach().double().reshape(-1) for p in params])


def train(make, start, steps, dtype=None, sizes=None, seed=1, each_step=lambda optimizer, step: None):
    """The parameters (float64, flat) after some steps on random gradients, and the optimizer."""
    params = parameters(start, dtype)
    optimizer = make(params)
    for step in range(steps):
        grads = tensors([p.numel() for p in params], torch.float32, params[0].device, 0.1, seed=seed + step)
        with_grads(params, [g.view_as(p) for g, p in zip(grads, params, strict=True)])
        each_step(optimizer, step)
        optimizer.step()
    return flat(params), optimizer


# 1. Against float64 -----------------------------------------------------------------------------------


def run_op(params, steps, state_bits=32, **options):
    """The op itself on copies of params, each with the gradients of its step."""
    params = [p.clone() for p in params]
    state = AdamWState.zeros(params, state_bits=state_bits)
    plan = AdamWPlan.make(state, params, range(len(params)), [len(params)])
    for step in range(steps):
        grads = tensors([p.numel() for p in params], params[0].dtype, params[0].device, 0.1, seed=1 + step)
        ops.bias_adamw(params, grads, state, plan, HYPERPARAMETERS, **options)
    return flat(params), state


def run_reference(params, steps, grad_dtype, **options):
    """The same gradients, rounded to grad_dtype first, in the dtype of params."""
    params = [p.clone() for p in params]
    acc = accumulate_dtype(params[0].dtype)
    state = [{"step": torch.zeros(()), "exp_avg": torch.zeros_like(p, dtype=acc),
              "exp_avg_sq": torch.zeros_like(p, dtype=acc)} for p in params]  # fmt: skip
    for step in range(steps):
        grads = tensors([p.numel() for p in params], grad_dtype, params[0].device, 0.1, seed=1 + step)
        norm = reference.bias_adamw(params, [g.to(p.dtype) for g, p in zip(grads, params, strict=True)], state,
                                    HYPERPARAMETERS, **options)  # fmt: skip
    return flat(params), norm


@pytest.mark.parametrize("dtype", DTYPES, ids=name)
@pytest.mark.parametrize("clip", [0.0, 0.5])
def test_against_float64(device, dtype, clip):
    """After several steps, at most twice the error of the same in plain PyTorch."""
    if not supported(device, dtype):
        pytest.skip(f"{name(dtype)} is a CPU dtype")
    start = tensors(SIZES, dtype, device)
    ours, state = run_op(start, 5, max_grad_norm=clip)
    plain, _ = run_reference(start, 5, dtype, max_grad_norm=clip)
    truth, norm = run_reference([p.double() for p in start], 5, dtype, max_grad_norm=clip)
    floor = 4 * torch.finfo(dtype).eps * truth.abs().max()
    assert (ours - truth).abs().max() <= 2 * (plain - truth).abs().max() + floor
    assert (ours - torch.cat([p.double() for p in start])).abs().max() > 1e-2
    assert (state.steps == 5).all()
    if clip:
        assert state.status[0].item() == pytest.approx(norm.item(), rel=1e-5)


@pytest.mark.parametrize("dtype", DTYPES, ids=name)
@pytest.mark.parametrize("state_bits", [32, 8])
def test_every_capability(capability, dtype, state_bits):
    """All capabilities agree with the reference; 8-bit state holds what the reference's holds, to half a code."""
    start = tensors(SIZES, dtype)
    ours, state = run_op(start, 1, state_bits, max_grad_norm=0.5)
    truth, _ = run_reference([p.double() for p in start], 1, dtype, max_grad_norm=0.5)
    assert (ours - truth).abs().max() <= 4 * torch.finfo(dtype).eps * truth.abs().max() + 1e-6
    if state_bits == 32:
        return
    exact = run_op(start, 1, 32, max_grad_norm=0.5)[1]
    for i, p in enumerate(start):
        m, v = (exact.views(i, p)[k] for k in ("exp_avg", "exp_avg_sq"))
        views = state.views(i, p)
        decoded_m, decoded_v = reference.adamw_decode(views)
        for k, scale in (("exp_avg", m.abs()), ("exp_avg_sq", v.sqrt())):
            blocks = torch.nn.functional.pad(scale, (0, -scale.numel() % 256)).view(-1, 256)
            torch.testing.assert_close(views[f"{k}_scale"], blocks.amax(1), rtol=1e-5, atol=0)
        # (c + 1/2)^4 - c^4 for exp_avg; a whole code for the dithered root, (c + 1)^2 - c^2
        scale = views["exp_avg_scale"].repeat_interleave(256)[: p.numel()]
        code = (m.abs() / scale) ** 0.25 * 127
        assert ((decoded_m - m).abs() <= scale * (((code + 0.6) / 127) ** 4 - (code / 127) ** 4) + 1e-12).all()
        scale = views["exp_avg_sq_scale"].repeat_interleave(256)[: p.numel()]
        code = (v.sqrt() / scale) ** 0.5 * 254.99
        assert (
            (decoded_v.sqrt() - v.sqrt()).abs() <= scale * (((code + 1.01) / 254.99) ** 2 - (code / 254.99) ** 2)
        ).all()
        assert (views["exp_avg_sq"] >= 1).all()


# 2. Against torch.optim.AdamW (what gradcheck is to a loss) ----------------------------------------------


def compare_with_torch(
    dtype, device, steps=50, make_groups=lambda params: params, each_step=lambda optimizer, step: None, **options
):
    start = [*tensors(SIZES, torch.float64, device), torch.randn(3, 5, 7, dtype=torch.float64, device=device)]
    start = [p.to(dtype) for p in start]
    settings = {"lr": 1e-2, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.1, **options}

    def torch_adamw(dtype):
        return train(lambda p: torch.optim.AdamW(make_groups(p), **settings), start, steps, dtype, each_step=each_step)[
            0
        ]

    ours, _ = train(lambda p: BiasAdamW(make_groups(p), **settings), start, steps, each_step=each_step)
    truth = torch_adamw(torch.float64)
    plain = torch_adamw(dtype)
    # torch's own state is in float16 there, where it overflows to NaN: no yardstick, the floor alone bounds ours.
    plain_error = (plain - truth).abs().nan_to_num(0).max()
    # In float64 the truth has errors of its own, a rounding a step.
    roundings = steps if dtype == torch.float64 else 4
    assert (ours - truth).abs().max() <= 2 * plain_error + roundings * torch.finfo(dtype).eps * truth.abs().max()
    assert (ours - flat(start)).abs().max() > 0.1


@pytest.mark.parametrize("dtype", DTYPES, ids=name)
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_fifty_steps_of_torch_adamw(device, dtype, weight_decay):
    if not supported(device, dtype):
        pytest.skip(f"{name(dtype)} is a CPU dtype")
    compare_with_torch(dtype, device, weight_decay=weight_decay)


def test_groups_and_a_schedule(device):
    def make_groups(params):
        return [
            {"params": params[:3], "lr": 3e-2},
            {"params": params[3:4], "weight_decay": 0.0, "betas": (0.8, 0.95)},
            {"params": params[4:], "eps": 1e-6},
        ]

    schedulers = {}

    def each_step(optimizer, step):
        if step == 0:
            schedulers[id(optimizer)] = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 50)
        else:
            schedulers[id(optimizer)].step()

    compare_with_torch(torch.float32, device, make_groups=make_groups, each_step=each_step)


def test_a_tensor_learning_rate(device):
    start = tensors(SIZES, torch.float32, device)
    lr = torch.tensor(1e-2, device=device)

    def each_step(optimizer, step):
        optimizer.param_groups[0]["lr"].fill_(1e-2 / (1 + step))

    tensor, _ = train(lambda p: BiasAdamW(p, lr=lr.clone()), start, 5, each_step=each_step)

    def set_number(optimizer, step):
        optimizer.param_groups[0]["lr"] = lr.item() / (1 + step)

    number, _ = train(lambda p: BiasAdamW(p, lr=1e-2), start, 5, each_step=set_number)
    torch.testing.assert_close(tensor, number, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=name)
@pytest.mark.parametrize("state_bits", [32, 8])
def test_master_weights_follow_float32(device, dtype, state_bits):
    """With the gradients rounded alike, the master copy is the float32 run, and the parameter its rounding."""
    start = tensors(SIZES, dtype, device)

    def run(params, **options):
        optimizer = BiasAdamW(params, lr=1e-3, state_bits=state_bits, **options)
        for step in range(30):
            grads = tensors(SIZES, dtype, device, seed=1 + step)
            with_grads(params, grads)
            optimizer.step()
        return optimizer

    rounded, exact = parameters(start), parameters(start, torch.float32)
    optimizer = run(rounded, master_weights=True)
    run(exact)
    for p, q in zip(rounded, exact, strict=True):
        assert torch.equal(optimizer.state[p]["master_param"], q)
        assert torch.equal(p, q.to(dtype))


def test_master_weights_keep_small_updates():
    """Without them an update below half a unit in the last place of the parameter is lost, every time."""
    ends = {}
    for master in (False, True):
        params = [torch.ones(64, dtype=torch.bfloat16, requires_grad=True)]
        optimizer = BiasAdamW(params, lr=1e-4, weight_decay=0.0, master_weights=master)
        for _ in range(200):
            with_grads(params, [torch.ones(64)])
            optimizer.step()
        ends[master] = params[0].detach().float()
    assert (ends[False] == 1).all()
    torch.testing.assert_close(ends[True], torch.full((64,), 0.98), rtol=5e-3, atol=0)


# 3. opcheck -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("state_bits", [32, 8])
def test_opcheck(device, state_bits):
    dtype = torch.float32
    params, grads = tensors([3, 300], dtype, device), tensors([3, 300], dtype, device, seed=1)
    state = AdamWState.zeros(params, state_bits=state_bits)
    plan = AdamWPlan.make(state, params, [0, 1], [1, 1])
    one = torch.ones((), device=device)
    args = (params, grads, state.exp_avg, state.exp_avg_sq, state.scales, state.master, state.steps, state.status,
            plan.partials, state.tickets, plan.plan, plan.device_plan, HYPERPARAMETERS * 2, None, one, one * 0, 1.0,
            True)  # fmt: skip
    torch.library.opcheck(torch.ops.fastft.bias_adamw.default, args)


def test_compiles(device):
    start, grads = tensors(SIZES, torch.float32, device), tensors(SIZES, torch.float32, device, seed=1)
    results = []
    for compiled in (False, True):
        params = [p.clone() for p in start]
        state = AdamWState.zeros(params)
        plan = AdamWPlan.make(state, params, range(len(params)), [len(params)])

        def step(params, grads, m, v, steps, status, partials, tickets, plan=plan):
            torch.ops.fastft.bias_adamw(params, [g * 2 for g in grads], m, v, None, None, steps, status, partials,
                                        tickets, plan.plan, plan.device_plan, HYPERPARAMETERS, None, None, None, 0.0,
                                        False)  # fmt: skip
            return params[0] + 1

        run = torch.compile(step, backend="aot_eager", fullgraph=True) if compiled else step
        out = run(
            params, grads, state.exp_avg, state.exp_avg_sq, state.steps, state.status, plan.partials, state.tickets
        )
        results.append([out, *params, state.exp_avg, state.exp_avg_sq, state.steps])
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


# 4. Hard shapes and values -----------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(
    sizes=st.lists(
        st.one_of(st.integers(0, 40), st.sampled_from([255, 256, 257, 4095, 4096, 4097, 8192])), min_size=1, max_size=6
    ),
    dtype=st.sampled_from(DTYPES),
    state_bits=st.sampled_from([32, 8]),
    groups=st.integers(1, 3),
    offset=st.integers(0, 5),
)
def test_any_sizes(sizes, dtype, state_bits, groups, offset):
    """Tensors anywhere in memory, of any size; the two steps of 8-bit state are those of its own decoded state."""
    start = [p[offset:] for p in tensors([n + offset for n in sizes], dtype)]
    params = [torch.empty(n + offset, dtype=dtype)[offset:].copy_(p) for n, p in zip(sizes, start, strict=True)]
    optimizer = BiasAdamW(
        [{"params": params[g::groups]} for g in range(groups) if params[g::groups]], lr=1e-2, state_bits=state_bits
    )
    expected = [p.clone() for p in start]
    state = [{"step": torch.zeros(()), "exp_avg": torch.zeros_like(p, dtype=accumulate_dtype(dtype)),
              "exp_avg_sq": torch.zeros_like(p, dtype=accumulate_dtype(dtype))} for p in start]  # fmt: skip
    for step in range(2):
        grads = tensors(sizes, dtype, seed=1 + step)
        with_grads(params, grads)
        optimizer.step()
        if sum(sizes):
            reference.bias_adamw(expected, grads, state, [1e-2, 0.9, 0.999, 1e-8, 1e-2])
        if state_bits == 8:
            for p, s in zip(params, state, strict=True):
                s["exp_avg"], s["exp_avg_sq"] = reference.adamw_decode(optimizer.state[p])
    bound = 4 * torch.finfo(dtype).eps + (1e-6 if dtype != torch.float64 else 1e-12)
    for p, q in zip(params, expected, strict=True):
        torch.testing.assert_close(p, q, rtol=bound, atol=bound)


@pytest.mark.parametrize("state_bits", [32, 8])
def test_zero_gradients(device, state_bits):
    """Blocks of zeros stay zero, and only the decay moves the parameters."""
    start = tensors([300], torch.float32, device)
    params = parameters(start)
    optimizer = BiasAdamW(params, lr=0.1, weight_decay=0.1, state_bits=state_bits)
    for _ in range(3):
        with_grads(params, [torch.zeros(300, device=device)])
        optimizer.step()
    torch.testing.assert_close(params[0].detach(), start[0] * 0.99**3)
    assert (optimizer.state[params[0]]["exp_avg"] == 0).all()


@pytest.mark.parametrize("size", [1e-14, 1e-7, 1e10])
def test_sizes_of_gradients(device, size):
    """The 8-bit state has no size of its own: Adam's step does not depend on the gradients' size (with eps 0)."""
    start = [torch.zeros(1000, device=device)]
    ends = []
    for scale in (1.0, size):
        params = parameters(start)
        optimizer = BiasAdamW(params, lr=1e-3, eps=0.0, state_bits=8)
        for step in range(5):
            with_grads(params, tensors([1000], torch.float32, device, scale, seed=step))
            optimizer.step()
        ends.append(params[0].detach())
    assert ends[1].isfinite().all()
    # A code on the edge between two may fall to either side.
    assert (ends[0] - ends[1]).norm() < 1e-2 * ends[0].norm()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("state_bits", [32, 8])
def test_non_finite_gradients_are_skipped(device, bad, state_bits):
    """Nothing changes, step counts included; the next step is as if this one had not been."""
    start = tensors(SIZES, torch.float32, device)

    def poison(optimizer, step):
        if step == 1:
            optimizer.param_groups[0]["params"][-1].grad[-1] = bad

    for options in ({"skip_non_finite": True}, {"max_grad_norm": 1.0}):
        params = parameters(start)
        optimizer = BiasAdamW(params, lr=1e-2, state_bits=state_bits, **options)
        with_grads(params, tensors(SIZES, torch.float32, device, seed=5))
        optimizer.step()
        before = [p.detach().clone() for p in params], copy.deepcopy(optimizer.state_dict()["state"])
        poison(optimizer, 1)
        optimizer.step()
        assert optimizer.step_skipped == 1
        assert not optimizer.grad_norm.isfinite()
        assert all(torch.equal(p, b) for p, b in zip(params, before[0], strict=True))
        for i, values in optimizer.state_dict()["state"].items():
            assert all(torch.equal(v, before[1][i][k]) for k, v in values.items())
        with_grads(params, tensors(SIZES, torch.float32, device, seed=6))
        optimizer.step()
        assert optimizer.step_skipped == 0
        assert all((s["step"] == 2).all() for s in optimizer.state.values())


@pytest.mark.parametrize("state_bits", [32, 8])
def test_non_finite_gradients_without_a_check(device, state_bits, capability):
    """As in torch they spread, and are seen: 8-bit state as a whole block, never as numbers that mean nothing."""
    params = parameters(tensors([600], torch.float32, device))
    optimizer = BiasAdamW(params, lr=1e-2, state_bits=state_bits)
    grads = tensors([600], torch.float32, device)
    grads[0][300] = torch.nan
    with_grads(params, grads)
    optimizer.step()
    optimizer.step()
    assert params[0][300].isnan()
    assert params[0][:256].isfinite().all()
    assert params[0][512:].isfinite().all()
    if state_bits == 8:
        assert optimizer.state[params[0]]["exp_avg_scale"].isnan().tolist() == [False, True, False]
        assert params[0][256:512].isnan().all()


# 5. Errors --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": -1.0}, "lr is -1.0, expected a finite number, 0 or above"),
        ({"lr": float("nan")}, "lr is nan"),
        ({"lr": torch.ones(2)}, r"lr is a tensor of \[2\], expected one element"),
        ({"betas": (0.9, 1.0)}, r"betas is \(0.9, 1.0\), expected two numbers"),
        ({"betas": (-0.1, 0.9)}, "betas is"),
        ({"eps": -1e-8}, "eps is -1e-08"),
        ({"weight_decay": -0.1}, "weight_decay is -0.1"),
        ({"state_bits": 16}, "state_bits is 16, expected 8 or 32"),
        ({"max_grad_norm": -1.0}, "max_grad_norm is -1.0"),
        ({"params": [torch.zeros(3, dtype=torch.complex64)]}, r"params\[0\] is torch.complex64, expected one of"),
        ({"params": [torch.zeros(3, dtype=torch.int64)]}, r"params\[0\] is torch.int64"),
        ({"params": [torch.zeros(3), torch.zeros(3).double()]}, r"params\[1\] is torch.float64 beside torch.float32"),
        ({"params": [torch.zeros(4, 3).t()]}, r"params\[0\] is not contiguous, with strides \[1, 3\]"),
        ({"params": [torch.zeros(3), torch.zeros(3, device="meta")]}, r"params\[1\] is on meta, expected cpu"),
    ],
)  # fmt: skip
def test_errors_of_options(options, message):
    arguments = {"params": [torch.zeros(3)], **options}
    with pytest.raises(ValueError, match=f"BiasAdamW: {message}"):
        BiasAdamW(**arguments)


def test_an_added_group_that_does_not_fit_is_not_added():
    optimizer = BiasAdamW([torch.zeros(3)])
    with pytest.raises(ValueError, match="lr is -1"):
        optimizer.add_param_group({"params": [torch.zeros(2)], "lr": -1})
    with pytest.raises(ValueError, match=r"params\[1\] is torch.float64 beside torch.float32"):
        optimizer.add_param_group({"params": [torch.zeros(2), torch.zeros(2).double()]})
    assert len(optimizer.param_groups) == 1


def test_errors_of_gradients(device):
    def optimizer_with(grad, dtype=torch.float32):
        p = torch.zeros(4, dtype=dtype, device=device, requires_grad=True)
        p.grad_dtype = None  # otherwise torch refuses the gradient itself
        p.grad = grad.to(device)
        return BiasAdamW([p])

    with pytest.raises(ValueError, match=r"bias_adamw: grads\[0\] is torch.sparse_coo, expected a dense tensor"):
        optimizer_with(torch.zeros(4).to_sparse()).step()
    if hasattr(torch.Tensor, "grad_dtype"):
        with pytest.raises(ValueError, match=r"grads\[0\] is torch.float64, expected torch.float32 like params\[0\]"):
            optimizer_with(torch.zeros(4, dtype=torch.float64)).step()


def test_errors_of_the_op(device):
    params, grads = tensors([3, 4], torch.float32, device), tensors([3, 4], torch.float32, device)
    state = AdamWState.zeros(params)
    plan = AdamWPlan.make(state, params, [0, 1], [2])

    def call(params, grads):
        ops.bias_adamw(params, grads, state, plan, HYPERPARAMETERS)

    with pytest.raises(ValueError, match="grads has 1 tensors, expected 2 like params"):
        call(params, grads[:1])
    with pytest.raises(ValueError, match=r"grads\[1\] is \[3\], expected \[4\] like params\[1\]"):
        call(params, [grads[0], grads[0]])
    with pytest.raises(ValueError, match=r"params\[1\] is torch.int32, expected one of"):
        call([params[0], params[1].int()], grads)
    with pytest.raises(RuntimeError, match="do not fit the plan"):
        call(params[::-1], grads[::-1])
    if device.type == "cuda":
        with pytest.raises(ValueError, match=r"grads\[0\] is on cpu, expected cuda:0 like params\[0\]"):
            call(params, [g.cpu() for g in grads])
    assert (state.steps == 0).all()


def test_float64_on_cuda_is_refused(device):
    if device.type == "cpu":
        pytest.skip("float64 is a CPU dtype")
    with pytest.raises(ValueError, match="float64 is a CPU dtype"):
        BiasAdamW([torch.zeros(3, dtype=torch.float64, device=device)])


# Clipping, loss scaling --------------------------------------------------------------------------------


@pytest.mark.parametrize("max_norm", [0.1, 1e4])
def test_clipping_is_that_of_torch(device, max_norm):
    start = tensors(SIZES, torch.float32, device)
    norms = []

    def clip(optimizer, step):
        norms.append(torch.nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], max_norm))

    truth, _ = train(lambda p: torch.optim.AdamW(p, lr=1e-2, eps=1e-3), start, 5, each_step=clip)
    ours, optimizer = train(lambda p: BiasAdamW(p, lr=1e-2, eps=1e-3, max_grad_norm=max_norm), start, 5)
    torch.testing.assert_close(ours, truth, rtol=1e-6, atol=1e-6)
    assert optimizer.grad_norm.item() == pytest.approx(norms[-1].item(), rel=1e-5)
    unclipped, _ = train(lambda p: BiasAdamW(p, lr=1e-2, eps=1e-3), start, 5)
    assert ((unclipped - ours).abs().max() > 1e-4) == (max_norm == 0.1)


def test_gradients_are_left_alone(device):
    params = parameters(tensors(SIZES, torch.float32, device))
    grads = tensors(SIZES, torch.float32, device, seed=1)
    with_grads(params, grads)
    BiasAdamW(params, max_grad_norm=0.1).step()
    assert all(torch.equal(p.grad, g) for p, g in zip(params, grads, strict=True))


@pytest.mark.parametrize("max_grad_norm", [0.0, 0.5])
def test_grad_scaler(device, max_grad_norm):
    """The scaled run is the plain one; a step whose scaled gradient overflows is skipped and not counted."""
    start = tensors([300, 7], torch.float32, device)
    plain, scaled = parameters(start), parameters(start)
    optimizers = [BiasAdamW(p, lr=1e-2, max_grad_norm=max_grad_norm) for p in (plain, scaled)]
    scaler = torch.amp.GradScaler(device.type, init_scale=2.0**10, growth_interval=10**6)
    for step in range(4):
        coefficients = tensors([300, 7], torch.float32, device, seed=step)
        overflows = step == 2
        for params, optimizer in zip((plain, scaled), optimizers, strict=True):
            optimizer.zero_grad()
            loss = sum((p * c).sum() for p, c in zip(params, coefficients, strict=True))
            if params is plain:
                loss.backward()
                if not overflows:
                    optimizer.step()
            else:
                scaler.scale(loss).backward()
                if overflows:
                    params[0].grad[0] = torch.inf
                scaler.step(optimizer)
                scaler.update()
                assert optimizer.step_skipped == overflows
        assert not hasattr(optimizers[1], "found_inf")
    torch.testing.assert_close(flat(scaled), flat(plain), rtol=1e-6, atol=1e-7)
    assert optimizers[1].state[scaled[0]]["step"] == 3
    assert scaler.get_scale() == 2.0**9


# 8-bit state ---------------------------------------------------------------------------------------------


def small_network():
    torch.manual_seed(3)
    layers = [torch.nn.Linear(64, 256), torch.nn.GELU(), torch.nn.Linear(256, 64), torch.nn.LayerNorm(64)]
    model = torch.nn.Sequential(*layers)
    for key, p in model.named_parameters():
        p.requires_grad_(key.endswith("bias"))
    return model


def train_network(make, steps=200):
    """Bias training towards a network with other biases: (losses, biases)."""
    torch.manual_seed(5)
    teacher = small_network()
    for p in teacher.parameters():
        if p.requires_grad:
            p.data += torch.randn_like(p) * 0.3
    model = small_network()
    biases = [p for p in model.parameters() if p.requires_grad]
    optimizer = make(biases)
    generator, losses = torch.Generator().manual_seed(0), []
    for _ in range(steps):
        x = torch.randn(32, 64, generator=generator)
        loss = torch.nn.functional.mse_loss(model(x), teacher(x).detach())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return torch.tensor(losses), flat(biases)


def test_8_bit_state_follows_32_bit_state_closer_than_bitsandbytes():
    """Over 200 steps of a real network's biases: the losses, and where the biases end."""
    functional = pytest.importorskip("bitsandbytes.functional")
    losses, biases = train_network(lambda p: BiasAdamW(p, lr=1e-2))
    ours = train_network(lambda p: BiasAdamW(p, lr=1e-2, state_bits=8))
    maps = functional.create_dynamic_map(True), functional.create_dynamic_map(False)
    theirs = train_network(lambda p: TreeAdamW(p, *maps))
    distance = [(end - biases).norm() / biases.norm() for _, end in (ours, theirs)]
    error = [((found - losses).abs() / losses).mean() for found, _ in (ours, theirs)]
    assert error[0] < 5e-3
    assert error[0] < error[1]
    assert distance[0] < distance[1]


def test_8_bit_state_holds_gradients_of_very_different_size():
    """Within a block the gradients' sizes spread over e^(+-7); every element still learns at about its rate."""
    functional = pytest.importorskip("bitsandbytes.functional")
    maps = functional.create_dynamic_map(True), functional.create_dynamic_map(False)
    scale, mean = (2.5 * torch.randn(2048)).exp(), 0.3 * torch.randn(2048)
    ends = []
    for make in (
        lambda p: BiasAdamW(p, lr=1e-2),
        lambda p: BiasAdamW(p, lr=1e-2, state_bits=8),
        lambda p: TreeAdamW(p, *maps),
    ):
        generator = torch.Generator().manual_seed(1)
        params = [torch.zeros(2048, requires_grad=True)]
        optimizer = make(params)
        for _ in range(100):
            params[0].grad = scale * (mean + torch.randn(2048, generator=generator))
            optimizer.step()
        ends.append(flat(params))
    ours, tree = ((end - ends[0]).norm() / ends[0].norm() for end in ends[1:])
    assert ours < 0.5
    assert ours < 0.1 * tree


class TreeAdamW(torch.optim.Optimizer):
    """AdamW whose moments pass through bitsandbytes' dynamic tree maps after every step, in blocks of 256.

    bitsandbytes' own optimizer keeps tensors of fewer than 4096 elements in 32 bits.
    """

    def __init__(self, params, signed, unsigned):
        super().__init__(params, {"lr": 1e-2})
        self.maps = signed, unsigned

    @torch.no_grad()
    def step(self):
        for p in self.param_groups[0]["params"]:
            s = self.state[p]
            if not s:
                s |= {"step": torch.zeros(()), "exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
            reference.bias_adamw([p], [p.grad], [s], [1e-2, 0.9, 0.999, 1e-8, 1e-2])
            for key, codes in zip(("exp_avg", "exp_avg_sq"), self.maps, strict=True):
                n = p.numel()
                blocks = torch.nn.functional.pad(s[key], (0, -n % 256)).view(-1, 256)
                scale = blocks.abs().amax(1, keepdim=True).clamp_min(1e-38)
                middle = (codes[1:] + codes[:-1]) / 2
                s[key] = (codes[torch.bucketize(blocks / scale, middle)] * scale).view(-1)[:n]


def test_the_dither_averages_out(device):
    """A second moment that changes by less than a code a step still follows its gradients."""
    params = [torch.zeros(512, device=device, requires_grad=True)]
    optimizer = BiasAdamW(params, state_bits=8)
    sizes = torch.linspace(0.5, 1.0, 512, device=device)
    for scale, steps in ((1.0, 1000), (1.5, 1500)):
        for _ in range(steps):
            params[0].grad = sizes * scale
            optimizer.step()
    exact = sizes.double() ** 2 * (1 - 0.999**1000) * 0.999**1500 + (1.5 * sizes.double()) ** 2 * (1 - 0.999**1500)
    _, found = reference.adamw_decode(optimizer.state[params[0]])
    ratio = found.double() / exact
    assert abs(ratio.mean() - 1) < 0.01
    assert (ratio - 1).abs().max() < 0.1


def test_8_bit_state_is_small():
    p = torch.zeros(2**20, requires_grad=True)
    p.grad = torch.ones_like(p)
    optimizer = BiasAdamW([p], state_bits=8)
    optimizer.step()
    stored = sum(v.numel() * v.element_size() for v in optimizer.state[p].values())
    assert stored < 2.04 * p.numel()


# A torch.optim.Optimizer in every respect --------------------------------------------------------------


@pytest.mark.parametrize("state_bits", [32, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=name)
@pytest.mark.parametrize("way", ["state_dict", "torch.save", "deepcopy"])
def test_continues_bit_for_bit(device, state_bits, dtype, way):
    """Saved half-way and loaded into a fresh optimizer, which has or has not made a step of its own."""
    start = tensors(SIZES, dtype, device)

    def make(params):
        return BiasAdamW(params, lr=1e-2, state_bits=state_bits, master_weights=True)

    straight, _ = train(make, start, 6)
    params = parameters(start)
    optimizer = make(params)

    def steps(params, optimizer, numbers):
        for step in numbers:
            with_grads(params, tensors(SIZES, torch.float32, device, 0.1, seed=1 + step))
            optimizer.step()

    steps(params, optimizer, range(3))
    if way == "deepcopy":
        other = copy.deepcopy(optimizer)
        params = other.param_groups[0]["params"]
    else:
        saved = optimizer.state_dict()
        if way == "torch.save":
            file = io.BytesIO()
            torch.save(saved, file)
            file.seek(0)
            saved = torch.load(file, weights_only=True)
        params = parameters(params)
        other = make(params)
        if way == "torch.save":
            values = [p.detach().clone() for p in params]
            steps(params, other, [77])
            for p, value in zip(params, values, strict=True):
                p.data.copy_(value)
        other.load_state_dict(saved)
    assert other.state_bits == state_bits
    steps(params, other, range(3, 6))
    assert torch.equal(flat(params), straight)


def test_state_dict_is_that_of_torch_adamw(device):
    """32-bit state goes from one to the other and back."""
    start = tensors(SIZES, torch.float32, device)
    settings = {"lr": 1e-2, "weight_decay": 0.1}

    def torch_adamw(params, **settings):  # fused, so that on CUDA its step counts are tensors there
        return torch.optim.AdamW(params, fused=True, **settings)

    truth, _ = train(lambda p: torch_adamw(p, **settings), start, 6)
    for first, second in ((torch_adamw, BiasAdamW), (BiasAdamW, torch_adamw)):
        params = parameters(start)
        optimizer = first(params, **settings)
        for step in range(6):
            if step == 3:
                saved = optimizer.state_dict()
                optimizer = second(params, **settings)
                optimizer.load_state_dict(saved)
            with_grads(params, tensors(SIZES, torch.float32, device, 0.1, seed=1 + step))
            optimizer.step()
        torch.testing.assert_close(flat(params), truth, rtol=0, atol=1e-6)
        assert optimizer.state[params[0]].keys() == {"step", "exp_avg", "exp_avg_sq"}


def test_loading_another_state_width_is_an_error():
    params = parameters(tensors([5], torch.float32))
    eight, full = BiasAdamW(params, state_bits=8), BiasAdamW(params)
    with_grads(params, [torch.ones(5)])
    eight.step()
    full.step()
    with pytest.raises(ValueError, match=r"exp_avg is torch.int8, expected torch.float32; state_bits must be as"):
        full.load_state_dict(eight.state_dict())
    with pytest.raises(ValueError, match=r"exp_avg is torch.float32, expected torch.int8"):
        eight.load_state_dict(full.state_dict())


def test_parameters_come_go_and_have_no_gradient(device):
    """A parameter without a gradient keeps its step count; one that is added later starts at 0."""
    start = tensors([300, 40, 5], torch.float32, device)

    def run(make):
        params = parameters(start)
        optimizer = make(params[:2])
        for step in range(8):
            if step == 4:
                optimizer.add_param_group({"params": params[2:], "lr": 3e-2})
            optimizer.zero_grad(set_to_none=True)
            grads = tensors([300, 40, 5], torch.float32, device, seed=step)
            for i, (p, g) in enumerate(zip(params, grads, strict=True)):
                if (i, step) not in {(0, 0), (1, 2), (1, 3), (0, 5)}:
                    p.grad = g
            optimizer.step()
        return flat(params), [s["step"].item() for s in optimizer.state.values()]

    ours, truth = run(lambda p: BiasAdamW(p, lr=1e-2)), run(lambda p: torch.optim.AdamW(p, lr=1e-2))
    torch.testing.assert_close(ours[0], truth[0], rtol=0, atol=1e-6)
    assert sorted(ours[1]) == sorted(truth[1])


def test_state_put_in_by_hand_is_used(device):
    """Entries that are replaced, as DeepSpeed does when it loads, count; those that are removed start anew."""
    params = parameters(tensors([300, 40], torch.float32, device))
    optimizer = BiasAdamW(params)
    with_grads(params, tensors([300, 40], torch.float32, device, seed=1))
    optimizer.step()
    optimizer.step()
    del optimizer.state[params[1]]
    optimizer.step()
    assert [optimizer.state[p]["step"].item() for p in params] == [3, 1]
    for p in params:
        optimizer.state[p] = {k: torch.full_like(v, 10) for k, v in optimizer.state[p].items()}
    optimizer.step()
    assert [optimizer.state[p]["step"].item() for p in params] == [11, 11]
    assert (optimizer.state[params[0]]["exp_avg"] > 8).all()


def test_swapped_flat_shards_as_under_zero_3(device):
    """DeepSpeed puts one flat tensor of a sub-group at a time into the group; their states stay apart."""
    start = tensors([5000, 300, 70], torch.float32, device)
    truth, _ = train(lambda p: torch.optim.AdamW(p, lr=1e-2), start, 4)
    params = parameters(start)
    optimizer = BiasAdamW([torch.zeros(0, device=device)], lr=1e-2)
    group = optimizer.param_groups[0]
    for step in range(4):
        grads = tensors([5000, 300, 70], torch.float32, device, 0.1, seed=1 + step)
        for p, g in zip(params, grads, strict=True):
            p.grad = g
            group["params"] = [p]
            optimizer.step()
            group["params"] = []
            p.grad = None
    torch.testing.assert_close(flat(params), truth, rtol=0, atol=1e-6)
    group["params"] = params
    assert [len(s) for s in optimizer.state_dict()["state"].values()] == [3, 3, 3]


def test_closure_hooks_and_versions(device):
    p = torch.ones(3, device=device, requires_grad=True)
    optimizer = BiasAdamW([p])
    seen = []
    optimizer.register_step_post_hook(lambda *args: seen.append(1))

    def closure():
        assert torch.is_grad_enabled()
        optimizer.zero_grad()
        loss = (p * p).sum()
        loss.backward()
        return loss

    version = p._version
    assert optimizer.step(closure) == 3
    assert p._version > version
    assert seen == [1]
    loss = (p * p).sum()
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_gradients_that_are_not_contiguous(device):
    params = [torch.zeros(4, 3, device=device, requires_grad=True) for _ in range(2)]
    grad = tensors([12], torch.float32, device)[0].view(3, 4).t()
    params[0].grad, params[1].grad = grad, grad.contiguous()
    assert not params[0].grad.is_contiguous()
    for p in params:
        BiasAdamW([p]).step()
    assert torch.equal(*params)


@pytest.mark.parametrize("state_bits", [32, 8])
def test_deterministic(device, state_bits):
    """Bit for bit the same on two runs, and with any number of threads."""
    start = tensors([70_001, 1, 40_000, 257], torch.bfloat16, device)
    results = []
    for threads in (1, 2, 2, 3):
        torch.set_num_threads(threads)
        end, optimizer = train(lambda p: BiasAdamW(p, state_bits=state_bits, max_grad_norm=0.5), start, 3)
        results.append((end, optimizer.grad_norm))
    for end, norm in results[1:]:
        assert torch.equal(end, results[0][0])
        assert torch.equal(norm, results[0][1])


def test_more_tensors_and_groups_than_a_launch_takes(device):
    """On CUDA a launch takes 1024 tensors and 32 groups."""
    start = tensors([3] * 2100, torch.float32, device)

    def make_groups(params):
        return [
            {"params": params[:2000]},
            *({"params": [p], "lr": 1e-2 / (i + 1)} for i, p in enumerate(params[2000:])),
        ]

    truth, _ = train(lambda p: torch.optim.AdamW(make_groups(p), lr=1e-2), start, 2)
    ours, optimizer = train(lambda p: BiasAdamW(make_groups(p), lr=1e-2, skip_non_finite=True), start, 2)
    torch.testing.assert_close(ours, truth, rtol=0, atol=1e-6)
    assert optimizer.grad_norm > 0


def test_cuda_stream_graph_and_second_device(device):
    if device.type == "cpu":
        pytest.skip("CUDA only")
    start = tensors(SIZES, torch.float32, device)
    truth, _ = train(lambda p: BiasAdamW(p, lr=1e-2), start, 1)
    params = parameters(start)
    with_grads(params, tensors(SIZES, torch.float32, device, 0.1, seed=1))
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        optimizer = BiasAdamW(params, lr=torch.tensor(1e-2, device=device), max_grad_norm=1e9)
        optimizer.step()
        torch.testing.assert_close(flat(params), truth, rtol=0, atol=1e-6)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            optimizer.step()
        for _ in range(3):
            graph.replay()
    torch.cuda.current_stream().wait_stream(stream)
    assert optimizer.state[params[0]]["step"] == 4
    if torch.cuda.device_count() > 1:
        other, _ = train(lambda p: BiasAdamW(p, lr=1e-2), [p.to("cuda:1") for p in start], 1)
        assert torch.equal(other.to(device), truth)
