"""The least that calls have to compute and to move: counted by hand, from what a trace of real calls records."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile, record_function
from torch.utils.flop_counter import flop_registry

from fastft import ops
from fastft.ops import _extension
from fastft.ops.frozen_weight import Weight4bit, Weight8bit, quantise_4bit
from fastft.optim import BiasAdamW
from fastft.report.floors import COUNTS, floor, kernels
from fastft.report.trace import Trace, analyse

pytestmark = pytest.mark.skipif(not ops.available(), reason="the extension is not built")
BF16 = torch.bfloat16
DEVICE = {"flops": 1e12, "bandwidth": 1e10}


@pytest.fixture
def recorded(tmp_path):
    """function -> its calls whose floor is counted, as a run's report.json has them."""

    def record(function) -> dict[str, dict]:
        _extension.load()
        with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as profiler, record_function("fastft.step"):
            function()
        path = tmp_path / "trace.json"
        profiler.export_chrome_trace(str(path))
        return {call["name"]: call for call in analyse(Trace.read(path))["calls"]}

    return record


def counted(call: dict) -> tuple[float, float]:
    found = floor(call, DEVICE)
    assert found["floor_s"] == pytest.approx(max(found["flops"] / 1e12, found["bytes"] / 1e10))
    return found["flops"], found["bytes"]


def test_every_compiled_op_has_a_floor():
    """But for two that look at one number a row."""
    _extension.load()
    compiled = {schema.name for schema in torch._C._jit_get_all_schemas() if schema.name.startswith("fastft::")}
    assert len(compiled) > 15
    compiled -= {"fastft::row_reduce", "fastft::index_check"}
    assert compiled == {name for name in COUNTS if name.startswith("fastft::")}


def random(*shape: int, dtype: torch.dtype = BF16) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0)).to(dtype)


def products() -> None:
    random(3, 5) @ random(5, 7)
    torch.addmm(random(7), random(3, 5), random(5, 7))
    random(3, 7).addmm_(random(3, 5), random(5, 7))
    random(2, 3, 5) @ random(2, 5, 7)
    x, a, b = (nn.Parameter(random(*shape)) for shape in ((9, 7), (4, 7), (7, 4)))
    ops.lora_linear(x, random(7, 7), a, b, 2.0).sum().backward()


@pytest.mark.parametrize(
    ("name", "flops", "numbers"),  # of 2 bytes each
    [
        ("aten::bmm", 2 * 2 * 3 * 5 * 7, 2 * (15 + 35 + 21)),
        ("aten::addmm", 2 * 3 * 5 * 7, 15 + 35 + 21),
        ("aten::addmm_", 2 * 3 * 5 * 7, 15 + 35 + 2 * 21),
        ("fastft::lora_up", 2 * 9 * 7 * 4, 2 * 63 + 36 + 28),
    ],
)
def test_products(recorded, name, flops, numbers):
    assert counted(recorded(products)[name]) == (flops, 2 * numbers)


def test_summed_products():
    """A call as a GPU's trace has it: [9, 7] @ [11, 7]^T + [9, 4] @ [11, 4]^T + bias."""
    shapes = [[[9, 7], [9, 4]], [[11, 7], [11, 4]], [11], [9, 11]]
    call = {"name": "fastft::summed_products", "shapes": shapes, "scalars": [""] * 4}
    call["types"] = ["TensorList", "TensorList", "c10::BFloat16", "c10::BFloat16"]
    assert counted(call) == (2 * 9 * 11 * (7 + 4), 2 * (9 * 11 + 11 * 11 + 11 + 99))


def test_losses_through_the_head(recorded):
    hidden = nn.Parameter(random(9, 5))
    calls = recorded(lambda: ops.linear_log_softmax_kl(hidden, random(9, 5), random(11, 5)).backward())
    # Student, teacher and the hidden states' gradient: three products.
    assert counted(calls["fastft::linear_log_softmax_kl"]) == (3 * 2 * 9 * 5 * 11, 2 * (2 * 45 + 55 + 45))
    # The rows of logits inside of it: 13 operations for the divergence, 3 for the gradient that replaces the student's.
    assert counted(calls["fastft::log_softmax_kl_rows"]) == (16 * 99, 2 * 3 * 99)

    ids = torch.arange(3).expand(9, 3).contiguous()
    calls = recorded(lambda: ops.linear_topk_kl(hidden, random(11, 5), ids, torch.full((9, 3), -3.0)).backward())
    assert counted(calls["fastft::linear_topk_kl"])[0] == 2 * 2 * 9 * 5 * 11
    assert counted(calls["fastft::topk_kl_rows"]) == (6 * 99, 2 * 2 * 99 + 27 * (8 + 4))

    calls = recorded(lambda: ops.linear_cross_entropy(hidden.detach(), random(11, 5), ids[:, 0].contiguous()))
    assert counted(calls["fastft::linear_cross_entropy"])[0] == 2 * 9 * 5 * 11
    assert counted(calls["fastft::cross_entropy_rows"]) == (4 * 99, 2 * 99 + 9 * 8)  # nobody asks for a gradient


def test_rows_of_logits(recorded):
    student = nn.Parameter(random(9, 11, dtype=torch.float32))
    calls = recorded(lambda: ops.log_softmax_kl(student, random(9, 11, dtype=torch.float32)).backward())
    assert counted(calls["fastft::log_softmax_kl"]) == (13 * 99, 4 * 2 * 99)
    assert counted(calls["fastft::log_softmax_kl_backward"]) == (9 * 99, 4 * 3 * 99)


def test_relu(recorded):
    x = nn.Parameter(random(3, 21))
    calls = recorded(lambda: ops.relu(x).sum().backward())
    assert counted(calls["fastft::relu"]) == (63, 2 * 2 * 63 + 8)
    assert counted(calls["fastft::relu_backward"]) == (63, 2 * 2 * 63 + 8)


def test_rms_norm(recorded):
    x, weight = nn.Parameter(random(3, 21)), nn.Parameter(random(21))
    calls = recorded(lambda: ops.rms_norm(x, weight, 1e-5).sum().backward())
    assert counted(calls["fastft::rms_norm"]) == (4 * 63, 2 * (2 * 63 + 21) + 4 * 3)
    assert counted(calls["fastft::rms_norm_backward"]) == (10 * 63, 2 * (3 * 63 + 2 * 21) + 4 * 3)
    calls = recorded(lambda: ops.rms_norm(x, weight.detach().float(), 1e-5).sum().backward())
    assert counted(calls["fastft::rms_norm"])[1] == 2 * 63 + 4 * (21 + 63 + 3)
    assert counted(calls["fastft::rms_norm_backward"]) == (8 * 63, 2 * 2 * 63 + 4 * (63 + 21 + 3))


def test_rotary_and_swiglu(recorded):
    q, k = nn.Parameter(random(1, 4, 3, 16)), nn.Parameter(random(1, 2, 3, 16))
    cos, sin = random(1, 3, 8), random(1, 3, 8)
    calls = recorded(lambda: sum(y.sum() for y in ops.rotary(q, k, cos, sin)).backward())
    # Half of each head is rotated; forward and backward are one operator.
    assert counted(calls["fastft::rotary"]) == (3 * 8 * 3 * 6, 2 * (2 * 16 * 3 * 6 + 2 * 3 * 8))
    gate, up = nn.Parameter(random(3, 21)), nn.Parameter(random(3, 21))
    calls = recorded(lambda: ops.swiglu(gate, up).sum().backward())
    assert counted(calls["fastft::swiglu"]) == (5 * 63, 2 * 3 * 63)
    assert counted(calls["fastft::swiglu_backward"]) == (10 * 63, 2 * 5 * 63)


def test_quantised_weights(recorded):
    code, weight = torch.linspace(-1, 1, 16), random(4, 64)
    packed, absmax = quantise_4bit(weight, code)
    quantised = Weight4bit((4, 64), packed, code, absmax)
    rows = Weight8bit(torch.ones(4, 64, dtype=torch.int8), torch.ones(4))
    out = torch.empty(2, 64, dtype=BF16)
    calls = recorded(lambda: (quantise_4bit(weight, code), quantised.dequantise(0, 2, out), rows.dequantise(0, 2, out)))
    assert counted(calls["fastft::quantise_4bit"]) == (7 * 256, 2 * 256 + 128 + 4 * 4)
    assert counted(calls["fastft::dequantise_4bit"]) == (128, 64 + 2 * 4 + 2 * 128)
    assert counted(calls["fastft::dequantise_8bit"]) == (128, 128 + 2 * 4 + 2 * 128)


@pytest.mark.parametrize(
    ("options", "dtype", "nbytes"),
    [
        ({}, torch.float32, 3 * 4 + 2 * 2 * 4),  # parameter read and written, gradient read, two moments twice
        ({"state_bits": 8}, torch.float32, 3 * 4 + 2 * 2 * 1),
        ({"master_weights": True}, BF16, 3 * 2 + 2 * 3 * 4),
    ],
)
def test_bias_adamw(recorded, options, dtype, nbytes):
    parameters = [nn.Parameter(random(n, dtype=dtype)) for n in (300, 500)]
    for p in parameters:
        p.grad = random(p.numel(), dtype=dtype)
    optimizer = BiasAdamW(parameters, lr=1e-3, **options)
    optimizer.step()
    blocks = 2 + 2 if "state_bits" in options else 0  # of 256 elements; a scale for each moment is read and written
    assert counted(recorded(optimizer.step)["fastft::bias_adamw"]) == (14 * 800, 800 * nbytes + 2 * 2 * 4 * blocks)


def attend(lengths, *, keys=None, prefix=0, heads=(6, 2), width=8, causal=True, used=None):
    queries, keys = (torch.tensor([0, *itertools.accumulate(n)]).int() for n in (lengths, keys or lengths))
    q, k = random(int(queries[-1]), heads[0], width), random(int(keys[-1]), heads[1], width)
    shared = random(prefix, heads[1], width) if prefix else None
    return ops.attention(
        q, k, k, queries, keys, scale=1.0, is_causal=causal, prefix_k=shared, prefix_v=shared, seqused_k=used
    )


def test_attention_is_counted_as_by_hand(recorded):
    """Two sequences of three tokens behind five: 6 + 6 pairs of their own and 30 with the prefix, for each head."""
    operations, nbytes = counted(recorded(lambda: attend([3, 3], prefix=5))["fastft::attention"])
    assert operations == 4 * 6 * 8 * (6 + 6 + 30)
    assert nbytes == 2 * 8 * (2 * 6 * 6 + 2 * 2 * (6 + 5)) + 4 * 6 * 6  # six query heads, two of keys; lse is float


def test_attention_of_one_sequence_is_what_torch_counts(recorded):
    call = recorded(lambda: attend([7], heads=(6, 6), causal=False))["fastft::attention"]
    aten, shape = torch.ops.aten, (1, 6, 7, 8)
    assert counted(call)[0] == flop_registry[aten._scaled_dot_product_flash_attention](*[random(*shape)] * 3)

    rows = [nn.Parameter(random(7, 6, 8, dtype=torch.float32)) for _ in range(3)]
    ends = torch.tensor([0, 7]).int()
    calls = recorded(lambda: ops.attention(*rows, ends, scale=1.0, is_causal=False)[0].sum().backward())
    operations, nbytes = counted(calls["fastft::attention_backward"])
    assert operations == flop_registry[aten._scaled_dot_product_flash_attention_backward](*[random(*shape)] * 4)
    assert nbytes == 4 * 8 * (8 * 7 * 6) + 4 * 7 * 6  # grad, q, k, v, out, dq, dk, dv; and lse


def visible(lengths, keys, causal: bool) -> int:
    """Pairs, one by one."""
    return sum(
        not causal or place <= m - n + i
        for n, m in zip(lengths, keys, strict=True)
        for i in range(n)
        for place in range(m)
    )


@pytest.mark.parametrize(
    ("lengths", "keys", "causal"),
    [
        ([1, 9], None, True),
        ([4, 4, 4], None, True),
        ([5, 1, 8], [7, 4, 9], True),
        ([1, 1, 1], [7, 4, 9], True),  # decoding: exact
        ([2, 3], [4, 1], False),
        ([5], [3], False),
    ],
)
def test_no_lengths_of_these_totals_need_less_attention_than_the_floor(recorded, lengths, keys, causal):
    operations, _ = counted(recorded(lambda: attend(lengths, keys=keys, causal=causal))["fastft::attention"])
    pairs = operations / (4 * 6 * 8)
    assert 0 < pairs <= visible(lengths, keys or lengths, causal)
    totals = sum(lengths), sum(keys or lengths)
    ways = [
        [w for w in itertools.product(range(1, total + 1), repeat=len(lengths)) if sum(w) == total] for total in totals
    ]
    least = min(
        visible(n, m, causal)
        for n, m in itertools.product(*ways)
        if not causal or all(b >= a for a, b in zip(n, m, strict=True))
    )
    assert pairs <= least
    if keys is None or max(lengths) == 1:
        assert pairs > least - len(lengths) / 8  # lengths that are equal but for one token


def test_room_in_a_cache_is_not_counted(recorded):
    used = torch.tensor([3, 5]).int()
    call = recorded(lambda: attend([1, 1], keys=[40, 40], used=used))["fastft::attention"]
    assert counted(call)[0] == 4 * 6 * 8 * 2


def test_an_operator_is_the_sum_of_its_calls():
    call = {"name": "aten::mm", "shapes": [[3, 5], [5, 7]], "types": ["float"] * 2, "scalars": ["", ""]}
    (row,) = kernels([call | {"calls": 2.0, "seconds": 0.5}, call | {"calls": 1.0, "seconds": 0.1}], DEVICE)
    assert row["calls"] == 3 and row["seconds"] == pytest.approx(1.1)
    assert row["floor_s"] == pytest.approx(3 * floor(call, DEVICE)["floor_s"])
