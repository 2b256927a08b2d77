"""Checkpoints: what a run needs to go on, whatever the number of ranks and the ZeRO stage.

checkpoints/step_<N>/
    rank_<R>.safetensors   the shards of rank R (`engine.shards`): per shard the float32 parameters and the optimizer's
                           own state, and in the metadata which elements of which trained parameters they are; the
                           random number generator of the rank
    checkpoint.json        step, loss, the evaluated NLL where there is one, the run's identity (fingerprints of base
                           and training sequences, config, trained parameters), and a SHA-256 of every file, its own
                           included

A folder is complete or not there: the ranks write into .step_<N>.partial, which gets its name when everything is on the
disk. The frozen base is not in it. The order of the examples follows from seed and step, so the step is also the
position in the data, and the place in the schedule.
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from fnmatch import fnmatch
from functools import cached_property
from pathlib import Path
from typing import Any

import deepspeed
import torch
from safetensors import safe_open

from fastft import __version__
from fastft.config import Config, check, flatten
from fastft.data.sequences import Sequence
from fastft.distributed import Ranks
from fastft.engine.shards import Piece, Shard, decode, encode, own_shards, set_state
from fastft.engine.trainer import Trainer
from fastft.errors import FastftError
from fastft.files import sha256, sync, write_text
from fastft.tensor_file import write_tensors

FORMAT = 1
DESCRIPTION = "checkpoint.json"
# What may change between a checkpoint and a resume: places, speed, what is printed, kept and evaluated. Models and data
# are compared by what they hold, not by where they lie.
FREE = (
    *("output_dir", "overwrite", "resume", "cache_dir", "deepspeed.*", "evaluate.*", "profile.*"),
    *("train.micro_batches", "model.layers", "model.sequence_parallel"),
    *("train.activation_checkpointing", "train.activation_offloading", "train.tensorboard"),
    *("train.log_every", "train.save_every", "train.keep_*", "train.eval_every", "distill.context_cache_gib"),
    *("model.name_or_path", "model.revision", "model.trust_remote_code", "model.attention", "model.mlp_tile"),
    *("data.path", "data.root", "data.files*", "data.hub", "data.ood", "data.control_documents"),
)
STEADY_SCHEDULES = ("constant", "warmup_lr", "warmup_log_lr")  # which do not depend on train.steps
LOSS_SCALE = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")


class DamagedCheckpoint(FastftError):
    """A checkpoint that is not what was written."""


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint; about: what its checkpoint.json says."""

    path: Path
    about: dict[str, Any]

    @classmethod
    def read(cls, path: Path) -> Checkpoint:
        """The description alone; raises DamagedCheckpoint where it is missing or not as it was written."""
        try:
            about = json.loads((path / DESCRIPTION).read_text(encoding="utf-8"))
            own = about.pop("sha256")
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            raise DamagedCheckpoint(f"{path / DESCRIPTION} is missing or not whole") from None
        if own != _digest(about):
            raise DamagedCheckpoint(f"{path / DESCRIPTION} is not as it was written (SHA-256)")
        if about["format"] != FORMAT:
            raise DamagedCheckpoint(f"{path} has format {about['format']}, expected {FORMAT}: another fastft wrote it")
        return cls(path, about)

    @classmethod
    def verified(cls, path: Path) -> Checkpoint:
        """With every file read and compared."""
        checkpoint = cls.read(path)
        for name, expected in checkpoint.about["files"].items():
            file = path / name
            try:
                size = file.stat().st_size
                if size != expected["bytes"]:
                    raise DamagedCheckpoint(f"{file} has {size:,} bytes, {expected['bytes']:,} were written")
                if sha256(file) != expected["sha256"]:
                    raise DamagedCheckpoint(f"{file} is not as it was written (SHA-256)")
            except OSError as error:
                raise DamagedCheckpoint(f"{file}: {error.strerror}") from None
        return checkpoint

    @property
    def step(self) -> int:
        return self.about["step"]

    def check_config(self, config: Config) -> None:
        """Raise FastftError where a key differs that decides about the numbers."""
        there, problems = check(self.about["config"])
        if there is None:
            raise FastftError(f"{self.path}: its config is not one of this fastft: {'; '.join(problems)}")
        old, new = dict(flatten(there.plain())), dict(flatten(config.plain()))
        free = [*FREE]
        if old.get("train.schedule") == new.get("train.schedule") and new["train.schedule"] in STEADY_SCHEDULES:
            free.append("train.steps")
        differing = [
            f"  {key}: {old.get(key)!r} in the checkpoint, {new.get(key)!r} in the config"
            for key in sorted(old.keys() | new.keys())
            if old.get(key) != new.get(key) and not any(fnmatch(key, pattern) for pattern in free)
        ]
        if differing:
            raise FastftError(
                f"{self.path} is of a run with other settings, which would not have given its numbers:\n"
                + "\n".join(differing)
                + "\nResume with the checkpoint's values, or set resume=never overwrite=true to begin anew"
            )

    def check_base(self, fingerprint: str, name: str) -> None:
        """Raise FastftError where the checkpoint was trained on another base."""
        if self.about["base"] != fingerprint:
            raise FastftError(
                f"{self.path} was trained on another base model: fingerprint {self.about['base'][:16]}, that of "
                f"model.name_or_path={name} is {fingerprint[:16]}; resume with the same weights"
            )

    def check_sequences(self, sequences: list[Sequence]) -> None:
        """Raise FastftError where the run would go on with other training sequences."""
        if self.about["sequences"] != _digest_sequences(sequences):
            raise FastftError(
                f"{self.path} was trained on other sequences than this run would go on with: the data has changed, or "
                "the questions that the teacher wrote are not in cache_dir any more; bring both as they were, or set "
                "resume=never overwrite=true to begin anew"
            )

    @cached_property
    def saved(self) -> SavedState:
        return SavedState(self)


class SavedShard(Mapping):
    """A shard in a file: slices by key, read on indexing."""

    def __init__(self, file: Any, prefix: str, described: dict[str, Any]):
        self.file, self.prefix = file, prefix
        self.pieces = [Piece(*values) for values in described["pieces"]]
        self.numel, self.tensors, self.numbers = described["numel"], described["tensors"], described["numbers"]

    def __getitem__(self, key: str) -> Any:
        if key not in self.tensors:
            raise KeyError(key)
        return self.file.get_slice(self.prefix + key)

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def __len__(self) -> int:
        return len(self.tensors)

    def parameters(self) -> Any:
        return self.file.get_slice(self.prefix + "parameters")

    def state(self) -> dict[str, Any]:
        """The optimizer's state as it was, flat."""
        return {key: self.file.get_tensor(self.prefix + key) for key in self} | self.numbers

    @property
    def step(self) -> float:
        return float(self.file.get_tensor(self.prefix + "step") if "step" in self else self.numbers.get("step", 0))


class SavedState:
    """The tensors of a checkpoint, by rank or by trained parameter."""

    def __init__(self, checkpoint: Checkpoint):
        self.path, self.parameters = checkpoint.path, checkpoint.about["parameters"]
        self.files = [safe_open(self.path / name, "pt") for name in checkpoint.about["files"]]
        self.ranks = []
        for file in self.files:
            described = json.loads(file.metadata()["shards"])
            self.ranks.append([SavedShard(file, f"{i}.", d) for i, d in enumerate(described)])
        self.where: dict[str, list[tuple[SavedShard, Piece]]] = {name: [] for name in self.parameters}
        for shard in (s for rank in self.ranks for s in rank):
            for piece in shard.pieces:
                self.where[piece.name].append((shard, piece))

    def of_rank(self, rank: int) -> list[SavedShard]:
        """The shards that a rank of the same layout had: its own, or where all ranks had the same ones the first's."""
        return self.ranks[rank] if rank < len(self.ranks) and self.ranks[rank] else self.ranks[0]

    def parameter(self, name: str) -> torch.Tensor:
        """A trained parameter, whole, in float32."""
        shape = self.parameters[name]["shape"]
        whole = torch.empty(math.prod(shape))
        for shard, piece in self.where[name]:
            part = shard.parameters()[piece.offset : piece.offset + piece.numel]
            whole[piece.start : piece.start + piece.numel] = part
        return whole.view(shape)

    def moments(self, name: str, begin: int, end: int) -> Iterator[tuple[int, torch.Tensor, torch.Tensor, float]]:
        """(element, exp_avg, exp_avg_sq, step) of elements [begin, end) of a parameter, part by part."""
        for shard, piece in self.where[name]:
            first, last = max(begin, piece.start), min(end, piece.start + piece.numel)
            if first < last and len(shard):
                offset = piece.offset - piece.start
                yield first, *decode(shard, first + offset, last + offset), shard.step

    def random_state(self, rank: int) -> dict[str, torch.Tensor]:
        file = self.files[rank]
        return {key: file.get_tensor(key) for key in file.offset_keys() if key.startswith("random.")}


class Checkpoints:
    """The checkpoints of a run: the last train.keep_checkpoints, and with train.keep_best that of the lowest NLL."""

    def __init__(self, folder: Path, config: Config, base: str, sequences: list[Sequence], ranks: Ranks):
        self.folder, self.config, self.ranks = folder, config, ranks
        self.identity = {"base": base, "sequences": _digest_sequences(sequences), "config": config.plain()}
        self.last: Path | None = None  # what this run wrote or read last
        self.lowest = math.inf  # NLL of the best one

    def is_best(self, nll: float | None) -> bool:
        """Whether this evaluation's NLL makes the step one to keep."""
        return self.config.train.keep_best and nll is not None and nll < self.lowest

    def save(self, trainer: Trainer, step: int, *, loss: float, nll: float | None = None) -> Path:
        """Write checkpoints/step_<N>, complete or not at all; nll: what was evaluated at this step.

        Raises FastftError where it cannot be written; what was there before stays.
        """
        target, partial = self.folder / f"step_{step}", self.folder / f".step_{step}.partial"
        if self.last == target:
            return target
        about = {
            "format": FORMAT,
            "fastft": __version__,
            "step": step,
            "loss": loss,
            "nll": nll,
            "zero_stage": self.config.deepspeed.zero_stage,
            "loss_scale": _loss_scale(trainer.engine),
            "parameters": trainer.described(),
            **self.identity,
        }

        def begin() -> None:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)

        def finish() -> None:
            about["files"] = dict(entries)
            write_text(partial / DESCRIPTION, json.dumps(about | {"sha256": _digest(about)}, indent=1) + "\n")
            for path in (partial / DESCRIPTION, partial):
                sync(path)
            os.replace(partial, target)
            sync(self.folder)
            self._prune()

        self._each_rank(step, begin, first_alone=True)
        entries = self._each_rank(step, lambda: self._write_own(partial, trainer))
        self._each_rank(step, finish, first_alone=True)
        self.last, self.lowest = target, nll if self.is_best(nll) else self.lowest
        return target

    def _each_rank(self, step: int, write: Callable[[], Any], *, first_alone: bool = False) -> list[Any]:
        """What `write` gives on each rank; raises FastftError on all of them where it could not on one."""
        result, problem = None, None
        try:
            if self.ranks.is_first or not first_alone:
                result = write()
        except OSError as error:
            problem = error.strerror or str(error)
        results, problems = zip(*self.ranks.gather((result, problem)), strict=True)
        if not any(problems):
            return list(results)
        last = list_checkpoints(self.folder)
        free = shutil.disk_usage(self.folder).free / 2**20 if self.folder.is_dir() else 0
        if self.ranks.is_first:
            shutil.rmtree(self.folder / f".step_{step}.partial", ignore_errors=True)
        raise FastftError(
            f"the checkpoint of step {step} cannot be written to {self.folder} ({free:.1f} MiB free): "
            f"{next(filter(None, problems))}. The last complete one is {last[-1] if last else 'none'}"
        )

    def _write_own(self, folder: Path, trainer: Trainer) -> tuple[str, dict[str, Any]]:
        """This rank's file: its name, and its size and checksum."""
        if not folder.is_dir():
            unseen = f"rank {self.ranks.rank} does not see it; output_dir must be a folder that all nodes share"
            raise OSError(errno.ENOENT, unseen)
        replicated = self.config.deepspeed.zero_stage == 0 and not self.ranks.is_first
        shards = [] if replicated else own_shards(trainer.engine, trainer.trained, self.ranks)
        described, tensors = [], {"random.cpu": torch.get_rng_state()}
        if self.ranks.device.type == "cuda":
            tensors["random.cuda"] = torch.cuda.get_rng_state(self.ranks.device)
        for i, shard in enumerate(shards):
            state = trainer.engine.basic_optimizer.state.get(shard.master, {})
            tensors[f"{i}.parameters"] = shard.master
            tensors |= {f"{i}.{key}": value for key, value in state.items() if torch.is_tensor(value)}
            described.append(
                {
                    "pieces": [list(asdict(piece).values()) for piece in shard.pieces],
                    "numel": shard.master.numel(),
                    "tensors": [key for key, value in state.items() if torch.is_tensor(value)],
                    "numbers": {key: value for key, value in state.items() if isinstance(value, int | float)},
                }
            )
        name = f"rank_{self.ranks.rank}.safetensors"
        digest = write_tensors(
            folder / name,
            {key: (t.dtype, (t.numel(),) if t.ndim else ()) for key, t in tensors.items()},
            lambda key: tensors[key].reshape(-1) if tensors[key].ndim else tensors[key],
            {"format": "pt", "shards": json.dumps(described)},
        )
        return name, {"bytes": (folder / name).stat().st_size, "sha256": digest}

    def _prune(self) -> None:
        """Delete all but the last ones and, where it is kept, the best."""
        found = list_checkpoints(self.folder)
        kept = found[-self.config.train.keep_checkpoints :]
        if self.config.train.keep_best and (best := best_checkpoint(self.folder)):
            kept.append(best)
        for path in found:
            if path not in kept:
                _remove(path)

    def load(self, trainer: Trainer, checkpoint: Checkpoint) -> None:
        """Put parameters, optimizer state and random numbers back; raises FastftError where they do not fit.

        On as many ranks as wrote it, in the same ZeRO stage, everything is as it was, bit for bit. Elsewhere moments
        go through float32, so that 8-bit state is decoded and encoded again, and ranks have new random numbers.
        """
        self._check_parameters(checkpoint, trainer)
        saved, engine = checkpoint.saved, trainer.engine
        shards, old = own_shards(engine, trainer.trained, self.ranks), saved.of_rank(self.ranks.rank)
        as_it_was = [(s.pieces, s.master.numel()) for s in shards] == [(s.pieces, s.numel) for s in old]
        with torch.no_grad():
            if self.ranks.all(as_it_was):
                for shard, source in zip(shards, old, strict=True):
                    shard.master.copy_(source.parameters()[:].view(shard.master.shape))
                    set_state(engine.basic_optimizer, shard, source.state())
            else:
                for shard in shards:
                    _reshard(shard, saved, engine.basic_optimizer)
            partitioned = self.config.deepspeed.zero_stage == 3
            for name, parameter in trainer.trained.items():
                with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0, enabled=partitioned):
                    if not partitioned or self.ranks.is_first:
                        parameter.data.copy_(saved.parameter(name))
        if len(saved.files) == self.ranks.world_size:
            random = saved.random_state(self.ranks.rank)
            torch.set_rng_state(random["random.cpu"])
            if "random.cuda" in random and self.ranks.device.type == "cuda":
                torch.cuda.set_rng_state(random["random.cuda"], self.ranks.device)
        else:
            torch.manual_seed(self.config.seed + checkpoint.step)
        scaler = _scaler(engine)
        for key, value in checkpoint.about["loss_scale"].items():
            if hasattr(scaler, key):  # ZeRO and what stands in its place without it keep different ones
                setattr(scaler, key, value)
        self.last = checkpoint.path
        if best := best_checkpoint(self.folder):
            self.lowest = Checkpoint.read(best).about["nll"]

    def _check_parameters(self, checkpoint: Checkpoint, trainer: Trainer) -> None:
        there, here = checkpoint.about["parameters"], trainer.described()
        if there == here:
            return
        differing = [name for name in sorted(there.keys() | here.keys()) if there.get(name) != here.get(name)]
        name = differing[0]
        raise FastftError(
            f"{checkpoint.path} has other trained parameters than this model, {len(differing)} of them; the first is "
            f"{name}: {_shape(there.get(name))} in the checkpoint, {_shape(here.get(name))} here"
        )


def _reshard(shard: Shard, saved: SavedState, optimizer: torch.optim.Optimizer) -> None:
    """Fill a shard with its elements, wherever in a checkpoint they are."""
    numel = shard.master.numel()
    parameters, exp_avg, exp_avg_sq, step = torch.zeros(numel), torch.zeros(numel), torch.zeros(numel), 0.0
    for piece in shard.pieces:
        begin, end = piece.start, piece.start + piece.numel
        parameters[piece.offset : piece.offset + piece.numel] = saved.parameter(piece.name).view(-1)[begin:end]
        for element, average, square, done in saved.moments(piece.name, begin, end):
            place = slice(piece.offset + element - begin, piece.offset + element - begin + average.numel())
            exp_avg[place], exp_avg_sq[place] = average, square
            step = max(step, done)
    shard.master.copy_(parameters.view(shard.master.shape))
    moments = [t.to(shard.master.device).view(shard.master.shape) for t in (exp_avg, exp_avg_sq)]
    set_state(optimizer, shard, encode(optimizer, shard, step, *moments))


def list_checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    found = [p for p in folder.glob("step_*") if p.is_dir() and p.name.removeprefix("step_").isdigit()]
    return sorted(found, key=lambda p: int(p.name.removeprefix("step_")))


def newest_intact(folder: Path) -> tuple[Checkpoint | None, list[str]]:
    """The newest checkpoint that is as it was written, and what is wrong with each newer one."""
    problems = []
    for path in reversed(list_checkpoints(folder)):
        try:
            return Checkpoint.verified(path), problems
        except DamagedCheckpoint as error:
            problems.append(str(error))
    return None, problems


def best_checkpoint(folder: Path) -> Path | None:
    """The checkpoint with the lowest evaluated NLL, of those with one."""
    scored = []
    for path in list_checkpoints(folder):
        try:
            nll = Checkpoint.read(path).about["nll"]
        except DamagedCheckpoint:
            continue
        if nll is not None and nll == nll:
            scored.append((nll, path))
    return min(scored, key=lambda item: item[0])[1] if scored else None


def tidy(folder: Path, checkpoint: Checkpoint | None) -> None:
    """Remove what a killed run left unfinished, and the damaged checkpoints behind the one that goes on."""
    for path in folder.glob(".step_*.partial"):
        shutil.rmtree(path, ignore_errors=True)
    for path in list_checkpoints(folder):
        if checkpoint and int(path.name.removeprefix("step_")) > checkpoint.step:
            _remove(path)


def _remove(path: Path) -> None:
    """Delete a checkpoint; killed meanwhile, what is left of it is not taken for one."""
    partial = path.with_name(f".{path.name}.partial")
    os.replace(path, partial)
    shutil.rmtree(partial)


def _scaler(engine: deepspeed.DeepSpeedEngine) -> Any:
    """What keeps the loss scale of float16."""
    return getattr(engine.optimizer, "loss_scaler", None) or getattr(engine.optimizer, "loss_scale_config", None)


def _loss_scale(engine: deepspeed.DeepSpeedEngine) -> dict[str, float]:
    scaler = _scaler(engine)
    return {key: getattr(scaler, key) for key in LOSS_SCALE if hasattr(scaler, key)}


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _digest_sequences(sequences: list[Sequence]) -> str:
    return _digest([(s.window, s.prompt, s.completion) for s in sequences])


def _shape(described: dict[str, Any] | None) -> str:
    return f"{described['dtype']} {described['shape']}" if described else "none"
