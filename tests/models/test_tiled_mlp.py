"""An MLP over tiles of tokens computes what it computes over all of them, and holds less."""

from __future__ import annotations

import pytest
import torch

from fastft import peft
from fastft.config import PeftConfig
from fastft.errors import ModelError
from fastft.models.attention import PackedSequences
from fastft.models.causal import PackedCausalLM
from fastft.models.loading import load_model
from fastft.models.recompute import checkpoint_activations
from fastft.models.tiled_mlp import mlp_modules, tile_mlps
from tests.conftest import losses
from tests.engine.test_run import ok

LENGTHS = [60, 41]


@pytest.mark.parametrize("checkpointing", ["none", "full"])
@pytest.mark.parametrize("peft_config", [PeftConfig(kind="lora"), PeftConfig(kind="bitfit", add_biases=True)])
@pytest.mark.parametrize("tokens", [32, 101])
def test_same_hidden_states_and_gradients(tiny, tokens, peft_config, checkpointing):
    found = []
    for tile in (None, tokens):
        lm = PackedCausalLM(load_model(str(tiny("llama")), dtype="float32").double())
        if tile:
            tile_mlps(lm, tile)
        torch.manual_seed(0)
        trained = peft.inject(lm.model, peft_config)
        lm.double()
        checkpoint_activations(lm, checkpointing)
        hidden = lm(torch.arange(5, 106)[None], PackedSequences(LENGTHS))
        hidden.square().sum().backward()
        found.append((hidden.detach(), [p.grad for p in trained.values()]))
    torch.testing.assert_close(found[1], found[0])


def widest(lm: PackedCausalLM, *, trains: bool) -> int:
    """Rows of the largest input that an MLP's last layer sees."""
    rows = []
    for mlp in mlp_modules(lm):
        mlp.down_proj.register_forward_pre_hook(lambda _, args: rows.append(args[0].shape[1]))
    with torch.set_grad_enabled(trains):
        lm(torch.arange(5, 106)[None], PackedSequences(LENGTHS))
    return max(rows)


@pytest.mark.parametrize("trains", [False, True])
def test_intermediates_are_a_tile_wide(tiny, trains):
    lm = PackedCausalLM(load_model(str(tiny("llama")), dtype="float32"))
    peft.inject(lm.model, PeftConfig(kind="lora"))
    assert widest(lm, trains=trains) == 101
    tile_mlps(lm, 32)
    assert widest(lm, trains=trains) == 32


def test_runs_agree(base_config, launch, tmp_path):
    """Teacher, student and evaluation in tiles of 8 tokens; also under ZeRO-3 with an online teacher."""
    found = {}
    for name, tile, stage, teacher in (
        ("whole", None, 0, "stored"),
        ("tiled", 8, 0, "stored"),
        ("zero3", 8, 3, "online"),
    ):
        raw = base_config(
            "llama", model={"mlp_tile": tile}, deepspeed={"zero_stage": stage}, evaluate={"answers": False}
        )
        raw |= {"distill": {"teacher": teacher}, "output_dir": str(tmp_path / name)}
        ok(launch(raw))
        found[name] = torch.tensor(losses(tmp_path / name))
    assert len(found["whole"]) == 4
    for name in ("tiled", "zero3"):
        torch.testing.assert_close(found[name], found["whole"], rtol=1e-4, atol=0)


def test_a_model_without_a_module_for_it_is_refused(tiny):
    lm = PackedCausalLM(load_model(str(tiny("opt")), dtype="float32"))
    with pytest.raises(
        ModelError, match=r"model\.mlp_tile=8: the decoder layers of OPTForCausalLM have no module `mlp`"
    ):
        tile_mlps(lm, 8)
