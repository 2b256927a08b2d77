"""The online teacher against the stored one: losses, gradients, what is computed and when."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fastft import peft
from fastft.config import Config, DistillConfig, PeftConfig
from fastft.data.sequences import Sequence, Window
from fastft.data.store import StoreWriter, TeacherStore
from fastft.distributed import Ranks
from fastft.errors import ModelError
from fastft.methods import distill
from fastft.methods.online import ContextCache, OnlineTeacher, sample_completions
from fastft.models.attention import PackedSequences, Prefix
from fastft.models.causal import PackedCausalLM
from fastft.models.loading import load_model

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


def stored_targets(folder: str, config: DistillConfig, root) -> TeacherStore:
    lm = model_of(folder)
    lengths = [len(s.target_positions(config.loss_on)) for s in SEQUENCES]
    writer = StoreWriter(root / "store", distill.target_specs(config, lm), lengths)
    writer.create()
    distill.teach(lm, WINDOWS, SEQUENCES, config, writer, Ranks(), batch_size=4, advance=lambda n: None)
    writer.finish({})
    return TeacherStore.open(root / "store")


def gradients(loss: torch.Tensor, trained: dict[str, nn.Parameter]) -> dict[str, torch.Tensor]:
    found = torch.autograd.grad(loss, list(trained.values()))
    return dict(zip(trained, found, strict=True))


@pytest.mark.parametrize("options", [{}, {"direction": "jsd", "temperature": 2.0, "loss_on": "completion"}])
@pytest.mark.parametrize(("family", "kind"), [("llama", "lora"), ("opt", "lora"), ("opt", "bitfit")])
def test_loss_and_gradients_are_those_of_stored_targets(tiny, tmp_path, family, kind, options):
    """Six sequences of three contexts, in the first step (contexts are encoded) and in a later one (they are kept)."""
    folder, config = str(tiny(family)), DistillConfig(teacher="online", **options)
    store = stored_targets(folder, config, tmp_path)
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
