"""A run on two nodes: two network namespaces of this machine, joined by a cable of their own."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import yaml

from tests.conftest import ROOT, clean_environment, losses
from tests.engine.test_run import ok

NODES = {"fastft-a": "10.211.55.1", "fastft-b": "10.211.55.2"}


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, timeout=20)


@pytest.fixture
def nodes() -> Iterator[None]:
    if shutil.which("ip") is None or os.geteuid() != 0:
        pytest.skip("network namespaces need the ip command and root")
    try:
        for name in NODES:
            ip("netns", "add", name)
    except subprocess.CalledProcessError as error:
        pytest.skip(f"no network namespaces here: {error.stderr.decode().strip()}")
    try:
        ip(
            "link",
            "add",
            "cable-a",
            "netns",
            "fastft-a",
            "type",
            "veth",
            "peer",
            "name",
            "cable-b",
            "netns",
            "fastft-b",
        )
        for end, (name, address) in zip("ab", NODES.items(), strict=True):
            ip("-n", name, "address", "add", f"{address}/24", "dev", f"cable-{end}")
            for device in ("lo", f"cable-{end}"):
                ip("-n", name, "link", "set", device, "up")
        yield
    finally:
        for name in NODES:
            ip("netns", "del", name)


@pytest.mark.skipif(torch.cuda.is_available(), reason="both nodes would see the same GPUs")
def test_two_nodes_without_ssh_give_the_numbers_of_one(base_config, launch, tmp_path, nodes):
    raw = base_config("opt", deepspeed={"zero_stage": 3}, evaluate={"answers": False})
    ok(launch({**raw, "output_dir": str(tmp_path / "one")}))
    config, hosts = tmp_path / "two.yaml", tmp_path / "hosts"
    config.write_text(yaml.safe_dump({**raw, "output_dir": str(tmp_path / "two")}))
    hosts.write_text("".join(f"{address} slots=1\n" for address in NODES.values()))
    master = NODES["fastft-a"]
    running = []
    for rank, (name, end) in enumerate(zip(NODES, "ab", strict=True)):
        command = [
            *("ip", "netns", "exec", name, sys.executable, "-m", "deepspeed.launcher.runner"),
            *("--hostfile", str(hosts), "--no_ssh", "--node_rank", str(rank)),
            *("--master_addr", master, "--master_port", "29511", "--force_multi"),
            *(str(ROOT / "fastft" / "train.py"), "--cfg", str(config)),
        ]
        environment = {**clean_environment(), "GLOO_SOCKET_IFNAME": f"cable-{end}"}
        running.append(
            subprocess.Popen(
                command, env=environment, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
            )
        )
    try:
        printed = [process.communicate(timeout=240)[0] for process in running]
    finally:
        for process in running:
            process.kill()
    assert [process.returncode for process in running] == [0, 0], "\n".join(text[-3000:] for text in printed)
    assert "2 processes" in printed[0]
    one, two = (torch.tensor(losses(Path(tmp_path / name))) for name in ("one", "two"))
    assert len(one) == 4
    torch.testing.assert_close(two, one, rtol=1e-4, atol=0)
