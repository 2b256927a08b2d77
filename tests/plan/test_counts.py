"""Parameters and operations, against other ways to count them."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM

from fastft.models.quantized import Packing
from fastft.plan import architecture, hardware
from fastft.plan.memory import Memory, base_bytes
from fastft.plan.roofline import Roofline
from tests.plan.examples import TINY, config, opt_30b, workload


@pytest.mark.parametrize("kind", TINY)
def test_parameters_are_those_of_the_modules(kind):
    """Against the model that transformers makes, with all its weights."""
    with torch.random.fork_rng():
        model = AutoModelForCausalLM.from_config(TINY[kind])
    counts = architecture.count(TINY[kind], config(peft={"kind": "full"}))
    assert counts.parameters == counts.trained == sum(p.numel() for p in model.parameters())
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, torch.nn.Embedding)}
    head = model.get_output_embeddings().weight
    linears = [m.weight for m in model.modules() if isinstance(m, torch.nn.Linear)]
    assert counts.linear == sum(w.numel() for w in linears if w is not head and id(w) not in embeddings)
    assert counts.head == head.numel()


@pytest.mark.parametrize(
    ("name", "parameters"),
    [  # ours: from the tables of arXiv 2205.01068, with OPT-350M's two projections
        ("facebook/opt-125m", 125_239_296),
        ("facebook/opt-350m", 331_196_416),
        ("facebook/opt-1.3b", 1_315_758_080),
        ("facebook/opt-6.7b", 6_658_473_984),
        ("facebook/opt-13b", 12_853_473_280),
        ("facebook/opt-30b", 29_974_540_288),
        ("smollm2-135m", 134_515_008),
    ],
)
def test_published_models(name, parameters):
    c = config(model={"name_or_path": name}, peft={"kind": "lora", "r": 1})
    assert architecture.count(architecture.PUBLISHED[name], c).parameters == parameters


def test_opt_30b():
    """The figures of a count by hand: shapes of 48 layers of 7,168 with a vocabulary of 50,272."""
    H, F, L, V = 7168, 28672, 48, 50272
    _, counts = opt_30b(peft={"kind": "lora", "r": 16})
    assert counts.parameters == 29_974_540_288
    assert counts.linear == counts.quantisable == L * (4 * H * H + 2 * H * F) == 29_595_009_024
    assert (counts.layers, counts.hidden, counts.head) == (L, H, V * H)
    assert counts.trained == counts.added == counts.adapter == L * 16 * (8 * H + 2 * (H + F)) == 99_090_432

    _, bitfit = opt_30b(peft={"kind": "bitfit"})
    biases = L * (4 * H + F + H + 2 * H) + H
    assert biases == 3_791_872
    assert bitfit.trained == biases - L * H == 3_447_808  # without those of the keys
    assert len(bitfit.trained_sizes) == 337
    assert bitfit.added == 0

    _, q_and_v = opt_30b(peft={"kind": "lora", "r": 16, "target_modules": ["q_proj", "v_proj"]})
    assert q_and_v.trained == 22_020_096


def test_classification_heads_of_opt_30b():
    """Trained alone: a matrix of three rows; with a hidden layer also [H, H], and the biases of both."""
    H = 7168
    for head, parameters in (("linear", 3 * H), ("mlp", H * H + H + 3 * H + 3)):
        c = config(method="ft", data={"task": "rte"}, ft={"head": head}, peft={"kind": "head"})
        counts = architecture.count(architecture.PUBLISHED["facebook/opt-30b"], c, num_labels=3)
        assert counts.trained == counts.added == parameters
        assert counts.adapter == parameters - (H + 3 if head == "mlp" else 0)


@pytest.mark.parametrize(("kind", "gb"), [("none", 59.95), ("int8", 30.36), ("nf4", 16.02)])
def test_bytes_of_a_quantised_base(kind, gb):
    c, counts = opt_30b(peft={"kind": "lora"})
    c.model.quantization = kind
    counted = sum(base_bytes(counts, c))
    assert counted / 1e9 == pytest.approx(gb, abs=0.01)
    if kind != "none":
        H, F = 7168, 28672
        shapes = [(H, H)] * 4 + [(F, H), (H, F)]
        packed = 48 * sum(Packing(kind, shape).nbytes for shape in shapes)
        rest = 2 * (counts.parameters - counts.quantisable)
        assert counted == pytest.approx(packed + rest, rel=1e-4)  # code books and alignment apart


def test_keys_and_values_of_a_context():
    c, counts = opt_30b()
    memory = Memory(c, counts, None, workload(), hardware.GPUS["rtx4090"], 1)
    assert memory._prefix_bytes(1) == 1_376_256
    c.model.prefix = "int8"
    assert memory._prefix_bytes(1) == 1_376_256 // 2 * (128 + 4) // 128


def test_operations_of_opt_30b():
    """GFLOP a token at 2,048 tokens, and what encoding a context once saves the teacher."""
    c, counts = opt_30b()
    roofline = Roofline(c, counts, workload([1792], [256]), hardware.GPUS["rtx4090"], 1)
    T = 2048
    forward = (roofline.forward_flops([T]) + roofline.head_flops(T)) / T / 1e9
    assert forward == pytest.approx(61.32, abs=0.01)
    backward = (roofline.linear_flops(T) + 2.5 * roofline.attention_flops(T * T / 2) + roofline.head_flops(T)) / T / 1e9
    assert backward == pytest.approx(63.43, abs=0.01)
    plain = roofline.forward_flops([2048]) + roofline.head_flops(256)
    behind_the_cache = roofline.forward_flops([256], context=1792) + roofline.head_flops(256)
    assert plain / 1e12 == pytest.approx(124.3, abs=0.1)
    assert behind_the_cache / 1e12 == pytest.approx(16.0, abs=0.1)
    assert plain / behind_the_cache == pytest.approx(7.76, abs=0.01)
    assert roofline.forward_flops([1792]) / 1e12 == pytest.approx(108.3, abs=0.1)


@pytest.mark.parametrize("kind", TINY)
def test_operations_are_those_that_torch_counts(kind):
    """Linears and head as counted by torch's dispatcher; it counts attention's whole square, we the causal half."""
    T = 24
    c = config(model={"dtype": "float32"})
    model_config = TINY[kind]
    counts = architecture.count(model_config, c)
    roofline = Roofline(c, counts, workload(sequences=[T]), hardware.GPUS["rtx4090"], 1)
    model = AutoModelForCausalLM.from_config(model_config, attn_implementation="eager")
    with FlopCounterMode(display=False) as counter:
        model(input_ids=torch.zeros(1, T, dtype=torch.long))
    expected = roofline.linear_flops(T) + roofline.attention_flops(T * T) + roofline.head_flops(T)
    if kind == "llama":  # the rotary table is a product too
        expected += 2 * T * (counts.head_size // 2)
    assert counter.get_total_flops() == pytest.approx(expected, rel=0.01)


def test_time_of_a_step_on_a_4090():
    """ROOFLINE: 256 tokens without checkpoints, 30.8 TFLOP for the student, and three products with the head."""
    c, counts = opt_30b(peft={"kind": "bitfit"}, train={"batch_size": 1})
    roofline = Roofline(c, counts, workload([1792], [256]), hardware.GPUS["rtx4090"], 1)
    step = roofline.step()
    assert (step["student_forward"] + step["backward"]) * roofline.rate / 1e12 == pytest.approx(30.5, abs=0.2)
    assert step["head_and_loss"] * roofline.rate == pytest.approx(3 * 2 * 256 * counts.head)
    c.train.activation_checkpointing = "full"
    linears, products = roofline.linear_flops(256), roofline.attention_flops(256 * 256 / 2)
    assert roofline.step()["recompute"] * roofline.rate == pytest.approx(linears * 8 / 12 + products)  # not fc2
    c.train.activation_checkpointing = "attention"  # q, k, v: 3 H^2 of 12 H^2 weights
    assert roofline.step()["recompute"] * roofline.rate == pytest.approx(linears * 3 / 12 + products)
    c.train.activation_checkpointing = "full"
    c.model.quantization = "nf4"
    # Two passes and two thirds; 0.226 s for three with scales of 4 bytes for 64 weights, here of one.
    assert roofline.step()["dequantise"] == pytest.approx(0.226 * 8 / 9 * 2.516 / 2.563, abs=0.001)
