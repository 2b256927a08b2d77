"""The store of teacher targets: computed once, kept on disk, memory-mapped for training.

A store is a folder <root>/<key>/ whose key is a SHA-256 over all that determines its content (`store_key`). It is
built in a hidden folder beside it and renamed when complete, so a store is there whole or not at all. index.json holds
its description, the offset of every sequence and a checksum of every array; a store whose bytes do not match is
rebuilt, never used.

Arrays, for N target positions in the order of the sequences:
    hidden   hidden [N, H] in the model's dtype
    topk     topk_ids [N, k] int32, topk_log_probs [N, k] float32 (natural log, temperature 1, full vocabulary)
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fastft.errors import FastftError

FORMAT = 1
STALE_SECONDS = 7 * 24 * 3600  # an unfinished store that nobody touched for so long is abandoned


def store_key(description: dict[str, Any]) -> str:
    """Hex digest of everything that determines the targets; equal keys mean equal stores."""
    text = json.dumps({"format": FORMAT, **description}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def free_bytes(folder: Path) -> int:
    return shutil.disk_usage(folder).free


class TeacherStore:
    """Memory-mapped teacher targets; `rows(i)` are those of sequence i."""

    def __init__(self, folder: Path, arrays: dict[str, torch.Tensor], offsets: list[int]):
        self.folder, self.arrays, self.offsets = folder, arrays, offsets

    def rows(self, sequence: int) -> dict[str, torch.Tensor]:
        span = slice(self.offsets[sequence], self.offsets[sequence + 1])
        return {name: array[span] for name, array in self.arrays.items()}

    @property
    def nbytes(self) -> int:
        return sum(a.nbytes for a in self.arrays.values())

    @classmethod
    def open(cls, folder: Path) -> TeacherStore | None:
        """The store in `folder`, or None if there is none or its bytes are not those that were written."""
        try:
            index = json.loads((folder / "index.json").read_text(encoding="utf-8"))
            arrays = {}
            for name, spec in index["arrays"].items():
                path = folder / f"{name}.bin"
                if path.stat().st_size != spec["bytes"] or _checksum(path) != spec["sha256"]:
                    return None
                arrays[name] = _map(path, spec, writable=False)
            return cls(folder, arrays, index["offsets"])
        except (OSError, ValueError, KeyError):
            return None


class StoreWriter:
    """Builds a store. Of several ranks the first calls `create` and `finish`, all call `write`, barriers between."""

    def __init__(
        self,
        folder: Path,
        specs: dict[str, tuple[tuple[int, ...], torch.dtype]],
        lengths: list[int],
        *,
        run: str = "",
    ):
        """specs: name -> (shape of one row, dtype); lengths: target positions of each sequence.

        run: a name of this run, the same on all its ranks; two runs may build one store at the same time.
        """
        self.folder = folder
        self.partial = folder.with_name(f".{folder.name}.{run}.partial")
        self.offsets = [0, *np.cumsum(lengths, dtype=np.int64).tolist()]
        self.specs = {
            name: {
                "shape": [self.offsets[-1], *shape],
                "dtype": str(dtype).removeprefix("torch."),
                "bytes": self.offsets[-1] * int(np.prod(shape, dtype=np.int64)) * dtype.itemsize,
            }
            for name, (shape, dtype) in specs.items()
        }
        self.arrays: dict[str, torch.Tensor] = {}

    @property
    def nbytes(self) -> int:
        return sum(spec["bytes"] for spec in self.specs.values())

    def create(self) -> None:
        """Reserve the files; raises FastftError where the disk has no room, and leaves nothing behind."""
        self.folder.parent.mkdir(parents=True, exist_ok=True)
        free = free_bytes(self.folder.parent)
        if self.nbytes > free:
            raise FastftError(
                f"the teacher store takes {_gib(self.nbytes)}, but {self.folder.parent} has {_gib(free)} free; free "
                "some, set cache_dir to another disk, or store less (distill.targets=topk, distill.loss_on=completion)"
            )
        for stale in self.folder.parent.glob(f".{self.folder.name}.*.partial"):  # of runs that were killed
            if stale == self.partial or time.time() - stale.stat().st_mtime > STALE_SECONDS:
                shutil.rmtree(stale, ignore_errors=True)
        self.partial.mkdir()
        try:
            for name, spec in self.specs.items():
                with open(self.partial / f"{name}.bin", "wb") as file:
                    if spec["bytes"]:
                        os.posix_fallocate(file.fileno(), 0, spec["bytes"])
        except OSError as error:
            shutil.rmtree(self.partial, ignore_errors=True)
            raise FastftError(
                f"the teacher store takes {_gib(self.nbytes)}: {self.folder.parent}: {error.strerror}"
            ) from None

    def write(self, sequence: int, rows: dict[str, torch.Tensor]) -> None:
        if not self.arrays:
            self.arrays = {
                name: _map(self.partial / f"{name}.bin", spec, writable=True) for name, spec in self.specs.items()
            }
        span = slice(self.offsets[sequence], self.offsets[sequence + 1])
        for name, value in rows.items():
            self.arrays[name][span] = value.to(self.arrays[name].dtype).cpu()

    def finish(self, description: dict[str, Any]) -> None:
        """Checksum, describe and rename into place."""
        self.arrays = {}
        for name, spec in self.specs.items():
            spec["sha256"] = _checksum(self.partial / f"{name}.bin")
        index = {"format": FORMAT, "description": description, "arrays": self.specs, "offsets": self.offsets}
        (self.partial / "index.json").write_text(json.dumps(index), encoding="utf-8")
        if TeacherStore.open(self.folder) is not None:  # another run was first, with the same content
            shutil.rmtree(self.partial)
            return
        shutil.rmtree(self.folder, ignore_errors=True)  # a store that failed its checksum
        os.replace(self.partial, self.folder)


def _map(path: Path, spec: dict[str, Any], *, writable: bool) -> torch.Tensor:
    dtype = getattr(torch, spec["dtype"])
    count = int(np.prod(spec["shape"], dtype=np.int64))
    if count == 0:
        return torch.empty(spec["shape"], dtype=dtype)
    # shared=False is copy-on-write: nothing that training does can reach the file.
    return torch.from_file(str(path), shared=writable, size=count, dtype=dtype).view(spec["shape"])


def _checksum(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _gib(count: int) -> str:
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"
