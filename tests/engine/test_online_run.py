"""Runs with distill.teacher=online: the losses of a stored teacher, on any number of ranks and in any ZeRO stage."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from fastft.engine.training import Training
from tests.conftest import losses
from tests.engine.test_run import ok, summary_of

# Three contexts; an encoded one takes 256 (llama) or 512 bytes (opt) a token.
SHARED = {"data": {"documents": None, "control_documents": 0}, "evaluate": {"answers": False}}
ROOM_FOR_ONE = {"llama": 20e3 / 2**30, "opt": 40e3 / 2**30}


def run(launch, raw: dict, *overrides: str, processes: int = 1) -> torch.Tensor:
    ok(launch(raw, *overrides, processes=processes))
    return torch.tensor(losses(Path(raw["output_dir"])))


@pytest.mark.parametrize(("family", "kind"), [("llama", "lora"), ("opt", "bitfit")])
def test_an_online_teacher_trains_as_a_stored_one(base_config, launch, tmp_path, family, kind):
    """With room for a part of the contexts: each step encodes some and finds others, each rank its own."""
    options = {**SHARED, "peft": {"kind": kind}, "train": {"steps": 12, "batch_size": 5, "lr": 1e-2}}
    stored = base_config(family, **options)
    expected = run(launch, stored)
    assert expected[-1] < 0.9 * expected[0]
    for processes, stage in ((1, 0), (1, 2), (1, 3), (2, 3)):
        raw = base_config(family, **options, deepspeed={"zero_stage": stage})
        raw["distill"] = {"teacher": "online", "context_cache_gib": ROOM_FOR_ONE[family]}
        raw["output_dir"] = str(tmp_path / f"online-{processes}-{stage}")
        found = run(launch, raw, processes=processes)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=0)
        assert summary_of(raw)["nll_student"] == pytest.approx(summary_of(stored)["nll_student"], rel=1e-4)
        assert "teach" not in summary_of(raw)["seconds"]


def test_the_teacher_costs_no_gather(base_config, launch, tmp_path, monkeypatch):
    """ZeRO-3 gathers in an online step what it gathers in a stored one, and never loses its trace of the modules."""
    coordinators = pytest.importorskip("deepspeed.runtime.zero.partitioned_param_coordinator")
    coordinator = coordinators.PartitionedParameterCoordinator
    gathered, invalidated = [], []
    gather, invalidate = coordinator._PartitionedParameterCoordinator__all_gather_params, coordinator._invalidate_trace

    def counted_gather(self, params, forward):
        gathered.append(sum(p.ds_numel for p in params if p.ds_status.name == "NOT_AVAILABLE"))
        return gather(self, params, forward)

    def counted_invalidate(self):
        invalidated.append(self)
        return invalidate(self)

    monkeypatch.setattr(coordinator, "_PartitionedParameterCoordinator__all_gather_params", counted_gather)
    monkeypatch.setattr(coordinator, "_invalidate_trace", counted_invalidate)
    take_steps, found = Training.run, []

    def counted_run(self, checkpoint):
        gathered.clear()
        figures = take_steps(self, checkpoint)
        found.append(sum(gathered))
        return figures

    monkeypatch.setattr(Training, "run", counted_run)
    own = tmp_path / "ds.json"  # nothing stays gathered
    zero = {"stage3_param_persistence_threshold": 0, "stage3_max_reuse_distance": 0}
    own.write_text(json.dumps({"zero_optimization": zero}))
    for teacher in ("stored", "online"):
        raw = base_config(**SHARED, deepspeed={"zero_stage": 3, "config_file": str(own)})
        raw |= {"distill": {"teacher": teacher}, "output_dir": str(tmp_path / teacher)}
        run(launch, raw)
    assert found[0] > 0 and found[1] == found[0]
    assert not invalidated


def on_policy(base_config, folder: Path, **sections) -> dict:
    raw = base_config(**{**SHARED, "train": {"steps": 6, "batch_size": 5, "schedule": "constant"}, **sections})
    policy = {"teacher": "online", "on_policy": 0.6, "on_policy_tokens": 6, "direction": "jsd"}
    return {**raw, "distill": policy, "output_dir": str(folder)}


def test_on_policy_steps_do_not_depend_on_ranks_and_stages(base_config, launch, tmp_path):
    """With 2 ranks some steps have on-policy examples on one of them alone; ZeRO-3 needs both to generate."""
    expected = run(launch, on_policy(base_config, tmp_path / "reference"))
    off_policy = on_policy(base_config, tmp_path / "off")
    assert not torch.allclose(run(launch, off_policy, "distill.on_policy=0.0"), expected, rtol=1e-2)
    for processes, stage in ((1, 3), (2, 3)):
        raw = on_policy(base_config, tmp_path / f"policy-{processes}-{stage}", deepspeed={"zero_stage": stage})
        torch.testing.assert_close(run(launch, raw, processes=processes), expected, rtol=1e-4, atol=0)


@pytest.mark.parametrize("stage", [0, 3])
def test_an_on_policy_run_resumes_with_the_same_numbers(base_config, launch, tmp_path, stage):
    sections = {"deepspeed": {"zero_stage": stage}}
    straight = run(launch, on_policy(base_config, tmp_path / "straight", **sections))
    raw = on_policy(base_config, tmp_path / "resumed", **sections)
    run(launch, raw, "train.steps=4", "train.save_every=2")
    resumed = run(launch, raw, "resume=auto")
    assert torch.equal(resumed, straight)
