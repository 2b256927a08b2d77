"""In-context scores against a full forward of transformers' model over each whole prompt."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM

from fastft.distributed import Ranks
from fastft.errors import DataError
from fastft.methods import icl
from fastft.models.causal import PackedCausalLM
from fastft.models.loading import load_model
from fastft.models.text import Text
from fastft.tasks import Example, Pattern

PATTERN = Pattern("{text1} is said of {text2}.\nTrue?", ("Yes", "No"))
EXAMPLES = [
    Example({"text1": "The mill at Orrin", "text2": "Tessa Bray"}, 0),
    Example({"text1": "A goat", "text2": "the ferry"}, 1),
    Example({"text1": "Bronze was too dear then and old anchors were cast", "text2": "a bell"}, 1),
]


@pytest.fixture(params=["llama", "opt"])
def pair(request, tiny):
    """(fastft's model, transformers' own) with the same weights in float64."""
    folder = str(tiny(request.param))
    ours = PackedCausalLM(load_model(folder, dtype="float32").double())
    return ours, AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()


def log_likelihood(model, prompt: list[int], choice: list[int]) -> torch.Tensor:
    ids = torch.tensor([[*prompt, *choice]])
    at = torch.arange(len(prompt) - 1, len(prompt) + len(choice) - 1)
    return model(ids).logits[0].log_softmax(-1)[at, torch.tensor(choice)]


@torch.no_grad()
@pytest.mark.parametrize("shared", [(), (0, 9, 17, 33, 120)])
@pytest.mark.parametrize("score", ["mean", "sum"])
@pytest.mark.parametrize(
    "choices",
    [
        [[[7], [8]]] * 3,
        [[[7, 9], [8]], [[5], [6, 7, 8], [9, 10]], [[4, 4, 4], [5, 5]]],
    ],
    ids=["label words", "choices of their own"],
)
def test_scores_equal_transformers(pair, shared, score, choices):
    ours, theirs = pair
    prompts = [[45, 6, 11], [8], [5, 5, 90, 91, 92]]
    queries = icl.Queries(prompts, choices)
    assert (queries.labels is None) == (len(choices[0][0]) > 1)
    prefix = ours.encode_prefix(shared) if shared else None
    found = icl.classify(ours, queries, Ranks(), prefix=prefix, batch_size=2, score=score)
    for i, (prompt, own) in enumerate(zip(prompts, choices, strict=True)):
        top = theirs(torch.tensor([[*shared, *prompt]])).logits[0, -1].argmax().item()
        assert found.is_label[i] == (top in [choice[0] for choice in own])
    found = found.log_probs
    for values, prompt, own in zip(found, prompts, choices, strict=True):
        parts = [log_likelihood(theirs, [*shared, *prompt], choice) for choice in own]
        scores = torch.stack([p.mean() if score == "mean" else p.sum() for p in parts])
        torch.testing.assert_close(values[: len(own)], scores.log_softmax(-1), rtol=1e-5, atol=1e-5)
        assert (values[len(own) :] == -torch.inf).all()


@torch.no_grad()
def test_label_words_and_likelihoods_agree(pair):
    """One-token labels by the head's rows, and by log-likelihood over the vocabulary: the same distribution."""
    ours, _ = pair
    queries = icl.Queries([[45, 6, 11], [8], [5, 5]], [[[7], [8]]] * 3)
    prefix = ours.encode_prefix((0, 9, 17))
    found = icl.classify(ours, queries, Ranks(), prefix=prefix, batch_size=8).log_probs
    mixed = icl.Queries([*queries.prompts, [3]], [*queries.choices, [[7, 8], [9]]])
    assert mixed.labels is None
    by_likelihood = icl.classify(ours, mixed, Ranks(), prefix=prefix, batch_size=8).log_probs[:3]
    torch.testing.assert_close(by_likelihood, found, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("num_shots", [0, 2])
def test_the_parts_are_the_tokens_of_the_whole_prompt(tokenizer, num_shots):
    text = Text(tokenizer)
    shared = icl.encode_demonstrations(PATTERN, EXAMPLES[:num_shots], text)
    queries = icl.encode_queries(PATTERN, EXAMPLES, text, behind_demonstrations=num_shots > 0)
    for example, prompt, own in zip(EXAMPLES, queries.prompts, queries.choices, strict=True):
        for words, ids in zip((" Yes", " No"), own, strict=True):
            parts = [*map(PATTERN.demonstrate, EXAMPLES[:num_shots]), PATTERN.ask(example) + words]
            assert [*shared, *prompt, *ids] == tokenizer("\n\n".join(parts)).input_ids
    assert queries.longest == max(map(len, queries.prompts)) + max(len(c) for c in queries.choices[0])


def test_a_prompt_that_is_too_long_says_how_many_shots_fit():
    needed = icl.Queries([[1] * 10], [[[2], [3, 4]]]).longest
    icl.check_room((0,) * 88, needed, 100, iter(()))
    icl.check_room((0,) * 1000, needed, None, iter(()))
    with pytest.raises(DataError, match="12 with its answer, but the model has 100 positions; 4 demonstrations fit"):
        icl.check_room((0,) * 89, needed, 100, iter([(6, 90), (4, 60), (2, 30)]))
    with pytest.raises(DataError, match="no demonstration fits"):
        icl.check_room((0,) * 89, needed, 20, iter([(2, 30), (0, 1)]))


def test_calibration_makes_content_free_inputs_undecided(pair):
    """p / p_cf: the mean content-free input comes out uniform, and probabilities stay in proportion."""
    ours, _ = pair
    queries = icl.Queries([[45, 6, 11], [8], [5, 5]], [[[7], [8], [9]]] * 3)
    found = icl.classify(ours, queries, Ranks(), prefix=None, batch_size=2)
    one = icl.classify(ours, icl.Queries([[8]], queries.choices[:1]), Ranks(), prefix=None, batch_size=2)
    undecided = icl.calibrate(one, one).log_probs.exp()
    torch.testing.assert_close(undecided, torch.full((1, 3), 1 / 3, dtype=torch.float64))
    bias = found.log_probs.exp().mean(0)
    expected = found.log_probs.exp() / bias
    calibrated = icl.calibrate(found, found)
    torch.testing.assert_close(calibrated.log_probs.exp(), expected / expected.sum(-1, keepdim=True))
    assert torch.equal(calibrated.is_label, found.is_label)
