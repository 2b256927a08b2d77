"""Losses of fine-tuning, and their gradients, against transformers' model and its sequence classifier."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from fastft.distributed import Ranks
from fastft.errors import DataError
from fastft.methods import ft, icl, pbft
from fastft.models.causal import PackedCausalLM
from fastft.models.loading import load_model
from fastft.models.text import Text
from fastft.tasks import Example, Pattern

PROMPTS = [[45, 6, 11], [8], [5, 5, 90, 91, 92]]
GOLD = [0, 1, 1]
CHOICES = {
    "label words": [[[7], [8]]] * 3,
    "several tokens": [[[7, 9], [8]]] * 3,
    "choices of their own": [[[7, 9], [8]], [[5], [6, 7, 8]], [[4, 4, 4], [5, 5]]],
}


@pytest.fixture(params=["llama", "opt"])
def pair(request, tiny):
    """(fastft's model, transformers' own) with the same weights in float64, all trained."""
    folder = str(tiny(request.param))
    ours = PackedCausalLM(load_model(folder, dtype="float32").double().requires_grad_(True))
    return ours, AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()


def shots(kind: str) -> icl.ChoiceSet:
    return icl.ChoiceSet(PROMPTS, CHOICES[kind], "set", GOLD)


def token_log_probs(model, prompt: list[int], choice: list[int]) -> torch.Tensor:
    ids = torch.tensor([[0, *prompt, *choice]])
    at = torch.arange(len(prompt), len(prompt) + len(choice))
    return model(ids).logits[0].log_softmax(-1)[at, torch.tensor(choice)]


def check(ours: PackedCausalLM, theirs, loss: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=1e-6)
    loss.backward()
    expected.backward()
    for (name, p), (_, q) in zip(ours.model.named_parameters(), theirs.named_parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-5, atol=1e-6, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("kind", CHOICES)
def test_loss_over_the_vocabulary(pair, kind):
    """All tokens of the right label count."""
    ours, theirs = pair
    loss = pbft.vocabulary_loss(ours, shots(kind), [0, 2, 1], leading=[0])
    parts = zip(PROMPTS, CHOICES[kind], GOLD, strict=True)
    expected = -sum(token_log_probs(theirs, p, own[label]).sum() for p, own, label in parts)
    check(ours, theirs, loss, expected)


@pytest.mark.parametrize("kind", CHOICES)
@pytest.mark.parametrize("score", ["mean", "sum"])
def test_loss_over_the_labels(pair, kind, score):
    """The cross entropy of what evaluation scores: -log p(right label) of `icl.classify`."""
    ours, theirs = pair
    loss = pbft.label_loss(ours, shots(kind), [0, 1, 2], leading=[0], score=score)
    prefix = ours.encode_prefix((0,))
    found = icl.classify(ours, shots(kind), Ranks(), prefix=prefix, batch_size=2, score=score).log_probs
    evaluated = -found.gather(1, torch.tensor(GOLD)[:, None]).sum().item()
    assert loss.item() == pytest.approx(evaluated, rel=1e-6)
    expected = 0.0
    for prompt, own, label in zip(PROMPTS, CHOICES[kind], GOLD, strict=True):
        parts = [token_log_probs(theirs, prompt, choice) for choice in own]
        scores = torch.stack([p.mean() if score == "mean" else p.sum() for p in parts])
        expected = expected - scores.log_softmax(-1)[label]
    check(ours, theirs, loss, expected)


class DenseReluOutput(nn.Module):
    """The default head of uds-lsv/llmft in plain PyTorch, its dropout apart."""

    def __init__(self, hidden_size: int, num_labels: int):
        super().__init__()
        self.dense, self.output = nn.Linear(hidden_size, hidden_size), nn.Linear(hidden_size, num_labels)

    def forward(self, hidden):
        return self.output(torch.relu(self.dense(hidden)))


@pytest.mark.parametrize("head", ["linear", "mlp"])
@pytest.mark.parametrize("kind", ["llama", "opt"])
def test_a_head_is_that_of_a_sequence_classifier(tiny, kind, head):
    """Loss, gradients and log-probabilities equal transformers' ForSequenceClassification with the same head."""
    ours = PackedCausalLM(load_model(str(tiny(kind)), dtype="float32").double().requires_grad_(True))
    theirs = AutoModelForSequenceClassification.from_pretrained(tiny(kind), num_labels=3, dtype=torch.float64).eval()
    if head == "mlp":
        theirs.score = DenseReluOutput(32, 3).double()
    trained = ft.replace_head(ours, 3, head)
    trained = {name.replace("lm_head", "score"): p for name, p in trained.items()}
    with torch.no_grad():
        for name, p in trained.items():
            p.normal_(std=0.1)  # the biases are 0 at first
            theirs.get_parameter(name).copy_(p)
    examples = icl.ChoiceSet(PROMPTS, [[[0], [1], [2]]] * 3, "set", [2, 0, 1])
    loss = pbft.vocabulary_loss(ours, examples, [0, 1, 2], leading=[0])
    logits = torch.cat([theirs(torch.tensor([[0, *prompt]])).logits for prompt in PROMPTS])
    found = icl.classify(ours, examples, Ranks(), prefix=ours.encode_prefix((0,)), batch_size=2)
    torch.testing.assert_close(found.log_probs, logits.log_softmax(-1), rtol=1e-6, atol=1e-6)
    assert found.is_label.all()  # there is nothing else that it could say
    expected = torch.nn.functional.cross_entropy(logits, torch.tensor(examples.gold), reduction="sum")
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=1e-6)
    loss.backward()
    expected.backward()
    gradients = dict(ours.model.named_parameters()) | trained
    assert {name for name, _ in theirs.named_parameters() if "score" in name} == trained.keys()
    for name, p in theirs.named_parameters():
        torch.testing.assert_close(gradients[name].grad, p.grad, rtol=1e-5, atol=1e-6)


def test_a_new_mlp_head(tiny):
    """Weights from N(0, init_std), biases zero; the model's dropout only where asked for, and only in training."""
    ours = PackedCausalLM(load_model(str(tiny("opt")), dtype="float32"))
    ours.model.config.init_std = 0.5
    dense, dense_bias, output, output_bias = ft.replace_head(ours, 3, "mlp", dropout=True).values()
    assert dense.shape == (32, 32) and output.shape == (3, 32)
    assert dense.std().item() == pytest.approx(0.5, rel=0.1) and output.std().item() == pytest.approx(0.5, rel=0.3)
    assert not dense_bias.any() and dense_bias.shape == (32,) and not output_bias.any() and output_bias.shape == (3,)

    def zeros() -> float:
        return ours.head(torch.ones(200, 32), lambda features, weight: features).eq(0).float().mean().item()

    ours.eval()
    negative = zeros()
    ours.train()
    assert ours.head.dropout == 0.1
    assert zeros() == pytest.approx(1 - 0.9 * (1 - negative), abs=0.02) and zeros() > negative
    ft.replace_head(ours, 3, "mlp")
    assert ours.head.dropout == 0.0


@pytest.mark.parametrize("kind", ["llama", "opt"])
@pytest.mark.parametrize("side", ["right", "left"])
def test_examples_are_cut_as_by_transformers(tiny, kind, side):
    """Against the call of uds-lsv/llmft's preprocess_function: the filled pattern, special tokens counted."""
    tokenizer = AutoTokenizer.from_pretrained(tiny(kind), truncation_side=side)
    examples = [Example({"text1": "the mill " * n, "text2": "a goat"}, 0) for n in (1, 3, 30)]
    pattern, text = Pattern("{text1} {text2} ?", (" Yes", " No")), Text(tokenizer)
    whole = icl.encode_queries(pattern, examples, text, behind_demonstrations=False)
    for n in (1 + len(text.leading), 7, 12, 500):
        found = icl.encode_queries(pattern, examples, text, behind_demonstrations=False, max_tokens=n)
        texts = [pattern.ask(example) for example in examples]
        expected = tokenizer(texts, max_length=n, truncation=True).input_ids
        assert [[*text.leading, *prompt] for prompt in found.prompts] == expected
        assert found.cut == sum(a != b for a, b in zip(found.prompts, whole.prompts, strict=True))
        assert found.choices == whole.choices
    assert whole.cut == found.cut == 0


def test_a_cut_that_leaves_nothing_is_refused(tokenizer):
    text, examples = Text(tokenizer), [Example({"text1": "a mill"}, 0)]
    assert len(text.leading) == 1
    with pytest.raises(DataError, match=r"data.max_tokens=1 leaves nothing of an example behind .* 1 leading tokens"):
        icl.encode_queries(
            Pattern("{text1}", (" Yes", " No")), examples, text, behind_demonstrations=False, max_tokens=1
        )


def test_words_that_cannot_be_told_apart(tokenizer):
    text, examples = Text(tokenizer), [Example({"text1": "a mill"}, 0)]
    first = text.encode(" built by anchors")[0]
    words = ("built by anchors", "built nine")
    assert text.encode(" built nine")[0] == first
    queries = icl.encode_queries(Pattern("{text1}", words), examples, text, behind_demonstrations=False)
    assert len(queries.choices[0][0]) > 1
    with pytest.raises(
        DataError, match=r"'.*built by anchors' and ' built nine' cannot be told apart: icl.score=first"
    ):
        icl.encode_queries(Pattern("{text1}", words), examples, text, behind_demonstrations=False, score="first")
    apart = Pattern("{text1}", ("built", "nine goats"))
    queries = icl.encode_queries(apart, examples, text, behind_demonstrations=False, score="first")
    assert [len(choice) for choice in queries.choices[0]] == [1, 1]
    with pytest.raises(DataError, match="both are the same"):
        icl.encode_queries(Pattern("{text1}", ("Yes", "Yes")), examples, text, behind_demonstrations=False)
