"""The store of teacher targets: computed once, kept on disk, memory-mapped for training.

A store is a folder <root>/<key>/ whose key is a SHA-256 over all that determines its content (`store_key`). Every
process that computes targets appends them to a shard of its own, so no two processes ever write one file:

    shard-GGG-RRR.bin      blocks of targets; G counts the runs that worked on the store, R is the rank
    shard-GGG-RRR.jsonl    a line a block: its sequences, where its bytes lie, and their SHA-256

A block is the targets of the sequences that went through the teacher together. Its checksum covers the store's key, the
numbers of its sequences and its bytes, and a block counts only when the checksum holds: what a killed run wrote is used
as far as it got to the disk, and a damaged block, or one of another store, is computed again. A store is complete when
its blocks cover every sequence. Sizes and offsets follow from the run's own `Layout`; nothing is taken from the folder
on trust.

Arrays, a row a target position:
    hidden   hidden [H] in the model's dtype
    topk     topk_ids [k] int32, topk_log_probs [k] float32 (natural log, temperature 1, full vocabulary)
A block holds one array after the other, each with the rows of its sequences in their order.
"""

from __future__ import annotations

import fcntl
import hashlib
import io
import json
import math
import operator
import os
import re
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from fastft.distributed import Ranks
from fastft.errors import FastftError

FORMAT = 2
ALIGNMENT = 64  # bytes; every array of every block begins at a multiple
SYNC_SECONDS = 10.0  # what a power cut can cost; a killed process loses only the block it was writing


def store_key(description: dict[str, Any]) -> str:
    """Hex digest of everything that determines the targets; equal keys mean equal stores."""
    text = json.dumps({"format": FORMAT, **description}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def free_bytes(folder: Path) -> int:
    return shutil.disk_usage(folder).free


@dataclass(frozen=True)
class Layout:
    """What a store holds: arrays, name -> (shape of one row, dtype), and the target positions of each sequence."""

    key: str
    arrays: dict[str, tuple[tuple[int, ...], torch.dtype]]
    lengths: list[int]

    @property
    def positions(self) -> int:
        return sum(self.lengths)

    @property
    def nbytes(self) -> int:
        return self.positions * sum(math.prod(shape) * dtype.itemsize for shape, dtype in self.arrays.values())

    def spans(self, sequences: list[int]) -> tuple[dict[str, tuple[int, int]], int]:
        """Where each array of a block of these sequences lies, name -> (offset, bytes), and the block's size."""
        rows, end, spans = sum(self.lengths[i] for i in sequences), 0, {}
        for name, (shape, dtype) in self.arrays.items():
            size = rows * math.prod(shape) * dtype.itemsize
            spans[name] = (end, size)
            end += -(-size // ALIGNMENT) * ALIGNMENT
        return spans, end

    def checksum(self, sequences: list[int], data: Any) -> str:
        digest = hashlib.sha256(json.dumps([self.key, sequences]).encode())
        digest.update(data)
        return digest.hexdigest()


@dataclass(frozen=True)
class Block:
    """A line of a shard's journal."""

    shard: str
    offset: int
    sequences: list[int]
    sha256: str


@dataclass
class TeacherStore:
    """Memory-mapped teacher targets, as far as they are there; `rows(i)` are those of sequence i."""

    folder: Path
    layout: Layout
    shards: dict[str, torch.Tensor] = field(default_factory=dict)  # bytes of each, uint8
    where: dict[int, tuple[Block, int]] = field(default_factory=dict)  # sequence -> (block, its first row there)
    damaged: int = 0  # blocks whose checksum does not hold
    head: torch.Tensor | None = None  # [V, H] that reads hidden targets; None: the model's, where it stays as it is

    @classmethod
    def open(cls, folder: Path, layout: Layout, ranks: Ranks | None = None) -> TeacherStore:
        """What `folder` holds of a store: every block is read and its checksum compared; the ranks share this work."""
        ranks = ranks or Ranks()
        store = cls(folder, layout)
        blocks = ranks.gather(_read_journals(folder, layout) if ranks.is_first else [])[0]
        for name in sorted({block.shard for block in blocks}):
            store.shards[name] = _map(folder / f"{name}.bin")
        with ThreadPoolExecutor(torch.get_num_threads()) as threads:
            own = list(threads.map(store._holds, blocks[ranks.rank :: ranks.world_size]))
        holds = [False] * len(blocks)
        for rank, part in enumerate(ranks.gather(own)):
            holds[rank :: ranks.world_size] = part
        for block, sound in zip(blocks, holds, strict=True):
            store.damaged += not sound
            row = 0
            for i in block.sequences if sound else ():
                store.where.setdefault(i, (block, row))
                row += layout.lengths[i]
        return store

    def _bytes(self, block: Block) -> torch.Tensor:
        size = self.layout.spans(block.sequences)[1]
        return self.shards[block.shard][block.offset : block.offset + size]

    def _holds(self, block: Block) -> bool:
        return self.layout.checksum(block.sequences, self._bytes(block).numpy()) == block.sha256

    def __contains__(self, sequence: int) -> bool:
        return sequence in self.where

    @property
    def is_complete(self) -> bool:
        return len(self.where) == len(self.layout.lengths)

    @property
    def positions(self) -> int:
        """Target positions that are there."""
        return sum(self.layout.lengths[i] for i in self.where)

    def rows(self, sequence: int) -> dict[str, torch.Tensor]:
        block, first = self.where[sequence]
        found, data = {}, self._bytes(block)
        for name, (offset, size) in self.layout.spans(block.sequences)[0].items():
            shape, dtype = self.layout.arrays[name]
            array = data[offset : offset + size].view(dtype).view(-1, *shape)
            found[name] = array[first : first + self.layout.lengths[sequence]]
        return found

    def prune(self) -> None:
        """Delete shards of which nothing is used: all damaged, or another store's. Only while holding the BuildLock."""
        used = {block.shard for block, _ in self.where.values()}
        for path in self.folder.glob("shard-*"):
            if path.stem not in used:
                path.unlink(missing_ok=True)


def _map(path: Path) -> torch.Tensor:
    size = path.stat().st_size
    if size == 0:  # its sequences have no targets; an empty file cannot be mapped
        return torch.empty(0, dtype=torch.uint8)
    # shared=False is copy-on-write: nothing that training does can reach the file.
    return torch.from_file(str(path), shared=False, size=size, dtype=torch.uint8)


def _read_journals(folder: Path, layout: Layout) -> list[Block]:
    """Blocks that could be this store's and lie within their files, the newest first; not yet checked."""
    blocks = []
    for path in sorted(folder.glob("shard-*.jsonl"), reverse=True):
        try:
            size, lines = path.with_suffix(".bin").stat().st_size, path.read_bytes().splitlines()
        except OSError:
            continue
        for line in lines:
            try:
                block = Block(shard=path.stem, **json.loads(line))
                known = all(i in range(len(layout.lengths)) for i in block.sequences)
                if known and 0 <= operator.index(block.offset) <= size - layout.spans(block.sequences)[1]:
                    blocks.append(block)
            except (ValueError, TypeError):  # cut off or damaged
                continue
    return blocks


def written_positions(folder: Path, layout: Layout) -> int:
    """Target positions that the journals in `folder` name, unchecked."""
    return sum(layout.lengths[i] for i in {i for block in _read_journals(folder, layout) for i in block.sequences})


class StoreWriter:
    """Appends blocks to a shard of its own; whatever becomes of the writer, its blocks so far are there.

    Checksums and files are a thread's work, beside the next forward. error: what went wrong there (a full disk);
    nothing is written after it.
    """

    def __init__(self, folder: Path, layout: Layout, ranks: Ranks | None = None):
        ranks = ranks or Ranks()
        self.layout = layout
        runs = [int(found[1]) for path in folder.iterdir() if (found := re.match(r"shard-(\d+)-", path.name))]
        name = f"shard-{ranks.gather(max(runs, default=0) + 1)[0]:03d}-{ranks.rank:03d}"
        self.data = io.FileIO(folder / f"{name}.bin", "xb")
        self.journal = io.FileIO(folder / f"{name}.jsonl", "xb")
        self.error: OSError | None = None
        self.synced = time.monotonic()
        self.thread = ThreadPoolExecutor(1)
        self.pending = self.thread.submit(lambda: None)

    def write(self, sequences: list[int], arrays: dict[str, torch.Tensor]) -> None:
        """The targets of these sequences, each array [positions of all of them, ...]."""
        spans, size = self.layout.spans(sequences)
        block = torch.zeros(size, dtype=torch.uint8)
        for name, (offset, length) in spans.items():
            rows = arrays[name].to("cpu", self.layout.arrays[name][1]).contiguous()
            block[offset : offset + length] = rows.view(-1).view(torch.uint8)
        self.pending.result()  # at most one block waits
        self.pending = self.thread.submit(self._append, list(sequences), block)

    def _append(self, sequences: list[int], block: torch.Tensor) -> None:
        if self.error:
            return
        # The order in which the two files reach the disk does not matter: a block is believed for its checksum alone.
        data = memoryview(block.numpy())
        line = {"sequences": sequences, "offset": self.data.tell(), "sha256": self.layout.checksum(sequences, data)}
        try:
            _write_all(self.data, data)
            _write_all(self.journal, memoryview(json.dumps(line).encode() + b"\n"))
            if time.monotonic() - self.synced > SYNC_SECONDS:
                self._sync()
        except OSError as error:
            self.error = error

    def _sync(self) -> None:
        for file in (self.data, self.journal):
            os.fsync(file.fileno())
        self.synced = time.monotonic()

    def close(self) -> None:
        """Bring everything that was handed over to the disk."""
        self.thread.shutdown()
        try:
            self._sync()
        except OSError as error:
            self.error = self.error or error
        self.data.close()
        self.journal.close()


def _write_all(file: io.FileIO, data: memoryview) -> None:
    while len(data):
        data = data[file.write(data) :]


class BuildLock:
    """The right to build a store: one run at a time has it, and the kernel takes it back when that run dies."""

    def __init__(self, folder: Path):
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self.file = io.FileIO(folder / "lock", "a")
        except OSError as error:
            raise FastftError(f"cache_dir: {folder}: {error.strerror}") from None

    def acquire(self) -> bool:
        """Whether it is ours now; does not wait."""
        try:
            fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        except OSError as error:
            raise FastftError(
                f"cache_dir: {self.file.name} cannot be locked: {error.strerror}; use a file system that has locks"
            ) from None
        return True

    def release(self) -> None:
        self.file.close()


def check_free(folder: Path, nbytes: int) -> None:
    """Raise FastftError, before a target is paid for, where the disk cannot hold `nbytes` more."""
    free = free_bytes(folder)
    if nbytes > free:
        raise FastftError(
            f"the teacher store takes {size_text(nbytes)}, but {folder} has {size_text(free)} free; free some, set "
            "cache_dir to another disk, or store less (distill.targets=topk, distill.loss_on=completion)"
        )


def size_text(count: int) -> str:
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"
