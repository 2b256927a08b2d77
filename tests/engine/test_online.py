"""Runs with distill.teacher=online: the losses of a stored teacher, on any number of ranks and in any ZeRO stage."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.conftest import losses
from tests.engine.test_run import ok, summary_of

ALL = {"documents": None, "control_documents": 0}  # three contexts


def run(launch, raw: dict, *overrides: str, processes: int = 1) -> torch.Tensor:
    ok(launch(raw, *overrides, processes=processes))
    return torch.tensor(losses(Path(raw["output_dir"])))


@pytest.mark.parametrize(("family", "kind"), [("llama", "lora"), ("opt", "bitfit")])
def test_an_online_teacher_trains_as_a_stored_one(base_config, launch, tmp_path, family, kind):
    """Three contexts, of which at most one is kept: each step encodes some and finds others."""
    shared = {"data": ALL, "peft": {"kind": kind}, "evaluate": {"answers": False}}
    shared["train"] = {"steps": 12, "batch_size": 5, "lr": 1e-2}
    stored = base_config(family, **shared)
    expected = run(launch, stored)
    assert expected[-1] < 0.9 * expected[0]
    for processes, stage in ((1, 0), (1, 2), (1, 3), (2, 3)):
        raw = base_config(family, **shared, deepspeed={"zero_stage": stage})
        raw["distill"] = {"teacher": "online", "context_cache_gib": 50e3 / 2**30}
        raw["output_dir"] = str(tmp_path / f"online-{processes}-{stage}")
        found = run(launch, raw, processes=processes)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=0)
        assert summary_of(raw)["nll_student"] == pytest.approx(summary_of(stored)["nll_student"], rel=1e-4)
        assert "teach" not in summary_of(raw)["seconds"]
