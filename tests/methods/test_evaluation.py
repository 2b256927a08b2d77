"""Answer likelihood against transformers, text metrics, recovery."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM

from fastft.data.sequences import Window
from fastft.distributed import Ranks
from fastft.methods.evaluation import (
    QuestionSet,
    answer_job,
    evaluate,
    normalize,
    recovery,
    token_f1,
    truncated_nll,
)
from fastft.models.causal import PackedCausalLM
from fastft.models.generation import generate
from fastft.models.loading import load_model
from fastft.models.text import Text


@pytest.fixture(params=["llama", "opt"])
def pair(request, tiny):
    """(fastft's model, transformers' own) with the same weights in float64."""
    folder = str(tiny(request.param))
    ours = PackedCausalLM(load_model(folder, dtype="float32").double())
    return ours, AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()


@torch.no_grad()
def test_answer_job_equals_transformers(pair):
    ours, theirs = pair
    context = [0, 9, 17, 33, 120]
    items = [([45, 6], [[70, 71, 72], [9], [70, 8]]), ([8], [[300]]), ([5, 5, 5], [[4, 399], [4, 7, 1]])]
    for prefix, front in ((None, [0]), (ours.encode_prefix(tuple(context)), context)):
        [(_, (found, _))] = ours.each([answer_job(ours, items, prefix=prefix, leading=[0])])
        pairs = [(prompt, answer) for prompt, answers in items for answer in answers]
        for value, (prompt, answer) in zip(found, pairs, strict=True):
            ids = torch.tensor([front + prompt + answer])
            log_probs = theirs(ids).logits[0].log_softmax(-1)
            at = torch.arange(ids.shape[1] - len(answer) - 1, ids.shape[1] - 1)
            expected = -log_probs[at, torch.tensor(answer)].sum()
            torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-6)


@torch.no_grad()
def test_windows_are_scored_apart(pair, tokenizer):
    """Of several windows each question gets its best; the first one alone is what a cut prompt holds."""
    ours, _ = pair
    windows = [Window("d", "", (0, 9, 17, 33)), Window("d", "", (0, 200, 310, 42, 7))]
    prompts, answers = [[45, 6], [8], [5, 5]], [[[70, 71]], [[300], [4]], [[399]]]

    def scores(*chosen):
        questions = QuestionSet("d", list(chosen), prompts, answers, [("a",)] * 3, ["q"] * 3)
        return evaluate(ours, [questions], Text(tokenizer), Ranks(), in_context=True, batch_size=2)[0]

    both, first, second = scores(*windows), scores(windows[0]), scores(windows[1])
    assert both.nll_first_window == pytest.approx(first.nll) and first.nll == first.nll_first_window
    assert both.nll <= min(first.nll, second.nll)
    assert truncated_nll([both, both]) == pytest.approx(first.nll_per_token)


@torch.no_grad()
def test_greedy_generation_equals_transformers(pair):
    ours, theirs = pair
    context, prompts = [0, 9, 17, 33], [[45, 6, 80], [8], [5, 5]]
    found = generate(ours, prompts, stop=lambda ids: False, max_new_tokens=8, prefix=ours.encode_prefix(tuple(context)))
    for prompt, new in zip(prompts, found, strict=True):
        ids = torch.tensor([context + prompt])
        for _ in range(8):
            ids = torch.cat([ids, theirs(ids).logits[:, -1:].argmax(-1)], 1)
        assert new == ids[0, len(context) + len(prompt) :].tolist()


@torch.no_grad()
def test_sampling_depends_on_the_seed_and_not_on_the_batch(pair):
    ours, _ = pair
    options = {"stop": lambda ids: False, "max_new_tokens": 6, "temperature": 1.0}
    together = generate(ours, [[4], [5], [6]], seeds=[1, 2, 3], **options)
    assert generate(ours, [[5]], seeds=[2], **options) == together[1:2]
    assert generate(ours, [[5]], seeds=[7], **options) != together[1:2]


@torch.no_grad()
def test_sampling_follows_the_distribution(pair):
    """First tokens of 4000 samples: within 5 standard deviations of the model's own probabilities."""
    ours, theirs = pair
    count = 4000
    sampled = generate(
        ours, [[4]] * count, seeds=list(range(count)), stop=lambda ids: True, keep_stop=True, max_new_tokens=1,
        temperature=1.0,
    )  # fmt: skip
    frequency = torch.bincount(torch.tensor(sampled).flatten(), minlength=400).double() / count
    expected = theirs(torch.tensor([[4]])).logits[0, -1].softmax(-1)
    assert ((frequency - expected).abs() <= 5 * (expected * (1 - expected) / count).sqrt() + 1 / count).all()


def test_text_metrics():
    assert normalize("The  Cat, a dog!") == "cat dog"
    assert token_f1("the red cat", "red cat") == 1.0
    assert token_f1("red dog", "red cat") == 0.5
    assert token_f1("", "cat") == 0.0


def test_recovery():
    assert recovery(5.0, 3.5, 3.0) == 0.75
    assert recovery(3.0, 3.0, 3.0) is None
