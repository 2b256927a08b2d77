"""A rank that dies: the others end at once and say which it was; slow ones are left alone."""

from __future__ import annotations

import json
import re
import signal
import socket
import subprocess
import sys
import time

import pytest

from fastft.distributed import Ranks
from fastft.engine import watch
from fastft.engine.watch import Peer, Watch
from fastft.errors import FastftError
from tests.conftest import ROOT, clean_environment, start_ranks, wait_for


@pytest.mark.parametrize(("victim", "phase", "stage"), [(0, "teach", 3), (1, "train", 0)])
def test_the_others_end_and_say_which_rank_died(base_config, tmp_path, victim, phase, stage):
    raw = base_config(train={"steps": 100_000, "schedule": "constant"}, deepspeed={"zero_stage": stage})
    raw["queries"] = {"passages": {"tokens": 16, "prompt_tokens": 6, "stride": 1}, "self_study": {"count": 0}}
    raw["evaluate"] = {"batch_size": 1, "answers": False}
    if phase == "teach":
        raw["data"] |= {"documents": None}
    processes = start_ranks(raw, tmp_path)
    try:
        if phase == "train":
            wait_for(lambda: (tmp_path / "run/metrics.jsonl").is_file())
            processes[victim].send_signal(signal.SIGSTOP)  # merely slow: nobody ends
            time.sleep(2)
            assert [p.poll() for p in processes] == [None, None]
        else:
            wait_for(lambda: list((tmp_path / "cache").glob("teacher/*/shard-*.jsonl")))
            assert not (tmp_path / "run/metrics.jsonl").exists()
        begin = time.monotonic()
        processes[victim].send_signal(signal.SIGKILL)
        survivor = 1 - victim
        assert processes[survivor].wait(timeout=30) == 1
        assert time.monotonic() - begin < 30
        said = (tmp_path / f"rank_{survivor}.log").read_text()
        host = re.escape(socket.gethostname())
        assert re.search(rf"fastft: rank {victim} \(process {processes[victim].pid} on {host}\) died; the other", said)
        assert "Traceback" not in said
        if phase == "train":
            report = json.loads((tmp_path / "run/report.json").read_text())
            assert report["state"] == "failed" and report["error"].startswith("rank 1 (process")
            assert "Failed after step" in (tmp_path / "run/report.html").read_text()
    finally:
        for process in processes:
            process.kill()
            process.wait()


@pytest.mark.parametrize("own", ["Connection closed by peer [127.0.0.1]", "disk full"])
def test_an_error_on_one_rank_explains_what_the_others_see(monkeypatch, own):
    """The connection that torch.distributed lost is not the news; an error that all ranks have is each rank's own."""
    here, there = socket.socketpair()
    first = Watch(Ranks(0, 2), [Peer(here, 1, "process 7 on node2")])
    other = Watch(Ranks(1, 2), [Peer(there, 0, "process 6 on node1")])
    monkeypatch.setattr(watch, "_watch", first)

    @watch.watched
    def work():
        other.leave("RuntimeError: disk full")
        raise RuntimeError(own)

    monkeypatch.setattr(watch, "CAUSE_SECONDS", 0.5)
    monkeypatch.setattr(watch, "GRACE_SECONDS", 1.0)
    expected = "disk full" if own == "disk full" else "rank 1 .process 7 on node2. stopped: RuntimeError: disk full"
    with pytest.raises((RuntimeError, FastftError), match=expected) as found:
        work()
    assert isinstance(found.value, RuntimeError) == (own == "disk full")
    first.thread.join(5)
    assert not first.thread.is_alive() and watch._watch is None
    here.close()
    there.close()


def test_a_rank_that_hangs_when_the_first_has_failed_is_ended():
    """Where torch.distributed says nothing: after the time that the others have to fail by themselves."""
    here, there = socket.socketpair()
    script = (
        "import socket, sys, time; from fastft.distributed import Ranks; from fastft.engine import watch\n"
        "watch.GRACE_SECONDS = 0.5\n"
        "peer = watch.Peer(socket.socket(fileno=int(sys.argv[1])), 0, 'process 6 on node1')\n"
        "watch.Watch(Ranks(1, 2), [peer]); time.sleep(60)"
    )
    command = [sys.executable, "-c", script, str(there.fileno())]
    environment = {**clean_environment(), "LOCAL_RANK": "1", "PYTHONPATH": str(ROOT)}
    hanging = subprocess.Popen(command, pass_fds=[there.fileno()], stderr=subprocess.PIPE, env=environment, text=True)
    there.close()
    here.sendall(b'{"left": 0, "error": "OSError: disk full"}\n')
    _, said = hanging.communicate(timeout=40)
    assert hanging.returncode == 1
    assert "fastft: rank 0 (process 6 on node1) stopped: OSError: disk full; the other ranks end with it" in said
    here.close()
