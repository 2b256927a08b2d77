"""The teach phase: stopped in every way, gone on with, by more processes or fewer, and by two runs at once."""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
import yaml

from fastft.data import store
from fastft.data.store import BuildLock, StoreWriter
from fastft.distributed import Ranks
from fastft.engine.teach import check_shared
from fastft.errors import FastftError
from tests.conftest import FACTS, ROOT, clean_environment, losses
from tests.engine.test_run import ok


@pytest.fixture
def long_config(base_config, tmp_path):
    """A run whose teach phase has several hundred batches of one sequence each."""
    words = [word for _, sentence, *_ in FACTS for word in sentence.split()]
    text = " ".join(random.Random(0).choices(words, k=300))
    path = tmp_path / "long.jsonl"
    path.write_text(json.dumps({"id": "long", "title": "long", "text": text}))
    return base_config(
        data={"path": str(path), "documents": None, "control_documents": 0},
        queries={"passages": {"tokens": 16, "prompt_tokens": 6, "stride": 1}, "self_study": {"count": 0}},
        evaluate={"batch_size": 1, "answers": False},
    )


def journals(raw: dict) -> list[Path]:
    return sorted(Path(raw["cache_dir"]).glob("teacher/*/shard-*.jsonl"))


def straight_losses(raw: dict, launch, tmp_path) -> list[float]:
    """What a run gives that computed its own targets without a stop."""
    straight = {**raw, "output_dir": str(tmp_path / "straight"), "cache_dir": str(tmp_path / "straight-cache")}
    ok(launch(straight))
    return losses(tmp_path / "straight")


@pytest.mark.parametrize("processes", [1, 2])
def test_a_killed_teach_phase_goes_on_where_it_stopped(long_config, launch, tmp_path, processes):
    """SIGKILL for every process; one process goes on with what one or two left."""
    path = tmp_path / "killed.yaml"
    path.write_text(yaml.safe_dump(long_config))
    arguments = [str(ROOT / "fastft" / "train.py"), "--cfg", str(path)]
    if processes > 1:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = str(probe.getsockname()[1])
        flag = "--num_gpus" if torch.cuda.is_available() else "--num_accelerators"
        arguments = ["-m", "deepspeed.launcher.runner", flag, str(processes), "--master_port", port, *arguments]
    process = subprocess.Popen(
        [sys.executable, *arguments],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env=clean_environment(),
        cwd=tmp_path,
        start_new_session=True,
    )
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        written = [p.read_bytes().count(b"\n") for p in journals(long_config)]
        if len(written) == processes and min(written) >= 3:
            break
        time.sleep(0.005)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait(timeout=60)
    assert len(journals(long_config)) == processes
    resumed = launch(long_config)
    ok(resumed)
    assert "teach      goes on: " in resumed.stdout and "targets/s), context" in resumed.stdout
    assert losses(Path(long_config["output_dir"])) == straight_losses(long_config, launch, tmp_path)
    again = launch(long_config, "overwrite=true")
    assert "found in" in again.stdout and "goes on" not in again.stdout


def test_ctrl_c_says_what_is_kept(long_config, launch, monkeypatch, tmp_path):
    write, calls = StoreWriter.write, []

    def interrupted(self, sequences, arrays):
        write(self, sequences, arrays)
        calls.append(sequences)
        if len(calls) == 3:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(StoreWriter, "write", interrupted)
    stopped = launch(long_config)
    assert stopped.returncode == 128 + signal.SIGINT and "Traceback" not in stopped.stderr
    assert "stopped while teaching; " in stopped.stderr and "the same command goes on with them" in stopped.stderr
    kept = int(stopped.stderr.split("teaching; ")[1].split(" of ")[0])
    monkeypatch.undo()
    resumed = launch(long_config)
    ok(resumed)
    assert kept > 0 and f"teach      goes on: {kept} of " in resumed.stdout
    assert losses(Path(long_config["output_dir"])) == straight_losses(long_config, launch, tmp_path)


def test_a_full_disk_is_one_message_and_what_was_written_is_kept(long_config, launch, monkeypatch):
    write_all, room = store._write_all, [20_000]

    def limited(file, data):
        room[0] -= len(data)
        if room[0] < 0:
            raise OSError(28, "No space left on device")
        write_all(file, data)

    monkeypatch.setattr(store, "_write_all", limited)
    full = launch(long_config)
    assert full.returncode == 1 and "Traceback" not in full.stderr
    assert "the teacher store cannot be written" in full.stderr and "No space left on device" in full.stderr
    assert "targets are kept in" in full.stderr
    monkeypatch.undo()
    resumed = launch(long_config)
    ok(resumed)
    assert "teach      goes on: " in resumed.stdout


def test_damaged_targets_are_computed_again(long_config, launch, tmp_path):
    ok(launch(long_config))
    before = losses(Path(long_config["output_dir"]))
    data = journals(long_config)[0].with_suffix(".bin")
    content = bytearray(data.read_bytes())
    content[len(content) // 2] ^= 16
    data.write_bytes(content)
    mended = launch(long_config, "overwrite=true")
    ok(mended)
    assert "damaged or foreign blocks, computed again: 1" in mended.stdout
    assert losses(Path(long_config["output_dir"])) == before


def test_a_second_run_waits_for_the_first(base_config, launch):
    raw = base_config(data={"control_documents": 0})
    ok(launch(raw))
    folder = journals(raw)[0].parent
    for path in folder.glob("shard-*"):
        path.unlink()
    other = BuildLock(folder)
    assert other.acquire()
    threading.Timer(1.5, other.release).start()
    waited = launch(raw, "overwrite=true")
    ok(waited)
    assert "another run writes these targets; waiting for it" in waited.stdout
    assert "written to" in waited.stdout


def test_a_cache_folder_that_is_not_shared_is_refused(tmp_path):
    class OtherNode(Ranks):
        """The second of two ranks, whose first has written its probe elsewhere, or here."""

        def gather(self, value):
            return [self.probe, value]

        def all(self, value):
            return value

    (tmp_path / "probe").touch()
    ranks = OtherNode(1, 2)
    ranks.probe = str(tmp_path / "probe")
    check_shared(tmp_path, ranks)
    ranks.probe = str(tmp_path / "elsewhere")
    with pytest.raises(FastftError, match="not the same folder for all 2 processes; set cache_dir"):
        check_shared(tmp_path, ranks)


def test_a_cache_folder_that_cannot_be_written_is_one_message(base_config, launch, tmp_path):
    (tmp_path / "file").touch()
    refused = launch(base_config(), f"cache_dir={tmp_path / 'file'}")
    assert refused.returncode == 1 and "Traceback" not in refused.stderr
    assert f"cache_dir={tmp_path / 'file'}: the folder cannot be made: File exists; set cache_dir" in refused.stderr


def test_a_prefix_in_host_memory_gives_the_same_targets_and_an_int8_one_its_own(base_config, launch):
    raw = base_config(evaluate={"answers": False})
    found = {}
    for placement in ("device", "host", "int8"):
        result = launch(raw, f"model.prefix={placement}", "overwrite=true")
        ok(result)
        found[placement] = losses(Path(raw["output_dir"]))
        expected = "found in" if placement == "host" else f"({placement}), written to"
        assert expected in result.stdout
    assert found["device"] == found["host"] != found["int8"]
    torch.testing.assert_close(torch.tensor(found["int8"]), torch.tensor(found["device"]), rtol=0.05, atol=0)
