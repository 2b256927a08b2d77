"""A run on two nodes: two network namespaces of this machine, joined by a cable of their own."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import yaml

from tests.conftest import ROOT, clean_environment, losses, wait_for
from tests.engine.test_run import ok

NODES = {"fastft-a": "10.211.55.1", "fastft-b": "10.211.55.2"}
CABLE = {"GLOO_SOCKET_IFNAME": "cable"}  # both nodes have one hostname, which says nothing of their addresses
SSHD = shutil.which("sshd", path=f"{os.environ['PATH']}{os.pathsep}/usr/sbin")

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="both nodes would see the same GPUs")


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
        a, b = NODES
        ip(*f"link add cable netns {a} type veth peer name cable netns {b}".split())
        for name, address in NODES.items():
            ip("-n", name, "address", "add", f"{address}/24", "dev", "cable")
            for device in ("lo", "cable"):
                ip("-n", name, "link", "set", device, "up")
        yield
    finally:
        for name in NODES:
            ip("netns", "del", name)


@pytest.fixture
def ssh(nodes, tmp_path) -> Iterator[Path]:
    """An ssh server on each node, and the folder of an `ssh` that may log in without a password."""
    if SSHD is None or shutil.which("pdsh") is None:
        pytest.skip("DeepSpeed's launcher reaches other nodes with pdsh, and the nodes need sshd")
    keys = tmp_path / "ssh"
    keys.mkdir()
    for name in ("host", "user"):
        make = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(keys / name)]
        subprocess.run(make, check=True, capture_output=True, timeout=60)
    (keys / "sshd_config").write_text(
        f"HostKey {keys / 'host'}\nAuthorizedKeysFile {keys / 'user.pub'}\nPidFile none\nStrictModes no\nUsePAM no\n"
        f"PermitRootLogin prohibit-password\nSetEnv {' '.join(f'{k}={v}' for k, v in CABLE.items())}\n"
    )
    (keys / "config").write_text(
        f"IdentityFile {keys / 'user'}\nUserKnownHostsFile {keys / 'known'}\nStrictHostKeyChecking accept-new\n"
    )
    folder = keys / "bin"
    folder.mkdir()
    (folder / "ssh").write_text(f'#!/bin/sh\nexec {shutil.which("ssh")} -F {shlex.quote(str(keys / "config"))} "$@"\n')
    (folder / "ssh").chmod(0o755)
    Path("/run/sshd").mkdir(exist_ok=True)  # where it leaves its rights behind
    servers = []
    try:
        for name in NODES:
            with open(keys / f"{name}.log", "wb") as log:
                serve = ["ip", "netns", "exec", name, SSHD, "-D", "-e", "-f", str(keys / "sshd_config")]
                servers.append(subprocess.Popen(serve, stdout=log, stderr=log))
        for name in NODES:
            wait_for(lambda name=name: b"Server listening" in (keys / f"{name}.log").read_bytes(), 20)
        yield folder
    finally:
        for server in servers:
            server.kill()
            server.wait()


def prepared(raw: dict, tmp_path: Path, launch) -> tuple[Path, Path]:
    """The config and the hostfile of a run on two nodes, beside the same run on one."""
    ok(launch({**raw, "output_dir": str(tmp_path / "one")}))
    config, hosts = tmp_path / "two.yaml", tmp_path / "hosts"
    config.write_text(yaml.safe_dump({**raw, "output_dir": str(tmp_path / "two")}))
    hosts.write_text("".join(f"{address} slots=1\n" for address in NODES.values()))
    return config, hosts


def same_losses(tmp_path: Path) -> None:
    one, two = (torch.tensor(losses(tmp_path / name)) for name in ("one", "two"))
    assert len(one) == 4
    torch.testing.assert_close(two, one, rtol=1e-4, atol=0)


def test_two_nodes_with_ssh_give_the_numbers_of_one(base_config, launch, tmp_path, ssh):
    """The documented command on the first node alone: the launcher starts the second."""
    raw = base_config("opt", deepspeed={"zero_stage": 3}, evaluate={"answers": False})
    config, hosts = prepared(raw, tmp_path, launch)
    environment = clean_environment()
    done = subprocess.run(
        [
            *("ip", "netns", "exec", next(iter(NODES)), sys.executable, "-m", "deepspeed.launcher.runner"),
            *("--hostfile", str(hosts), str(ROOT / "fastft" / "train.py"), "--cfg", str(config)),
        ],
        env={**environment, "PATH": f"{ssh}{os.pathsep}{environment['PATH']}"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=480,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "2 processes" in done.stdout
    same_losses(tmp_path)


def test_two_nodes_without_ssh_give_the_numbers_of_one(base_config, launch, tmp_path, nodes):
    raw = base_config("opt", deepspeed={"zero_stage": 3}, evaluate={"answers": False})
    config, hosts = prepared(raw, tmp_path, launch)
    running = []
    for rank, name in enumerate(NODES):
        command = [
            *("ip", "netns", "exec", name, sys.executable, "-m", "deepspeed.launcher.runner"),
            *("--hostfile", str(hosts), "--no_ssh", "--node_rank", str(rank)),
            *("--master_addr", NODES["fastft-a"], "--master_port", "29511", "--force_multi"),
            *(str(ROOT / "fastft" / "train.py"), "--cfg", str(config)),
        ]
        environment = {**clean_environment(), **CABLE}
        running.append(
            subprocess.Popen(
                command, env=environment, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
            )
        )
    try:
        printed = [process.communicate(timeout=480)[0] for process in running]
    finally:
        for process in running:
            process.kill()
    assert [process.returncode for process in running] == [0, 0], "\n".join(text[-3000:] for text in printed)
    assert "2 processes" in printed[0]
    same_losses(tmp_path)
