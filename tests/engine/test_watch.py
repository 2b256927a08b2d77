"""A rank that dies: the others end at once and say which it was; slow ones are left alone."""

from __future__ import annotations

import re
import signal
import socket
import time

import pytest

from tests.conftest import start_ranks, wait_for


@pytest.mark.parametrize(("victim", "phase", "stage"), [(0, "train", 0), (1, "teach", 3)])
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
    finally:
        for process in processes:
            process.kill()
            process.wait()
