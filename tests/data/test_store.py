"""The teacher store: built in parts by several processes, gone on with after any of them dies, checked, never changed
by its readers."""

from __future__ import annotations

import json
import shutil
import threading

import pytest
import torch

from fastft.data import store
from fastft.data.store import BuildLock, Layout, StoreWriter, TeacherStore, check_free, store_key
from fastft.distributed import Ranks
from fastft.errors import FastftError

ARRAYS = {"hidden": ((3,), torch.bfloat16), "topk_ids": ((2,), torch.int32)}
LAYOUT = Layout("key", ARRAYS, [2, 0, 3, 1])
BATCHES = [[0, 2], [1], [3]]


def targets(i: int, layout: Layout = LAYOUT) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(i)
    n = layout.lengths[i]
    return {
        "hidden": torch.randn(n, 3, generator=generator).bfloat16(),
        "topk_ids": torch.randint(0, 9, (n, 2), dtype=torch.int32, generator=generator),
    }


def write(folder, batches=BATCHES, layout=LAYOUT, ranks=None):
    folder.mkdir(exist_ok=True)
    writer = StoreWriter(folder, layout, ranks)
    for batch in filter(None, batches):
        parts = [targets(i, layout) for i in batch]
        writer.write(batch, {name: torch.cat([p[name] for p in parts]) for name in ARRAYS})
    writer.close()
    assert writer.error is None


def assert_whole(folder):
    opened = TeacherStore.open(folder, LAYOUT)
    assert opened.is_complete and opened.positions == 6
    for i in range(4):
        for name, value in targets(i).items():
            assert torch.equal(opened.rows(i)[name], value) and opened.rows(i)[name].dtype == value.dtype


def test_round_trip(tmp_path):
    write(tmp_path / "key")
    assert_whole(tmp_path / "key")
    assert TeacherStore.open(tmp_path / "key", LAYOUT).damaged == 0


def test_readers_cannot_change_the_file(tmp_path):
    write(tmp_path / "key")
    TeacherStore.open(tmp_path / "key", LAYOUT).rows(0)["hidden"].zero_()
    assert_whole(tmp_path / "key")


def test_each_process_writes_files_of_its_own_and_readers_see_all_of_them(tmp_path):
    for rank, batches in enumerate((BATCHES[:1], BATCHES[1:])):
        write(tmp_path / "key", batches, ranks=_Rank(rank))
    assert sorted(p.name for p in (tmp_path / "key").glob("*.bin")) == ["shard-001-000.bin", "shard-001-001.bin"]
    assert_whole(tmp_path / "key")


class _Rank(Ranks):
    """One of two ranks of a first run, without the other."""

    def __init__(self, rank: int):
        super().__init__(rank, 2)

    def gather(self, value):
        return [1, 1]  # both see an empty folder


def flip(path, at):
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


DAMAGES = {
    "a flipped bit": lambda data, journal: flip(data, 5),
    "a truncated shard": lambda data, journal: data.write_bytes(data.read_bytes()[:-1]),
    "a missing shard": lambda data, journal: data.unlink(),
    "a missing journal": lambda data, journal: journal.unlink(),
    "a journal cut off in a line": lambda data, journal: journal.write_bytes(journal.read_bytes()[:-9]),
    "a journal that is none": lambda data, journal: journal.write_bytes(b"\xff{\n[1, 2]\nnull\n{}\n"),
    "an offset of another kind": lambda data, journal: journal.write_text(
        journal.read_text().replace('"offset": 0', '"offset": 0.0')
    ),
    "an offset beyond the end": lambda data, journal: journal.write_text(
        journal.read_text().replace('"offset": 0', '"offset": 64')
    ),
    "a line that names another sequence": lambda data, journal: journal.write_text(
        journal.read_text().replace("[0, 2]", "[2, 0]")
    ),
    "a line that names no sequence of ours": lambda data, journal: journal.write_text(
        journal.read_text().replace("[3]", "[4]")
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_what_is_damaged_is_not_used_and_computed_again(tmp_path, damage):
    folder = tmp_path / "key"
    write(folder)
    DAMAGES[damage](folder / "shard-001-000.bin", folder / "shard-001-000.jsonl")
    left = TeacherStore.open(folder, LAYOUT)
    assert not left.is_complete
    for i in left.where:
        assert all(torch.equal(left.rows(i)[name], value) for name, value in targets(i).items())
    write(folder, [[i for i in batch if i not in left] for batch in BATCHES])
    assert_whole(folder)


@pytest.mark.parametrize("size", range(0, 301, 20))
def test_wherever_the_writer_died_what_is_used_is_right(tmp_path, size):
    """Both files cut off after any number of bytes, as after a power cut: whole blocks count, others do not."""
    write(tmp_path / "key")
    for path in (tmp_path / "key").glob("shard-*"):
        path.write_bytes(path.read_bytes()[:size])
    left = TeacherStore.open(tmp_path / "key", LAYOUT)
    assert left.damaged == 0
    write(tmp_path / "key", [batch for batch in BATCHES if not set(batch) <= set(left.where)])
    assert_whole(tmp_path / "key")


def test_the_store_of_another_key_is_not_used(tmp_path):
    """The same files under another key: every checksum has the key in it."""
    write(tmp_path / "other", layout=Layout("other", ARRAYS, LAYOUT.lengths))
    shutil.copytree(tmp_path / "other", tmp_path / "key")
    foreign = TeacherStore.open(tmp_path / "key", LAYOUT)
    assert not foreign.where and foreign.damaged == len(BATCHES)
    foreign.prune()
    assert list((tmp_path / "key").iterdir()) == []
    write(tmp_path / "key")
    assert_whole(tmp_path / "key")


def test_pruning_keeps_what_is_used(tmp_path):
    write(tmp_path / "key")
    TeacherStore.open(tmp_path / "key", LAYOUT).prune()
    assert_whole(tmp_path / "key")


def test_a_folder_that_is_not_there_holds_nothing(tmp_path):
    assert not TeacherStore.open(tmp_path / "key", LAYOUT).where


def test_a_full_disk_ends_the_writing_and_keeps_what_is_there(tmp_path, monkeypatch):
    folder = tmp_path / "key"
    folder.mkdir()
    write_all, room = store._write_all, [400]  # two blocks and their lines; the third does not fit

    def limited(file, data):
        if len(data) > room[0]:
            write_all(file, data[: room[0]])
            raise OSError(28, "No space left on device")
        room[0] -= len(data)
        write_all(file, data)

    monkeypatch.setattr(store, "_write_all", limited)
    writer = StoreWriter(folder, LAYOUT)
    for batch in BATCHES:
        parts = [targets(i) for i in batch]
        writer.write(batch, {name: torch.cat([p[name] for p in parts]) for name in ARRAYS})
    writer.close()
    assert writer.error.errno == 28
    monkeypatch.undo()
    left = TeacherStore.open(folder, LAYOUT)
    assert set(left.where) == {0, 2, 1}
    write(folder, [[3]])
    assert_whole(folder)


def test_a_disk_without_room_is_said_before_anything_is_computed(tmp_path, monkeypatch):
    monkeypatch.setattr(store, "free_bytes", lambda folder: 10)
    with pytest.raises(FastftError, match=r"takes 0\.1 MiB, but .* has 0\.0 MiB free"):
        check_free(tmp_path, 100_000)


def test_one_run_builds_at_a_time(tmp_path):
    first, second = BuildLock(tmp_path / "key"), BuildLock(tmp_path / "key")
    assert first.acquire()
    assert not second.acquire()
    first.release()
    assert second.acquire()


def test_two_writers_at_once_do_not_disturb_each_other(tmp_path):
    """Without the lock (one released by a run of which a process lives on) work is done twice, and nothing is lost."""
    folder = tmp_path / "key"
    folder.mkdir()
    threads = [threading.Thread(target=write, args=(folder, BATCHES, LAYOUT, _Run(n))) for n in (1, 2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(list(folder.glob("*.bin"))) == 2
    assert_whole(folder)


class _Run(Ranks):
    def __init__(self, number: int):
        super().__init__()
        self.number = number

    def gather(self, value):
        return [self.number]


def test_keys_follow_the_content():
    assert store_key({"a": 1, "b": [1, 2]}) == store_key({"b": [1, 2], "a": 1}) != store_key({"a": 1, "b": [2, 1]})


def test_a_journal_line_is_plain_json(tmp_path):
    write(tmp_path / "key")
    lines = (tmp_path / "key" / "shard-001-000.jsonl").read_text().splitlines()
    assert [json.loads(line)["sequences"] for line in lines] == BATCHES
