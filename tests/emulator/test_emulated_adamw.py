"""bias_adamw's kernels on the emulator, against fastft.ops.reference in float64 and, 8-bit, the CPU kernel."""

import copy
import ctypes

import pytest
import torch

import fastft.ops
from fastft import ops
from fastft.ops import reference
from fastft.ops.bias_adamw import AdamWPlan, AdamWState
from tests.emulator.launchers import Read

pytestmark = pytest.mark.skipif(not fastft.ops.available(), reason="the extension is not built")

# Around a block of codes and a chunk.
SIZES = [1, 7, 255, 256, 257, 4096, 4097]
HYPERPARAMETERS = [1e-2, 0.9, 0.99, 1e-8, 0.1]
FLOATS = [torch.float32, torch.bfloat16, torch.float16]


def step(emulator, params, grads, state, plan, groups=(HYPERPARAMETERS,), *, lr=None, grad_scale=None, found_inf=None,
         max_grad_norm=0.0, skip_non_finite=False):  # fmt: skip
    """What csrc/torch/bias_adamw.cpp does."""
    pointers = ctypes.c_void_p * len(params)
    param_pointers = pointers(*(p.data_ptr() for p in params))
    grad_pointers = pointers(*(g.data_ptr() for g in grads))
    hyperparameters = torch.tensor(groups, dtype=torch.float64)
    buffers = {**{f"params[{i}]": p for i, p in enumerate(params)},
               **{f"grads[{i}]": Read(g) for i, g in enumerate(grads)}}  # fmt: skip
    optional = {"lr": lr, "grad_scale": grad_scale, "found_inf": found_inf}
    emulator.launch(
        "bias_adamw", buffers, params=ctypes.addressof(param_pointers), grads=ctypes.addressof(grad_pointers),
        tensors=plan.plan.data_ptr(), device_tensors=Read(plan.plan),
        device_chunk_tensor=plan.plan.data_ptr() + len(params) * 48, groups=hyperparameters.data_ptr(),
        count=len(params), chunks=plan.partials.numel(), group_count=len(groups), exp_avg=state.exp_avg,
        exp_avg_sq=state.exp_avg_sq, scales=state.scales, master=state.master, steps=state.steps,
        status=state.status, partials=plan.partials, tickets=state.tickets, total=state.exp_avg.numel(),
        max_grad_norm=max_grad_norm, skip_non_finite=skip_non_finite, is_double=False,
        **{name: Read(x) for name, x in optional.items() if x is not None},
    )  # fmt: skip
    assert not state.tickets.any()


def tensors(sizes, dtype, seed, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    return [(torch.randn(n, generator=generator) * scale).to(dtype) for n in sizes]


def reference_state(params):
    return [{"step": torch.zeros(()), "exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
            for p in params]  # fmt: skip


def flat(values):
    return torch.cat([v.double().flatten() for v in values])


def close(ours, truth, dtype):
    assert (flat(ours) - flat(truth)).abs().max() <= 2 * torch.finfo(dtype).eps * flat(truth).abs().max()


@pytest.mark.parametrize("master", [False, True])
@pytest.mark.parametrize("clip", [0.0, 0.5])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_against_float64(emulator, dtype, clip, master):
    params = tensors(SIZES, dtype, 0)
    state = AdamWState.zeros(params, master_weights=master)
    plan = AdamWPlan.make(state, params, range(len(params)), [len(params)])
    exact = [p.double() for p in params]
    exact_state = reference_state(exact)
    for n in range(1 if dtype != torch.float32 and not master else 3):
        emulator.order(n)
        grads = tensors(SIZES, dtype, 1 + n, 0.1)
        step(emulator, params, grads, state, plan, max_grad_norm=clip)
        norm = reference.bias_adamw(exact, [g.double() for g in grads], exact_state, HYPERPARAMETERS,
                                    max_grad_norm=clip)  # fmt: skip
        assert (state.steps == n + 1).all()
        if clip:
            assert state.status[0].item() == pytest.approx(norm.item(), rel=1e-5)
    close(params, exact, dtype)
    if state.master is not None:
        close([state.views(i, p)["master_param"] for i, p in enumerate(params)], exact, torch.float32)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_eight_bits_are_those_of_the_cpu(emulator, dtype):
    """Step by step from the same state. Codes may differ where a rounding decides, and by more than one where exp_avg
    is almost 0, whose fourth root they are; what they stand for differs by no more than a code of the largest.
    """
    params = tensors(SIZES, dtype, 0)
    state = AdamWState.zeros(params, state_bits=8)
    plan = AdamWPlan.make(state, params, range(len(params)), [len(params)])
    for n in range(3):
        emulator.order(n)
        grads = tensors(SIZES, dtype, 1 + n, 0.1)
        ours, our_state = copy.deepcopy((params, state))
        ops.bias_adamw(params, grads, state, plan, HYPERPARAMETERS, max_grad_norm=0.5)
        step(emulator, ours, grads, our_state, plan, max_grad_norm=0.5)
        assert (flat(ours) - flat(params)).abs().max() <= 2 * torch.finfo(dtype).eps * flat(params).abs().max()
        torch.testing.assert_close(our_state.scales, state.scales, rtol=1e-5, atol=1e-12)
        assert (our_state.exp_avg_sq.int() - state.exp_avg_sq.int()).abs().max() <= 1
        for name in ("exp_avg", "exp_avg_sq"):
            assert (getattr(our_state, name) != getattr(state, name)).double().mean() < 0.02
        for i, p in enumerate(params):
            (m, _), (our_m, _) = (reference.adamw_decode(s.views(i, p)) for s in (state, our_state))
            scale = state.views(i, p)["exp_avg_scale"].repeat_interleave(256)[: p.numel()]
            assert ((our_m - m).abs() <= 4 / 127 * scale).all()


@pytest.mark.parametrize("bits", [32, 8])
@pytest.mark.parametrize("bad", [torch.inf, torch.nan, "found_inf"])
def test_a_step_that_is_skipped_changes_nothing(emulator, bad, bits):
    params = tensors([257, 4097], torch.bfloat16, 0)
    before = [p.clone() for p in params]
    state = AdamWState.zeros(params, state_bits=bits)
    plan = AdamWPlan.make(state, params, [0, 1], [2])
    grads = tensors([257, 4097], torch.bfloat16, 1)
    options = {}
    if bad == "found_inf":
        options["found_inf"] = torch.ones(1)
    else:
        grads[1][-1] = bad
        options["skip_non_finite"] = True
    step(emulator, params, grads, state, plan, **options)
    assert state.status[2] == 1 and not state.steps.any() and not state.exp_avg.any()
    assert torch.equal(flat(params), flat(before))


def test_eight_bits_of_a_gradient_that_is_not_finite(emulator):
    """Only its block is lost."""
    params, grads = tensors([600], torch.float32, 0), tensors([600], torch.float32, 1)
    grads[0][300] = torch.nan
    state = AdamWState.zeros(params, state_bits=8)
    step(emulator, params, grads, state, AdamWPlan.make(state, params, [0], [1]))
    lost = state.scales.view(2, -1).isnan()
    assert lost.tolist() == [[False, True, False]] * 2
    assert params[0].isnan().nonzero().flatten().tolist() == [300]


def test_scale_and_learning_rates_on_the_device(emulator):
    params = tensors([5, 300], torch.float32, 0)
    exact = [p.double() for p in params]
    state = AdamWState.zeros(params)
    plan = AdamWPlan.make(state, params, [0, 1], [1, 1])
    grads = tensors([5, 300], torch.float32, 1, 64.0)
    step(emulator, params, grads, state, plan, [HYPERPARAMETERS, [7.0, *HYPERPARAMETERS[1:]]],
         lr=torch.tensor([1e-2, 1e-3]), grad_scale=torch.tensor([64.0]))  # fmt: skip
    for p, g, lr in zip(exact, grads, (1e-2, 1e-3), strict=True):
        reference.bias_adamw([p], [g.double()], reference_state([p]), [lr, *HYPERPARAMETERS[1:]],
                             grad_scale=torch.tensor(64.0))  # fmt: skip
    close(params, exact, torch.float32)


@pytest.mark.parametrize("groups", [1, 40])
def test_more_than_fits_in_one_launch(emulator, groups):
    """More tensors, or more groups, than a kernel's arguments hold; empty tensors among them."""
    count = 1100 if groups == 1 else 80
    sizes = [i % 3 for i in range(count)]
    params, grads = tensors(sizes, torch.float32, 0), tensors(sizes, torch.float32, 1)
    exact = [p.double() for p in params]
    state = AdamWState.zeros(params)
    plan = AdamWPlan.make(state, params, range(count), [count // groups] * groups)
    rates = [1e-2 * (1 + g) for g in range(groups)]
    emulator.order(2)
    step(emulator, params, grads, state, plan, [[lr, *HYPERPARAMETERS[1:]] for lr in rates], max_grad_norm=1.0)
    assert (state.steps == 1).all()
    clip = 1 / (flat(grads).norm() + 1e-6)
    assert state.status[0].item() == pytest.approx(flat(grads).norm().item(), rel=1e-6)
    for g, lr in enumerate(rates):
        part = slice(g * count // groups, (g + 1) * count // groups)
        reference.bias_adamw(exact[part], [x.double() * clip for x in grads[part]], reference_state(exact[part]),
                             [lr, *HYPERPARAMETERS[1:]])  # fmt: skip
    close(params, exact, torch.float32)
