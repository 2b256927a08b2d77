"""Models of other families: the same as transformers' own attention, or refused with the reason."""

from __future__ import annotations

import pytest
import torch
import transformers

from fastft.errors import ModelError
from fastft.models.attention import IMPLEMENTATION, PackedSequences
from fastft.models.causal import PackedCausalLM
from fastft.models.loading import max_positions, prepare_model

SIZES = {
    "vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2,
}  # fmt: skip
CLOSE = {"rtol": 1e-5, "atol": 1e-5}  # transformers' norms are float32 in a float64 model, ours are not
ALIKE = ["Mistral", "Phi3", "Qwen3", "Olmo2", "Starcoder2", "SmolLM3", "Gemma", "Cohere2"]


def build(family: str, **values) -> transformers.PreTrainedModel:
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**SIZES, **values)
    return getattr(transformers, f"{family}ForCausalLM")(config).double().eval()


@pytest.mark.parametrize("family", ALIKE)
def test_a_packed_model_gives_transformers_hidden_states(family):
    values = {"logit_scale": 1.0} if family == "Cohere2" else {}
    plain, packed = build(family, **values), build(family, **values)
    lm = PackedCausalLM(prepare_model(packed, family, attention="auto", dropout=False))
    lengths = [7, 4]
    ids = torch.randint(3, 97, (1, sum(lengths)))
    with torch.no_grad():
        found = lm(ids, PackedSequences(lengths))
        expected = torch.cat([plain.get_decoder()(part).last_hidden_state[0] for part in ids.split(lengths, 1)])
    torch.testing.assert_close(found, expected, **CLOSE)


@pytest.mark.parametrize(("context", "fits"), [(5, True), (6, False)])
def test_a_sliding_window_is_not_exceeded(context, fits):
    model = build("Mistral", sliding_window=8)
    assert max_positions(model.config) == 8
    lm = PackedCausalLM(prepare_model(model, "m", attention="auto", dropout=False))
    prefix = lm.encode_prefix(tuple(range(3, 3 + context)))
    run = lambda: lm(torch.tensor([[9, 8, 7]]), PackedSequences([3], prefixes=[(prefix, 1)]))  # noqa: E731
    with torch.no_grad():
        if fits:
            plain = build("Mistral", sliding_window=8)
            expected = plain.get_decoder()(torch.tensor([[*range(3, 3 + context), 9, 8, 7]])).last_hidden_state[0, -3:]
            torch.testing.assert_close(run(), expected, **CLOSE)
        else:
            with pytest.raises(ModelError, match=r"sees 8 positions \(sliding_window\).*have 9.*data\.window\.tokens"):
                run()


def test_a_window_that_no_layer_uses_limits_nothing():
    config = transformers.Qwen2Config(**SIZES, use_sliding_window=False, sliding_window=8)
    assert max_positions(config) == 64


@pytest.mark.parametrize(
    ("family", "values", "name"),
    [
        ("GptOss", {"num_local_experts": 2, "num_experts_per_tok": 1}, "s_aux"),
        ("Gemma2", {"final_logit_softcapping": None, "attn_logit_softcapping": 50.0}, "softcap=50.0"),
    ],
)
def test_attention_that_computes_something_else_is_refused(family, values, name):
    model = build(family, **values)
    model.set_attn_implementation(IMPLEMENTATION)
    with pytest.raises(ModelError, match=name), torch.no_grad():
        PackedCausalLM(model)(torch.tensor([[3, 4, 5]]), PackedSequences([3]))
