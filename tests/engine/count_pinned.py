"""Runs of configs (the arguments) that count the bytes of gathered weights which something still holds after a forward.

Prints a line "pinned {...}" for each run; one whose file is called *-pin.yaml holds on to its weights.
"""

from __future__ import annotations

import json
import os
import sys

from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator as Coordinator
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn import functional as F

from fastft.cli import main
from fastft.peft.frozen_linear import FrozenLinear

NAME = "_PartitionedParameterCoordinator__release_param"
release, backward, linear = getattr(Coordinator, NAME), DeepSpeedEngine.backward, FrozenLinear.forward
released: list[tuple[StorageWeakRef, int]] = []
run: dict = {}


def watched_release(coordinator, param, *args, **kwargs):
    storage = param.data.untyped_storage()
    if param.ds_status.name == "AVAILABLE" and storage.nbytes():
        released.append((StorageWeakRef(storage), param.data.nbytes))
        run["released_bytes"] += param.data.nbytes
    del storage
    return release(coordinator, param, *args, **kwargs)


def watched_backward(engine, *args, **kwargs):
    run["pinned_bytes"].append(sum(n for ref, n in released if not ref.expired()))
    released.clear()
    return backward(engine, *args, **kwargs)


setattr(Coordinator, NAME, watched_release)
DeepSpeedEngine.backward = watched_backward
paths = [a for a in sys.argv[1:] if a.endswith(".yaml")]
for path in paths:
    run.update(released_bytes=0, pinned_bytes=[])
    if path.endswith("-pin.yaml"):
        FrozenLinear.forward = lambda self, x: F.linear(x, self.weight.detach(), self.bias)
    code = main(["train", "--cfg", path])
    if code:
        sys.exit(code)
    FrozenLinear.forward = linear
    if os.environ["RANK"] == "0":
        print("pinned " + json.dumps(run), flush=True)
# As fastft/__main__.py ends a process, and for the same reason.
sys.stdout.flush()
os._exit(0)
