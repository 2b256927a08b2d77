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
from safetensors.torch import load_file, save_file

from fastft.engine.checkpoints import Checkpoint, Checkpoints, best_checkpoint, list_checkpoints
from fastft.errors import FastftError
from fastft.ops.reference import adamw_decode, adamw_encode
from fastft.optim import BiasAdamW
from tests.conftest import losses, start_ranks
from tests.engine.test_run import ok

STEPS = {"steps": 4, "save_every": 2, "keep_checkpoints": 2, "lr": 1e-2}


def config(base_config, folder: Path, kind: str = "llama", **sections) -> dict:
    raw = base_config(kind, **{**sections, "train": {**STEPS, **sections.get("train", {})}})
    return {**raw, "output_dir": str(folder), "evaluate": {"answers": False}}


def only_step(step: int, straight: Path, folder: Path) -> Path:
    """A copy of a run as if it had been killed after its checkpoint of this step."""
    shutil.copytree(straight, folder)
    (folder / "summary.json").unlink(missing_ok=True)
    for path in list_checkpoints(folder / "checkpoints"):
        if path.name != f"step_{step}":
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
    folder = only_step(2, tmp_path / "straight", tmp_path / "resumed")
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
    folder = only_step(2, tmp_path / "straight", tmp_path / "resumed")
    raw["deepspeed"] = {**after, "threads_per_rank": 1}
    ok(launch({**raw, "output_dir": str(folder)}, "resume=auto"))
    tolerance = 1e-4 if optimizer.endswith("adamw") else 2e-2  # 8-bit state is encoded again, in other blocks
    found, expected = torch.tensor(losses(folder)), torch.tensor(losses(tmp_path / "straight"))
    assert len(found) == 4
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=0)


def test_one_rank_s_checkpoint_resumes_on_two_and_two_ranks_on_one(base_config, launch, tmp_path):
    raw = config(base_config, tmp_path / "straight", peft=LORA, deepspeed={"zero_stage": 2}, train={"save_every": 1})
    raw["train"]["keep_checkpoints"] = 4
    ok(launch(raw))
    two = only_step(2, tmp_path / "straight", tmp_path / "two")
    sections = {"deepspeed": {"zero_stage": 3, "threads_per_rank": 1}, "resume": "auto"}
    ranks = start_ranks({**raw, "output_dir": str(two), **sections}, tmp_path)
    assert [rank.wait(120) for rank in ranks] == [0, 0], (tmp_path / "rank_0.log").read_text()
    files = sorted(p.name for p in (two / "checkpoints/step_3").iterdir())
    assert files == ["checkpoint.json", "rank_0.safetensors", "rank_1.safetensors"]
    one = only_step(3, two, tmp_path / "one")
    ok(launch({**raw, "output_dir": str(one)}, "resume=auto", "deepspeed.zero_stage=0"))
    expected = torch.tensor(losses(tmp_path / "straight"))
    for folder in (two, one):
        torch.testing.assert_close(torch.tensor(losses(folder)), expected, rtol=1e-4, atol=0)
    for name, value in trained(tmp_path / "straight").items():
        torch.testing.assert_close(trained(one)[name], value, rtol=0, atol=1e-4)


def flip_a_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-2])


@pytest.mark.parametrize(
    ("file", "damage", "said"),
    [
        ("rank_0.safetensors", truncate, "were written"),
        ("rank_0.safetensors", flip_a_bit, "is not as it was written (SHA-256)"),
        ("rank_0.safetensors", Path.unlink, "No such file"),
        ("checkpoint.json", truncate, "is missing or not whole"),
        ("checkpoint.json", flip_a_bit, "checkpoint.json"),
    ],
)
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_taken(launch, tmp_path, run_of_four, file, damage, said):
    raw, straight = run_of_four
    folder = tmp_path / "damaged"
    shutil.copytree(straight, folder)
    damage(folder / "checkpoints/step_3" / file)
    resumed = launch({**raw, "output_dir": str(folder)}, "resume=auto")
    ok(resumed)
    assert "damaged    " in resumed.stdout and said in resumed.stdout and "; skipped" in resumed.stdout
    assert f"resume     from step 2 ({folder / 'checkpoints/step_2'})" in resumed.stdout
    assert same(folder, straight)
    Checkpoint.verified(folder / "checkpoints/step_3")  # written again


@pytest.fixture(scope="module")
def run_of_four(tmp_path_factory, documents, tiny):
    """A config and its finished run of 4 steps with checkpoints of steps 2 and 3."""
    from tests.conftest import base_config as make
    from tests.conftest import launch as start

    folder = tmp_path_factory.mktemp("run-of-four")
    base = make.__wrapped__(folder, documents, tiny)
    raw = config(base, folder / "run", train={"save_every": 1})
    ok(start.__wrapped__(folder)(raw))
    assert [p.name for p in list_checkpoints(folder / "run/checkpoints")] == ["step_2", "step_3"]
    return raw, folder / "run"


def test_with_nothing_intact_the_run_begins_anew(launch, tmp_path, run_of_four):
    raw, straight = run_of_four
    folder = tmp_path / "damaged"
    shutil.copytree(straight, folder)
    for path in list_checkpoints(folder / "checkpoints"):
        truncate(path / "rank_0.safetensors")
    resumed = launch({**raw, "output_dir": str(folder)}, "resume=auto")
    ok(resumed)
    assert resumed.stdout.count("damaged    ") == 2
    assert "no checkpoint is intact; the run begins anew" in resumed.stdout
    assert same(folder, straight)


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("train.lr=0.02", "train.lr: 0.01 in the checkpoint, 0.02 in the config"),
        ("peft.r=8", "peft.r: 4 in the checkpoint, 8 in the config"),
        ("train.optimizer=bias_adamw", "train.optimizer: 'auto' in the checkpoint, 'bias_adamw' in the config"),
        ("train.batch_size=2", "train.batch_size: 4 in the checkpoint, 2 in the config"),
        ("train.steps=5", "train.steps: 4 in the checkpoint, 5 in the config"),  # the decay would be another
        ("seed=1", "seed: 0 in the checkpoint, 1 in the config"),
    ],
)
def test_other_settings_are_refused_by_name(launch, run_of_four, override, said):
    raw, straight = run_of_four
    refused = launch({**raw, "output_dir": str(straight)}, "resume=auto", override)
    assert refused.returncode == 1 and "Traceback" not in refused.stderr
    assert said in refused.stderr and "set resume=never overwrite=true" in refused.stderr
    assert (straight / "summary.json").exists()


def test_settings_of_place_and_speed_may_change(launch, tmp_path, run_of_four, tiny):
    raw, straight = run_of_four
    folder, moved = tmp_path / "moved", tmp_path / "model"
    shutil.copytree(straight, folder)
    shutil.copytree(tiny("llama"), moved)
    changes = ["train.micro_batches=2", "train.log_every=5", "deepspeed.zero_stage=2", "evaluate.max_new_tokens=2"]
    raw = {**raw, "output_dir": str(folder), "model": {**raw["model"], "name_or_path": str(moved)}}
    ok(launch(raw, "resume=auto", *changes))
    torch.testing.assert_close(torch.tensor(losses(folder)), torch.tensor(losses(straight)), rtol=1e-4, atol=0)


def test_another_base_and_other_data_are_refused(launch, tmp_path, run_of_four, tiny, documents):
    raw, straight = run_of_four
    raw = {**raw, "output_dir": str(straight)}
    other = tmp_path / "other"
    shutil.copytree(tiny("llama"), other)
    tensors = load_file(other / "model.safetensors")
    tensors["model.norm.weight"] += 1e-3
    save_file(tensors, other / "model.safetensors", metadata={"format": "pt"})
    refused = launch({**raw, "model": {**raw["model"], "name_or_path": str(other)}}, "resume=auto")
    assert refused.returncode == 1 and "was trained on another base model: fingerprint " in refused.stderr
    changed = tmp_path / "changed.jsonl"
    changed.write_text(documents.read_text().replace("1804", "1805"))
    refused = launch({**raw, "data": {**raw["data"], "path": str(changed)}}, "resume=auto")
    assert refused.returncode == 1 and "was trained on other sequences" in refused.stderr


def test_other_parameters_are_refused(run_of_four):
    """Where config and base agree but the program made something else of them."""
    _, straight = run_of_four
    checkpoint = Checkpoint.read(straight / "checkpoints/step_3")
    name = next(iter(checkpoint.about["parameters"]))
    checkpoint.about["parameters"][name] = {"dtype": "float32", "shape": [3, 3]}

    class Other:
        def described(self):
            return Checkpoint.read(straight / "checkpoints/step_3").about["parameters"]

    with pytest.raises(FastftError, match=f"1 of them; the first is {name}: float32 \\[3, 3\\] in the checkpoint"):
        Checkpoints._check_parameters(None, checkpoint, Other())


def test_the_best_checkpoint_stays(base_config, launch, tmp_path):
    """Of six evaluated steps with a rate that diverges; its parameters are those of that step."""
    sections = {"train": {"steps": 6, "lr": 0.3, "eval_every": 1, "keep_best": True, "keep_checkpoints": 1}}
    raw = config(base_config, tmp_path / "run", **sections)
    ok(launch(raw))
    lines = map(json.loads, (tmp_path / "run/metrics.jsonl").read_text().splitlines())
    scores = {m["step"]: m["evaluated_nll"] for m in lines if "evaluated_nll" in m}
    best = min(scores, key=scores.get)
    assert len(scores) == 6 and best < 5
    found = best_checkpoint(tmp_path / "run/checkpoints")
    assert found.name == f"step_{best}" and Checkpoint.read(found).about["nll"] == scores[best]
    kept = {p.name for p in list_checkpoints(tmp_path / "run/checkpoints")}
    assert kept == {f"step_{best}", "step_4"}  # save_every=2; the last step needs none
    assert launch({**raw, "overwrite": True}, "train.eval_every=0").returncode == 1


def test_a_checkpoint_that_is_half_deleted_is_none(base_config, launch, tmp_path, monkeypatch):
    """Killed while an old one is deleted: what is left has not its name."""
    raw = config(base_config, tmp_path / "run", train={"save_every": 1, "keep_checkpoints": 1})
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", lambda path, **_: (path / "checkpoint.json").unlink(missing_ok=True))
        ok(launch(raw))
    folder = tmp_path / "run/checkpoints"
    assert {p.name for p in folder.iterdir()} == {".step_1.partial", ".step_2.partial", "step_3"}
    assert list_checkpoints(folder) == [folder / "step_3"]
    ok(launch(raw, "resume=auto"))
    assert [p.name for p in folder.iterdir()] == ["step_3"]


def test_eight_bit_state_is_encoded_as_the_optimizer_would():
    torch.manual_seed(0)
    state = adamw_encode(torch.randn(1000), torch.rand(1000) ** 4)
    again = adamw_encode(*adamw_decode(state))
    for name in ("exp_avg", "exp_avg_sq"):
        assert torch.equal(again[name], state[name])
        torch.testing.assert_close(again[f"{name}_scale"], state[f"{name}_scale"], rtol=1e-4, atol=0)
    optimizer = BiasAdamW([p := torch.nn.Parameter(torch.randn(1000))], state_bits=8)
    p.grad = torch.randn(1000)
    optimizer.step()
    own, exact = optimizer.state[p], adamw_encode(0.1 * p.grad, 0.001 * p.grad**2)
    for name in ("exp_avg", "exp_avg_sq"):  # it takes roots by approximation, and dithers
        assert (own[name].int() - exact[name].int()).abs().max() <= 1


@contextmanager
def small_disk(folder: Path, mebibytes: float):
    """A file system of its own; skips where one cannot be mounted."""
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={int(mebibytes * 2**20)}", "tmpfs", str(folder)]
    try:
        subprocess.run(mount, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("mounting a small tmpfs needs rights that this user does not have")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_disk_that_fills_up_during_a_checkpoint(base_config, launch, tmp_path):
    """keep_checkpoints=9: the disk holds some of them and then no more."""
    with small_disk(tmp_path / "disk", 0.5):
        train = {"steps": 9, "save_every": 1, "keep_checkpoints": 9}
        raw = config(base_config, tmp_path / "disk/run", peft={"r": 16}, train=train)
        raw["distill"] = {"targets": "topk", "top_k": 1}
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("fastft.engine.run.check_room", lambda *_: None)
            full = launch(raw)
        kept = list_checkpoints(tmp_path / "disk/run/checkpoints")
        assert 1 <= len(kept) < 8
        assert f"the checkpoint of step {len(kept) + 1} cannot be written" in full.stderr
        assert "No space left on device" in full.stderr and "Traceback" not in full.stderr
        assert full.returncode == 1
        assert sorted((tmp_path / "disk/run/checkpoints").iterdir()) == sorted(kept)
        for path in kept:
            Checkpoint.verified(path)
        # With room, the same command goes on.
        subprocess.run(["mount", "-o", "remount,size=8m", str(tmp_path / "disk")], check=True)
        ok(launch(raw, "resume=auto"))
        assert len(losses(tmp_path / "disk/run")) == 9


def test_a_file_that_cannot_grow_is_one_message(base_config, launch, tmp_path, monkeypatch):
    """The limit on a file's size stands for a full disk where none can be mounted."""
    write = Checkpoints._write_own

    def limited(self, folder, trainer):
        if folder.name != ".step_2.partial":
            return write(self, folder, trainer)
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))
        try:
            return write(self, folder, trainer)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    monkeypatch.setattr(Checkpoints, "_write_own", limited)
    raw = config(base_config, tmp_path / "run", train={"save_every": 1})
    full = launch(raw)
    folder = tmp_path / "run/checkpoints"
    assert full.returncode == 1 and "Traceback" not in full.stderr
    assert "the checkpoint of step 2 cannot be written" in full.stderr and "File too large" in full.stderr
    assert f"The last complete one is {folder / 'step_1'}" in full.stderr
    assert list(folder.iterdir()) == [folder / "step_1"]
    Checkpoint.verified(folder / "step_1")
