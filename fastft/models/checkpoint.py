"""A model's weights on disk, one tensor at a time."""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming, rename_source_key

from fastft.errors import ModelError

# In the order of preference: an index over shards, or one file.
FILES = (
    "model.safetensors.index.json",
    "model.safetensors",
    "pytorch_model.bin.index.json",
    "pytorch_model.bin",
)


class Checkpoint:
    """The tensors of a folder as `save_pretrained` writes it, in safetensors or PyTorch's own format.

    Files are mapped into memory, so a tensor takes none until it is read, and gives it back when it is dropped.
    """

    def __init__(self, folder: Path):
        found = next((name for name in FILES if (folder / name).is_file()), None)
        if found is None:
            raise ModelError(f"{folder}: no weights there; expected one of {', '.join(FILES)}")
        self.folder, self._opened = folder, {}
        if found.endswith(".json"):
            self._file_of = json.loads((folder / found).read_text(encoding="utf-8"))["weight_map"]
        else:
            self._file_of = dict.fromkeys(self._open(found).keys(), found)

    def identity(self) -> str:
        """SHA-256 over names, sizes and times of the files: what is cheap to look at and differs where they differ."""
        files = sorted({self.folder / name for name in self._file_of.values()} | {self.folder / "config.json"})
        seen = [(p.name, p.stat().st_size, p.stat().st_mtime_ns) for p in files]
        return hashlib.sha256(json.dumps([str(self.folder.resolve()), seen]).encode()).hexdigest()

    def _open(self, name: str):
        if name not in self._opened:
            path = self.folder / name
            try:
                if name.endswith(".safetensors"):
                    self._opened[name] = safe_open(path, "pt")
                else:
                    self._opened[name] = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
            except Exception as error:  # safetensors and the unpickler have kinds of their own
                raise ModelError(f"{path}: cannot be read: {error}") from error
        return self._opened[name]

    def names(self) -> list[str]:
        return list(self._file_of)

    def read(self, name: str) -> Tensor:
        opened = self._open(self._file_of[name])
        return opened[name] if isinstance(opened, dict) else opened.get_tensor(name)


class StoredWeights:
    """The parameters of a model from a checkpoint.

    Files may have other names for them than the model (GPT-NeoX's head is `embed_out` there); transformers knows which.
    """

    def __init__(self, model: PreTrainedModel, checkpoint: Checkpoint):
        self.model, self.checkpoint = model, checkpoint
        transforms = get_model_conversion_mapping(model)
        renamings = [t for t in transforms if isinstance(t, WeightRenaming)]
        converters = [t for t in transforms if not isinstance(t, WeightRenaming)]
        self._stored: dict[str, str] = {}  # the model's name -> the file's
        for name in checkpoint.names():
            renamed, converter = rename_source_key(name, renamings, converters)
            if converter is None:  # the others would have to be computed from what is stored
                self._stored[renamed] = name

    def identity(self) -> str:
        return self.checkpoint.identity()

    def parameters(self, module: nn.Module, prefix: str, recurse: bool) -> Iterator[tuple[str, Tensor]]:
        """(name, tensor) of a module's parameters, one after the other."""
        for name, _ in module.named_parameters(prefix, recurse=recurse):
            found = self._find(name)
            if found is None:
                raise ModelError(
                    f"{self.checkpoint.folder}: there is no tensor {name!r}, which {type(self.model).__name__} needs"
                )
            yield name, self.checkpoint.read(found)

    def _find(self, name: str) -> str | None:
        """The stored name of a parameter: under its own, or that without or with the base model's prefix."""
        base = self.model.base_model_prefix
        names = (name, name.removeprefix(f"{base}."), f"{base}.{name}")
        return next((self._stored[n] for n in names if n in self._stored), None)


class RandomWeights:
    """The parameters of a model drawn as the model draws them, on a device, each module from a seed of its own."""

    def __init__(self, model: PreTrainedModel, seed: int, device: torch.device):
        self.model, self.seed, self.device = model, seed, device

    def identity(self) -> str:
        # Devices draw differently.
        drawn = [self.seed, self.device.type, self.model.config.to_diff_dict()]
        described = json.dumps(drawn, sort_keys=True, default=str)
        return hashlib.sha256(described.encode()).hexdigest()

    def parameters(self, module: nn.Module, prefix: str, recurse: bool) -> Iterator[tuple[str, Tensor]]:
        for name, part in module.named_modules(prefix=prefix) if recurse else [(prefix, module)]:
            own = dict(part.named_parameters(recurse=False))
            if not own:
                continue
            drawn = copy.copy(part)
            drawn._parameters = {
                n: p if p is None else nn.Parameter(torch.empty_like(p, device=self.device), requires_grad=False)
                for n, p in part._parameters.items()
            }
            drawn._modules = {}
            with torch.random.fork_rng(devices=[self.device] if self.device.type == "cuda" else []):
                torch.manual_seed(int.from_bytes(hashlib.sha256(f"{self.seed} {name}".encode()).digest()[:7], "big"))
                self.model._init_weights(drawn)
            for n in own:
                yield f"{name}.{n}", drawn._parameters[n].detach()
