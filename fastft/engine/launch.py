"""Starting the processes' part of a run: threads, torch.distributed, device."""

from __future__ import annotations

import ctypes
import io
import os
import socket
from contextlib import redirect_stdout
from pathlib import Path

import torch

from fastft.distributed import Ranks
from fastft.engine import watch
from fastft.errors import FastftError
from fastft.memory import KEPT_FREE, MAPPED_BLOCK, resident_at_start


def start(threads_per_rank: int | None) -> Ranks:
    """Join the other processes of this run; alone, be a run of one process.

    The `deepspeed` launcher (or torchrun) sets RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT.
    """
    if "RANK" not in os.environ:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        os.environ.update(
            RANK="0",
            LOCAL_RANK="0",
            WORLD_SIZE="1",
            LOCAL_WORLD_SIZE="1",
            MASTER_ADDR="127.0.0.1",
            MASTER_PORT=str(port),
        )
    needed = ("WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    if missing := [name for name in needed if name not in os.environ]:
        raise FastftError(
            f"RANK={os.environ['RANK']} is set, as for one process of several, but not {', '.join(missing)}; "
            "start with `deepspeed fastft/train.py` or torchrun, which set all of them, or unset RANK"
        )
    import deepspeed

    local_size = int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or os.environ["WORLD_SIZE"])
    cores = len(os.sched_getaffinity(0))
    torch.set_num_threads(threads_per_rank or max(1, cores // local_size))
    device = torch.device("cpu")
    _limit_malloc()
    resident_at_start()  # now, and not when the run's end asks for it
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
    if os.environ["WORLD_SIZE"] == "1":
        # Nobody to share memory with; and a process killed while torch loads this op leaves a lock that all wait for.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    elif os.environ["RANK"] == "0" and device.type == "cpu" and not _shared_memory_op_is_built():
        print("start      DeepSpeed compiles its shared-memory communication, once (about 20 s)", flush=True)
    try:
        with redirect_stdout(io.StringIO()):  # it reports that build every time
            deepspeed.init_distributed(verbose=False)
    except torch.distributed.DistNetworkError as error:
        address = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        raise FastftError(
            f"the processes cannot meet at {address}: {str(error).splitlines()[0]} If another run uses this port, "
            "choose one: deepspeed --master_port PORT fastft/train.py ..."
        ) from error
    if device.type == "cpu":
        torch.distributed.barrier()  # every process has mapped the others' buffers
        _unlink_shared_memory()
    ranks = Ranks(int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), device)
    watch.begin(ranks)
    return ranks


# glibc's limits, their names in its malloc.h, and the variables with which users set them
MALLOC_LIMITS = {
    "MALLOC_MMAP_THRESHOLD_": (-3, MAPPED_BLOCK),
    "MALLOC_TRIM_THRESHOLD_": (-1, KEPT_FREE),
}


def _limit_malloc() -> None:
    """Let large blocks be mapped one by one and go back to the system when they are freed, and small ones be kept.

    glibc raises the size of the former up to 32 MiB as large blocks are freed. Activations then come from its heap,
    whose holes between long-lived and short-lived tensors made a training step hold 1.4 times what its tensors take.
    Where all blocks of 256 KiB are mapped, on the other hand, fresh pages were a third of a step of 300 tokens.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    for variable, (name, limit) in MALLOC_LIMITS.items():
        if mallopt is not None and variable not in os.environ:
            mallopt(name, limit)


def _unlink_shared_memory() -> None:
    """Give this process's all-reduce buffer to the memory that its mappings hold.

    DeepSpeed creates 66 MiB in shared memory for each process and never removes the name, so that every run, killed or
    not, would leave them behind until the machine starts again.
    """
    name = "_".join((str(os.getuid()), *(os.environ[key] for key in ("MASTER_ADDR", "MASTER_PORT", "RANK"))))
    Path("/dev/shm", f"deepspeed_allreduce_buffer_{name}").unlink(missing_ok=True)


def extensions_folder() -> Path:
    """Where torch keeps what DeepSpeed compiles at run time."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    return Path(os.environ.get("TORCH_EXTENSIONS_DIR") or cache / "torch_extensions")


def _shared_memory_op_is_built() -> bool:
    return any(extensions_folder().rglob("deepspeed_shm_comm.so"))
