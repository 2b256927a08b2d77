"""Base and student in one pass against separate passes of each, in float64."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, OPTConfig, OPTForCausalLM

from fastft import peft
from fastft.config import PeftConfig
from fastft.errors import ModelError
from fastft.models.attention import IMPLEMENTATION, PackedSequences, Prefix
from fastft.models.causal import PackedCausalLM
from fastft.models.lockstep import Lockstep
from tests.models.test_attention import COMMON, MODELS, tokens

OTHERS = {
    # Linear layers in front of the decoder's layers and behind them, which are adapted too.
    "opt-projected": lambda: OPTForCausalLM(
        OPTConfig(ffn_dim=32, word_embed_proj_dim=16, max_position_embeddings=64, **COMMON)
    ),
    "opt-dropout": lambda: OPTForCausalLM(
        OPTConfig(
            ffn_dim=32, word_embed_proj_dim=24, max_position_embeddings=64, dropout=0.3, attention_dropout=0.2, **COMMON
        )
    ),
    "neox-dropout": lambda: GPTNeoXForCausalLM(
        GPTNeoXConfig(intermediate_size=32, hidden_dropout=0.3, attention_dropout=0.2, **COMMON)
    ),
}


def adapted(build, kind: str = "lora") -> PackedCausalLM:
    """A float64 model in train mode whose adapter has moved away from the base."""
    torch.manual_seed(0)
    model = build().double().requires_grad_(False)
    model.set_attn_implementation(IMPLEMENTATION)
    trained = peft.inject(model, PeftConfig(kind=kind, r=2, add_biases=True))
    with torch.no_grad():
        for p in trained.values():
            p.add_(0.3 * torch.randn_like(p))
    return PackedCausalLM(model).double().train()


def test_pass(lm: PackedCausalLM, *, seed: int = 5):
    """(teacher's, student's hidden states) of one lockstep pass: two contexts, two sequences behind each."""
    first, second, *queries = tokens(17, 11, 5, 9, 1, 7)
    prefixes = [Prefix(), Prefix()]
    for prefix, context in zip(prefixes, (first, second), strict=True):
        prefix.length = len(context)
    frozen = [(c[None], PackedSequences([len(c)], capture=p)) for c, p in zip((first, second), prefixes, strict=True)]
    ids, lengths = torch.cat(queries)[None], [5, 9, 1, 7]
    frozen.append((ids, PackedSequences(lengths, prefixes=[(p, 2) for p in prefixes])))
    torch.manual_seed(seed)
    return Lockstep(lm).run(lm, frozen, (ids, PackedSequences(lengths)), lambda t, s, weight: (t, s))


test_pass.__test__ = False


@torch.no_grad()
def teacher_alone(lm: PackedCausalLM) -> torch.Tensor:
    first, second, *queries = tokens(17, 11, 5, 9, 1, 7)
    training = lm.training
    lm.eval()
    with peft.adapter_off():
        groups = [(lm.encode_prefix(tuple(c.tolist())), 2) for c in (first, second)]
        hidden = lm(torch.cat(queries)[None], PackedSequences([5, 9, 1, 7], prefixes=groups))
    lm.train(training)
    return hidden


def student_alone(lm: PackedCausalLM, *, seed: int = 5) -> torch.Tensor:
    torch.manual_seed(seed)
    return lm(torch.cat(tokens(17, 11, 5, 9, 1, 7)[2:])[None], PackedSequences([5, 9, 1, 7]))


@pytest.mark.parametrize("kind", ["lora", "bitfit"])
@pytest.mark.parametrize("name", [*MODELS, *OTHERS])
def test_one_pass_gives_what_two_give(name, kind):
    """Also with dropout: none for the teacher, and for the student that of a pass of its own."""
    lm = adapted({**MODELS, **OTHERS}[name], kind)
    expected_teacher, expected_student = teacher_alone(lm), student_alone(lm)
    assert not torch.allclose(expected_teacher, expected_student, atol=0.1)
    teacher, student = test_pass(lm)
    assert lm.training
    assert not teacher.requires_grad
    torch.testing.assert_close(teacher, expected_teacher, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(student, expected_student, rtol=1e-6, atol=1e-6)

    trained = {n: p for n, p in lm.named_parameters() if p.requires_grad}
    seed = torch.randn_like(student)
    found = torch.autograd.grad((student * seed).sum(), list(trained.values()))
    expected = torch.autograd.grad((expected_student * seed).sum(), list(trained.values()))
    for parameter, a, b in zip(trained, found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5, msg=parameter)


def test_the_base_is_the_model_without_an_adapter():
    for kind in ("lora", "bitfit"):
        torch.manual_seed(0)
        plain = MODELS["opt"]().double()
        plain.set_attn_implementation(IMPLEMENTATION)
        torch.testing.assert_close(teacher_alone(adapted(MODELS["opt"], kind)), teacher_alone(PackedCausalLM(plain)))


def test_backward_keeps_nothing_of_the_teacher():
    """Nothing that layers save for backward has or holds the teacher's rows: only the final norm sees all of them."""

    def saved(layers: int) -> dict[int, int]:
        """How many tensors with so many rows of memory are kept."""
        shape = {**COMMON, "num_hidden_layers": layers}
        lm = adapted(lambda: OPTForCausalLM(OPTConfig(ffn_dim=32, word_embed_proj_dim=24, dropout=0.0, **shape)))
        storages = {}

        def keep(t: torch.Tensor) -> torch.Tensor:
            if t.dim() > 1:
                storages[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes() / (24 * t.element_size())
            return t

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
            outputs = test_pass(lm)
        del outputs
        return Counter(storages.values())

    two, four = saved(2), saved(4)
    context_rows, teacher_rows, student_rows = 17 + 11, 22, 22
    assert four[student_rows] > two[student_rows]
    for rows in (context_rows + teacher_rows + student_rows, 17, 11):
        assert four[rows] == two[rows]


def test_a_model_without_known_layers_is_refused():
    lm = adapted(MODELS["opt"])
    lm.model._no_split_modules = None
    with pytest.raises(ModelError, match="teacher=stored"):
        Lockstep(lm)


def test_an_error_leaves_the_model_as_it_was():
    lm = adapted(MODELS["llama-gqa"])
    expected = student_alone(lm)

    def fail(*_):
        raise RuntimeError("no")

    ids = torch.cat(tokens(4))[None]
    lockstep = Lockstep(lm)
    frozen = [(ids, PackedSequences([4]))]
    with pytest.raises(RuntimeError, match="no"):
        lockstep.run(lm, frozen, (ids, PackedSequences([4])), fail)
    broken = lm.layers[1].mlp.register_forward_hook(fail)
    with pytest.raises(RuntimeError, match="no"):
        lockstep.run(lm, frozen, (ids, PackedSequences([4])), lambda *a: a)
    broken.remove()
    assert all(m.training for m in lm.modules())
    torch.testing.assert_close(student_alone(lm), expected)
