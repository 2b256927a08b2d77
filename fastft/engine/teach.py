"""The teach phase: every target of the teacher once, found in the cache folder or computed now."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

from fastft.config import Config
from fastft.data.store import (
    BuildLock,
    Layout,
    StoreWriter,
    TeacherStore,
    check_free,
    size_text,
    store_key,
    written_positions,
)
from fastft.distributed import Ranks
from fastft.engine.base import Base, Prepared, prefix_key
from fastft.engine.output import write_json
from fastft.engine.progress import Reporter
from fastft.errors import FastftError, Interrupted
from fastft.methods import distill

LOCK_POLL_SECONDS = 1.0


def teach(config: Config, base: Base, prepared: Prepared, ranks: Ranks, out: Reporter) -> TeacherStore:
    """The teacher's targets: found in the cache folder, gone on with where an earlier run stopped, or computed now."""
    d = config.distill
    description = {
        "what": "targets",
        "base": base.fingerprint,
        "tokenizer": base.tokenizer_fingerprint,
        "dtype": config.model.dtype,
        "device": base.lm.device.type,
        "windows": [w.token_ids for w in prepared.windows],
        "sequences": [(s.window, s.prompt, s.completion) for s in prepared.sequences],
        "targets": d.targets,
        "top_k": d.top_k if d.targets == "topk" else None,
        "loss_on": d.loss_on,
        **prefix_key(config),
    }
    layout = Layout(
        store_key(description),
        distill.target_specs(d, base.lm),
        [len(s.target_positions(d.loss_on)) for s in prepared.sequences],
    )
    folder = config.cache_path / "teacher" / layout.key
    what = f"{layout.positions:,} {d.targets} targets, {size_text(layout.nbytes)}"
    begin = time.monotonic()
    check_shared(folder, ranks)
    store = TeacherStore.open(folder, layout, ranks)
    if not store.is_complete:
        with _sole_builder(folder, ranks, out):
            store = TeacherStore.open(folder, layout, ranks)  # another run may have been at work
            if not store.is_complete:
                about = {k: v for k, v in description.items() if k not in ("windows", "sequences")}
                about |= {"documents": sorted({w.document for w in prepared.windows}), "positions": layout.positions}
                seconds, prefix_bytes = _compute(config, base, prepared, store, about, ranks, out)
                rate = (layout.positions - store.positions) / seconds
                store = TeacherStore.open(folder, layout, ranks)
                if not store.is_complete:
                    raise FastftError(
                        f"{folder}: the teacher store that was just written does not read back; check the disk"
                    )
                shared = f" on each of {ranks.world_size} processes" if base.lm.shared_by else ""
                out.line(
                    f"teach      {what}, {seconds:.1f} s ({rate:,.0f} targets/s), context {size_text(prefix_bytes)} "
                    f"({config.model.prefix}{shared}), written to {folder}"
                )
                return store
    out.line(f"teach      {what}, found in {folder}, checked in {time.monotonic() - begin:.1f} s")
    return store


def _compute(
    config: Config,
    base: Base,
    prepared: Prepared,
    store: TeacherStore,
    about: dict[str, Any],
    ranks: Ranks,
    out: Reporter,
) -> tuple[float, int]:
    """Compute the targets that `store` lacks and write them to its folder: (seconds, bytes of the largest prefix)."""
    layout, folder = store.layout, store.folder
    lacking = 1 - store.positions / layout.positions
    problem = None
    if ranks.is_first:
        try:
            store.prune()
            check_free(folder, int(lacking * layout.nbytes))
            write_json(folder / "about.json", about)
        except (FastftError, OSError) as error:
            problem = str(error)
    problem = ranks.gather(problem)[0]
    if problem:
        raise FastftError(problem)
    if store.damaged or store.where:
        damaged = f"; damaged or foreign blocks, computed again: {store.damaged}" if store.damaged else ""
        out.line(f"teach      goes on: {store.positions:,} of {layout.positions:,} targets are in {folder}{damaged}")

    def kept() -> str:
        there = written_positions(folder, layout)
        return f"{there:,} of {layout.positions:,} targets are kept in {folder}; the same command goes on with them"

    count = len(prepared.sequences) - len(store.where)
    try:
        with out.phase("teach", count, "sequences") as phase, closing(StoreWriter(folder, layout, ranks)) as writer:
            prefix_bytes = distill.teach(
                base.lm,
                prepared.windows,
                prepared.sequences,
                config.distill,
                writer,
                ranks,
                present=store,
                batch_size=config.evaluate.batch_size,
                advance=phase.advance,
            )
    except Interrupted as stopped:
        raise Interrupted(f"stopped while teaching; {kept()}", stopped.signum) from None
    problem = next((p for p in ranks.gather(writer.error and writer.error.strerror) if p), None)
    if problem:
        raise FastftError(f"the teacher store cannot be written: {folder}: {problem}; {kept()}")
    return phase.seconds, prefix_bytes


@contextmanager
def _sole_builder(folder: Path, ranks: Ranks, out: Reporter) -> Iterator[None]:
    """One run builds a store at a time; others wait for it and then find its targets, all or some."""
    lock = BuildLock(folder) if ranks.is_first else None
    try:
        waiting = False
        # The first rank tells the others at every turn: collectives have a time limit, another run has none.
        while not ranks.gather(lock is None or lock.acquire())[0]:
            if not waiting:
                out.line(f"teach      another run writes these targets; waiting for it ({folder})")
            waiting = True
            time.sleep(LOCK_POLL_SECONDS)
        yield
    finally:
        if lock:
            lock.release()


def check_shared(folder: Path, ranks: Ranks) -> None:
    """Every rank reads what all ranks write: refuse a cache folder of which each node has its own."""
    if ranks.world_size == 1:
        return
    probe = None
    if ranks.is_first:
        folder.mkdir(parents=True, exist_ok=True)
        probe = tempfile.NamedTemporaryFile(dir=folder, prefix=".probe-")  # noqa: SIM115
    name = ranks.gather(probe and probe.name)[0]
    shared = ranks.all(os.path.exists(name))
    if probe:
        probe.close()
    if not shared:
        raise FastftError(
            f"cache_dir: {folder} is not the same folder for all {ranks.world_size} processes; set cache_dir to one "
            "that all nodes share"
        )
