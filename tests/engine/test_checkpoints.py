"""Checkpoints: resumed on the same ranks bit for bit, on others to rounding; damaged and foreign ones; a full disk."""

from __future__ import annotations

import json
import resource
import shutil
import subprocess
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from fastft.engine.checkpoints import Checkpoint, Checkpoints, DamagedCheckpoint, list_checkpoints
from fastft.ops.reference import adamw_decode, adamw_encode
from tests.conftest import losses
from tests.engine.test_run import ok

STEPS = {"steps": 4, "save_every": 2, "keep_checkpoints": 2, "lr": 1e-2}


def config(base_config, folder: Path, kind: str = "llama", **sections) -> dict:
    raw = base_config(kind, **{**sections, "train": {**STEPS, **sections.get("train", {})}})
    return {**raw, "output_dir": str(folder), "evaluate": {"answers": False}}


def only_step_2(straight: Path, folder: Path) -> Path:
    """A copy of a run as if it had been killed after its checkpoint of step 2."""
    shutil.copytree(straight, folder)
    (folder / "summary.json").unlink(missing_ok=True)
    for path in list_checkpoints(folder / "checkpoints"):
        if path.name != "step_2":
            shutil.rmtree(path)
    return folder


def trained(folder: Path) -> dict[str, torch.Tensor]:
    (path,) = folder.glob("adapter/*.safetensors")
    return load_file(path)


def same(found: Path, expected: Path) -> bool:
    a, b = trained(found), trained(expected)
    equal = a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
    return equal and losses(found) == losses(expected)


LORA = {"kind": "lora", "r": 4, "lora_plus_ratio": 4.0}  # two parameter groups
CASES = [
    *((stage, "llama", "float32", LORA, "adamw") for stage in (0, 1, 2, 3)),
    *((stage, "llama", "float32", {"kind": "full"}, "adamw_8bit") for stage in (0, 2, 3)),
    *((stage, "llama", "bfloat16", LORA, "adamw") for stage in (0, 1, 3)),
    *((stage, "opt", "float32", {"kind": "bitfit"}, "bias_adamw_8bit") for stage in (1, 3)),
]


@pytest.mark.parametrize(("stage", "kind", "dtype", "peft", "optimizer"), CASES)
def test_a_resumed_run_has_the_numbers_of_a_straight_one(
    base_config, launch, tmp_path, stage, kind, dtype, peft, optimizer
):
    """Bit for bit, dropout masks included."""
    if optimizer == "adamw_8bit":
        pytest.importorskip("bitsandbytes")
    sections = {
        "peft": peft,
        "deepspeed": {"zero_stage": stage},
        "model": {"dtype": dtype, "dropout": kind == "opt"},
        "train": {"optimizer": optimizer},
    }
    raw = config(base_config, tmp_path / "straight", kind, **sections)
    if peft["kind"] == "full":
        raw["distill"] = {"targets": "topk", "top_k": 8}
    ok(launch(raw))
    folder = only_step_2(tmp_path / "straight", tmp_path / "resumed")
    resumed = launch({**raw, "output_dir": str(folder)}, "resume=auto")
    ok(resumed)
    assert f"resume     from step 2 ({folder / 'checkpoints' / 'step_2'})" in resumed.stdout
    assert same(folder, tmp_path / "straight")


@pytest.mark.parametrize(
    ("before", "after", "peft", "optimizer"),
    [
        ({"zero_stage": 0}, {"zero_stage": 3}, LORA, "adamw"),
        ({"zero_stage": 3, "offload_optimizer": "cpu"}, {"zero_stage": 0}, LORA, "adamw"),
        ({"zero_stage": 2}, {"zero_stage": 3, "offload_param": "cpu"}, LORA, "bias_adamw"),
        ({"zero_stage": 0}, {"zero_stage": 2}, LORA, "bias_adamw_8bit"),
        ({"zero_stage": 3}, {"zero_stage": 0}, {"kind": "full"}, "adamw_8bit"),
    ],
)
def test_a_run_goes_on_in_another_zero_stage(base_config, launch, tmp_path, before, after, peft, optimizer):
    if optimizer == "adamw_8bit":
        pytest.importorskip("bitsandbytes")
    raw = config(base_config, tmp_path / "straight", peft=peft, deepspeed=before, train={"optimizer": optimizer})
    raw["distill"] = {"targets": "topk", "top_k": 8}
    ok(launch(raw))
    folder = only_step_2(tmp_path / "straight", tmp_path / "resumed")
    raw["deepspeed"] = {**after, "threads_per_rank": 1}
    ok(launch({**raw, "output_dir": str(folder)}, "resume=auto"))
    tolerance = 1e-4 if optimizer.endswith("adamw") else 2e-2  # 8-bit state is encoded again, in other blocks
    found, expected = torch.tensor(losses(folder)), torch.tensor(losses(tmp_path / "straight"))
    assert len(found) == 4
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=0)


def test_two_ranks_checkpoint_resumes_on_one_and_one_rank_s_on_two(base_config, launch, tmp_path):
    raw = config(base_config, tmp_path / "two", peft=LORA, deepspeed={"zero_stage": 3})
    ok(launch(raw, processes=2))
    files = sorted(p.name for p in (tmp_path / "two/checkpoints/step_2").iterdir())
    assert files == ["checkpoint.json", "rank_0.safetensors", "rank_1.safetensors"]
    one = only_step_2(tmp_path / "two", tmp_path / "one")
    ok(launch({**raw, "output_dir": str(one)}, "resume=auto", "deepspeed.zero_stage=0"))
    expected = torch.tensor(losses(tmp_path / "two"))
    torch.testing.assert_close(torch.tensor(losses(one)), expected, rtol=1e-4, atol=0)
    raw["output_dir"] = str(tmp_path / "straight")
    ok(launch(raw, "deepspeed.zero_stage=2"))
    two = only_step_2(tmp_path / "straight", tmp_path / "again")
    ok(launch({**raw, "output_dir": str(two)}, "resume=auto", processes=2))
    expected = torch.tensor(losses(tmp_path / "straight"))
    torch.testing.assert_close(torch.tensor(losses(two)), expected, rtol=1e-4, atol=0)
