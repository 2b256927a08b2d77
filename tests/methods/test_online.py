"""The online teacher against the stored one: losses, gradients, what is computed and when."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from fastft import peft
from fastft.config import Config, DistillConfig, PeftConfig, validate
from fastft.data.sequences import Sequence, Window
from fastft.distributed import Ranks
from fastft.methods import distill
from fastft.methods.online import ContextCache, OnlineTeacher, sample_completions
from fastft.models.attention import PackedSequences
from fastft.models.causal import PackedCausalLM
from fastft.models.loading import load_model
from fastft.models.text import Text

LEADING = [0]
WINDOWS = [Window(f"d{n}", "", (0, *range(20 + n, 20 + n + length))) for n, length in enumerate((13, 5, 9))]
# Neighbours in a batch stand behind different contexts.
SEQUENCES = [
    Sequence(w, "passage", tuple(range(40 + 7 * n, 43 + 7 * n)), tuple(range(200 + 5 * n, 203 + 5 * n + n)))
    for n, w in enumerate((2, 0, 1, 0, 2, 0))
]


def model_of(folder: str) -> PackedCausalLM:
    return PackedCausalLM(load_model(folder, dtype="float32"))


def adapted(folder: str, kind: str) -> tuple[PackedCausalLM, dict[str, nn.Parameter]]:
    """A model whose adapter has moved away from the base."""
    lm = model_of(folder)
    trained = peft.inject(lm.model, PeftConfig(kind=kind, r=2))
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in trained.values():
            p.add_(0.1 * torch.randn(p.shape, generator=generator))
    return lm, trained


class Targets:
    """What the base says behind each sequence's context, in place of a store."""

    head = None

    @torch.no_grad()
    def __init__(self, folder: str, config: DistillConfig):
        lm, self.hidden = model_of(folder), []
        for s in SEQUENCES:
            ids = (*WINDOWS[s.window].token_ids, *s.token_ids)
            hidden = lm(torch.tensor([ids]), PackedSequences([len(ids)]))[-len(s.token_ids) :]
            self.hidden.append(hidden[list(s.target_positions(config.loss_on))])

    def rows(self, sequence: int) -> dict[str, torch.Tensor]:
        return {"hidden": self.hidden[sequence]}


def gradients(loss: torch.Tensor, trained: dict[str, nn.Parameter]) -> dict[str, torch.Tensor]:
    found = torch.autograd.grad(loss, list(trained.values()))
    return dict(zip(trained, found, strict=True))


@pytest.mark.parametrize("options", [{}, {"direction": "jsd", "temperature": 2.0, "loss_on": "completion"}])
@pytest.mark.parametrize(("family", "kind"), [("llama", "lora"), ("opt", "lora"), ("opt", "bitfit")])
def test_loss_and_gradients_are_those_of_stored_targets(tiny, family, kind, options):
    """Six sequences of three contexts, in the first step (contexts are encoded) and in a later one (they are kept)."""
    folder, config = str(tiny(family)), DistillConfig(teacher="online", **options)
    store = Targets(folder, config)
    lm, trained = adapted(folder, kind)
    examples = list(range(len(SEQUENCES)))
    expected = distill.loss_fn(lm, SEQUENCES, examples, store, config, LEADING)
    expected_gradients = gradients(expected, trained)
    assert expected > 0.1

    online = OnlineTeacher(lm, WINDOWS, config)
    for _ in range(2):
        loss = online.loss_fn(lm, SEQUENCES, LEADING)
        torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
        for name, gradient in gradients(loss, trained).items():
            torch.testing.assert_close(gradient, expected_gradients[name], rtol=1e-4, atol=1e-5, msg=name)
    # Outside of the online teacher the model is the student, as before.
    torch.testing.assert_close(distill.loss_fn(lm, SEQUENCES, examples, store, config, LEADING), expected)


def test_a_context_is_encoded_once(tiny, monkeypatch):
    lm, _ = adapted(str(tiny("llama")), "lora")
    online = OnlineTeacher(lm, WINDOWS, DistillConfig(teacher="online"))
    encoded = []
    run = online.lockstep.run

    def spy(call, frozen, *rest):
        encoded.append([tuple(ids[0].tolist()) for ids, packed in frozen if packed.capture is not None])
        return run(call, frozen, *rest)

    monkeypatch.setattr(online.lockstep, "run", spy)
    for examples in ([1, 3], [0, 1, 2], list(range(6))):
        online.loss_fn(lm, [SEQUENCES[i] for i in examples], LEADING)
    contexts = [w.token_ids for w in WINDOWS]
    assert encoded == [[contexts[0]], [contexts[1], contexts[2]], []]


def test_the_least_recently_used_contexts_go_first():
    def prefix(size: int) -> SimpleNamespace:
        return SimpleNamespace(nbytes=size)

    cache = ContextCache(10)
    for window in (0, 1):
        cache.put(window, prefix(4))
    assert cache.get(0).nbytes == 4  # 1 is now the older one
    cache.put(2, prefix(3))
    assert list(cache.prefixes) == [0, 2] and cache.get(1) is None and cache.nbytes == 7
    cache.put(3, prefix(11))  # more than there is room for
    assert not cache.prefixes and cache.nbytes == 0


def settings(**distill_options) -> Config:
    return validate({"output_dir": "unused", "seed": 4, "distill": {"teacher": "online", **distill_options}})


def test_the_student_continues_its_own_prompts(tiny, tokenizer):
    lm, _ = adapted(str(tiny("llama")), "lora")
    text, config = Text(tokenizer), settings(on_policy=1.0, on_policy_tokens=7)
    everything = list(range(len(SEQUENCES)))
    sampled = sample_completions(lm, SEQUENCES, everything, config, text, Ranks(), step=3)
    assert sorted(sampled) == everything
    for i, new in sampled.items():
        assert (new.window, new.prompt) == (SEQUENCES[i].window, SEQUENCES[i].prompt)
        ends = [n for n in range(len(new.completion)) if text.ends_line(list(new.completion[: n + 1]))]
        assert len(new.completion) == (ends[0] + 1 if ends else 7)

    # However a step's examples are dealt out, and with no memory of what was drawn before.
    parts = [sample_completions(lm, SEQUENCES, part, config, text, Ranks(), step=3) for part in ([5, 1], [0, 2, 3, 4])]
    assert parts[0] | parts[1] == sampled
    assert sample_completions(lm, SEQUENCES, everything, config, text, Ranks(), step=4) != sampled

    # Greedy completions are those of the student, the adapter on and no context in front.
    greedy = settings(on_policy=1.0, on_policy_tokens=7, on_policy_temperature=0.0)
    found = sample_completions(lm, SEQUENCES, [2], greedy, text, Ranks(), step=1)[2].completion
    ids = [*text.leading, *SEQUENCES[2].prompt]
    for token in found:
        hidden = lm(torch.tensor([ids]), PackedSequences([len(ids)]))
        assert (hidden[-1] @ lm.head.weight.t()).argmax() == token
        ids.append(token)


def test_the_share_of_on_policy_examples_is_the_configured_one(tiny, tokenizer):
    lm, config, counts = model_of(str(tiny("llama"))), settings(on_policy=0.3, on_policy_tokens=1), []
    for step in range(100):
        sampled = sample_completions(lm, SEQUENCES, list(range(6)), config, Text(tokenizer), Ranks(), step=step)
        counts.append(len(sampled))
    assert abs(sum(counts) - 180) < 5 * (600 * 0.3 * 0.7) ** 0.5
    assert sample_completions(lm, SEQUENCES, [0], settings(), Text(tokenizer), Ranks(), step=0) == {}
