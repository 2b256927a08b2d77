"""The teacher store: whole or not there, checked, and never changed by its readers."""

from __future__ import annotations

import os

import pytest
import torch

from fastft.data import store
from fastft.data.store import StoreWriter, TeacherStore, store_key
from fastft.errors import FastftError

SPECS = {"hidden": ((3,), torch.bfloat16), "topk_ids": ((2,), torch.int32)}


def write(folder, lengths=(2, 0, 3)):
    writer = StoreWriter(folder, SPECS, list(lengths))
    writer.create()
    written = []
    for i, n in enumerate(lengths):
        rows = {"hidden": torch.randn(n, 3).bfloat16(), "topk_ids": torch.randint(0, 9, (n, 2), dtype=torch.int32)}
        writer.write(i, rows)
        written.append(rows)
    writer.finish({"what": "test"})
    return written


def test_round_trip(tmp_path):
    written = write(tmp_path / "key")
    opened = TeacherStore.open(tmp_path / "key")
    for i, rows in enumerate(written):
        for name, value in rows.items():
            assert torch.equal(opened.rows(i)[name], value)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["key"]


def test_readers_cannot_change_the_file(tmp_path):
    write(tmp_path / "key")
    TeacherStore.open(tmp_path / "key").rows(0)["hidden"].zero_()
    assert TeacherStore.open(tmp_path / "key") is not None


@pytest.mark.parametrize("damage", ["flip", "truncate", "index", "missing"])
def test_a_damaged_store_is_not_used(tmp_path, damage):
    folder = tmp_path / "key"
    write(folder)
    data = folder / "hidden.bin"
    if damage == "flip":
        content = bytearray(data.read_bytes())
        content[5] ^= 1
        data.write_bytes(content)
    elif damage == "truncate":
        data.write_bytes(data.read_bytes()[:-1])
    elif damage == "index":
        (folder / "index.json").write_text("{")
    else:
        data.unlink()
    assert TeacherStore.open(folder) is None
    write(folder)
    assert TeacherStore.open(folder) is not None


def test_an_unfinished_store_is_not_there(tmp_path):
    writer = StoreWriter(tmp_path / "key", SPECS, [2])
    writer.create()
    assert TeacherStore.open(tmp_path / "key") is None


def test_a_full_disk_is_said_before_anything_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr(store, "free_bytes", lambda folder: 10)
    with pytest.raises(FastftError, match="free"):
        StoreWriter(tmp_path / "key", SPECS, [1000]).create()
    assert list(tmp_path.iterdir()) == []


def test_keys_follow_the_content():
    assert store_key({"a": 1, "b": [1, 2]}) == store_key({"b": [1, 2], "a": 1}) != store_key({"a": 1, "b": [2, 1]})


def test_two_runs_may_build_one_store(tmp_path):
    """Neither disturbs the other; the second to finish finds the first's."""
    writers = [StoreWriter(tmp_path / "key", {"x": ((1,), torch.float32)}, [2], run=run) for run in "ab"]
    for writer in writers:
        writer.create()
    for writer in writers:
        writer.write(0, {"x": torch.tensor([[1.0], [2.0]])})
    for writer in writers:
        writer.finish({})
    assert TeacherStore.open(tmp_path / "key").rows(0)["x"].flatten().tolist() == [1.0, 2.0]
    assert [p.name for p in tmp_path.iterdir()] == ["key"]


def test_what_a_killed_run_left_is_cleared_later(tmp_path):
    left = tmp_path / ".key.killed.partial"
    left.mkdir()
    write(tmp_path / "key")
    assert left.exists()  # it may be another run's
    os.utime(left, (0, 0))
    write(tmp_path / "key")
    assert not left.exists()
