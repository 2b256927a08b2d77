"""The process of a command ends as it should, whatever the threads of torch.distributed do meanwhile."""

import os
import socket
import subprocess
import sys

import pytest

from tests.conftest import ROOT, clean_environment

# What a command does instead of its work: rank 1 leaves while one of gloo's threads has a tensor to free, for which it
# waits until rank 0 joins the sum, and then for Python's lock, which the main thread keeps until the interpreter ends.
WORK = """
import atexit, builtins, os, sys, time
import fastft.cli

class Torn:
    def __del__(self):
        os.abort()

def main(arguments):
    import torch
    import torch.distributed as dist

    dist.init_process_group("gloo")
    builtins.held = dist.group.WORLD  # as DeepSpeed's parameters hold it
    x = torch.ones(4)
    dist.all_reduce(x)
    sys.setswitchinterval(100)
    if os.environ["RANK"] == "0":
        time.sleep(1)
    work = dist.all_reduce(x, async_op=True)
    if os.environ["RANK"] == "0":
        work.wait()
        time.sleep(3)
        return 0
    del work, x
    atexit.register(print, "called at exit")
    builtins.torn = Torn()
    end = time.monotonic() + 2.5
    while time.monotonic() < end:
        pass
    print("done", end="")  # without a newline: it must be flushed
    return 7

fastft.cli.main = main  # sys.exit(main([])) aborts here
from fastft.__main__ import command
command([])
"""


def test_a_thread_that_waits_for_pythons_lock_aborts_no_command(tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    script = tmp_path / "work.py"
    script.write_text(WORK)
    processes = [
        subprocess.Popen(
            [sys.executable, str(script)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={k: v for k, v in _environment(rank, port).items() if k != "PYTHONUNBUFFERED"},
        )
        for rank in (0, 1)
    ]
    (_, _), (out, error) = [p.communicate(timeout=120) for p in processes]
    assert [p.returncode for p in processes] == [0, 7], error
    assert out == "donecalled at exit\n"


def _environment(rank: int, port: int) -> dict[str, str]:
    told = {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return {**clean_environment(), **told, "PYTHONPATH": str(ROOT)}


@pytest.mark.parametrize(
    ("arguments", "code"), [(["--version"], 0), ([], 2), (["plan", "--cfg", "none.yaml", "--gpu", "cpu"], 1)]
)
def test_exit_codes(arguments, code):
    command = [sys.executable, "-m", "fastft", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == code, done.stderr


def test_output_that_nobody_takes_is_an_error():
    read, write = os.pipe()
    os.close(read)
    buffered = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    command = [sys.executable, "-m", "fastft", "--version"]
    done = subprocess.run(command, stdout=write, env=buffered, cwd=ROOT, check=False)
    os.close(write)
    assert done.returncode == 120
