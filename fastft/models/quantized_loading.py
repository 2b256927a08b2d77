"""A quantised base, made layer by layer and kept on disk.

Each decoder layer is read (or drawn), its linear layers quantised, and written to a file of its own; what lies outside
of the layers follows as another. Neither host nor device ever holds more than one layer in the checkpoint's precision.
The files are then mapped into memory: a second start reads nothing that it does not use, and on a CPU processes on one
node share the memory.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from fastft.errors import ModelError
from fastft.files import replaced, write_text
from fastft.models.causal import decoder_layers
from fastft.models.checkpoint import RandomWeights, StoredWeights
from fastft.models.quantized import Packing, QuantizedLinear, quantize

FORMAT = 1  # of the files; part of their key
REST = "rest"  # file of what lies outside of the decoder layers


class _EmptyOnMeta(TorchFunctionMode):
    """torch.empty makes tensors without memory; buffers that modules compute (rotary frequencies) are as ever."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if function is torch.empty:
            kwargs["device"] = "meta"
        return function(*args, **kwargs)


def empty_model(config: PretrainedConfig, dtype: torch.dtype, trust_remote_code: bool = False) -> PreTrainedModel:
    """The model of a config without memory for its weights."""
    with _EmptyOnMeta():
        return AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=trust_remote_code)


class QuantizedFiles:
    """The quantised weights of one base in the cache folder: a file for each decoder layer, one for the rest, an index.

    The index is written last; a folder that has it and all files is complete. Files are written in one step, so work
    that was stopped goes on where it was, and processes may share it.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        weights: StoredWeights | RandomWeights,
        *,
        kind: str,
        dtype: torch.dtype,
        cache_dir: Path,
        device: torch.device,
    ):
        """model: empty, as `empty_model` makes it. dtype: of arithmetic, and of what is not quantised.

        device: where weights are quantised.
        """
        self.model, self.weights, self.kind, self.dtype, self.device = model, weights, kind, dtype, device
        self.layers = decoder_layers(model)
        if not self.layers:
            raise ModelError(f"model.quantization={kind}: {type(model).__name__} does not name its decoder layers")
        self.linears = {
            f"{layer}.{name}": module
            for layer, parent in self.layers.items()
            for name, module in parent.named_modules()
            if isinstance(module, nn.Linear)
        }
        if not self.linears:
            raise ModelError(
                f"model.quantization={kind}: the decoder layers of {type(model).__name__} have no torch.nn.Linear"
            )
        key = json.dumps([FORMAT, kind, str(dtype), weights.identity()])
        self.folder = cache_dir / "quantized" / hashlib.sha256(key.encode()).hexdigest()[:32]
        self.units = [*self.layers, REST]

    def _path(self, unit: str) -> Path:
        return self.folder / f"{unit}.safetensors"

    @property
    def is_complete(self) -> bool:
        return self._index() is not None and not self.lacking()

    def _index(self) -> dict | None:
        """What `finish` wrote; None where there is nothing, or something else."""
        try:
            return json.loads((self.folder / "index.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors, counted."""
        packed = {
            f"{name}.weight": Packing(self.kind, tuple(m.weight.shape)).nbytes for name, m in self.linears.items()
        }
        return sum(packed.get(n, p.numel() * self.dtype.itemsize) for n, p in self.model.named_parameters())

    def lacking(self) -> list[str]:
        return [unit for unit in self.units if not self._path(unit).is_file()]

    def make(self, units: list[str], advance: Callable[[], None] = lambda: None) -> None:
        """Quantise and write `units`; raises ModelError where there is no room."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self._check_room()
        for unit in units:
            tensors = dict(self._pack(name, tensor) for name, tensor in self._parameters(unit))
            with replaced(self._path(unit)) as partial:
                # One entry: several would stand in any order, and the same weights have another digest each time.
                save_file(tensors, partial, metadata={"quantization": self.kind})
            del tensors
            advance()

    def finish(self) -> None:
        """Write the index, with what identifies the weights: a digest of every file."""
        files = {}
        for unit in self.units:
            with open(self._path(unit), "rb") as file:
                files[unit] = hashlib.file_digest(file, "sha256").hexdigest()
        write_text(self.folder / "index.json", json.dumps({"quantization": self.kind, "sha256": files}, indent=1))

    def digest(self) -> str:
        """SHA-256 over the bytes of all weights."""
        return hashlib.sha256(json.dumps(self._index(), sort_keys=True).encode()).hexdigest()

    def load(self) -> PreTrainedModel:
        """The model with its weights in place, mapped from the files."""
        places = dict(self.model.named_modules())
        for unit in self.units:
            try:
                with safe_open(self._path(unit), "pt") as file:
                    tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            except Exception as error:  # safetensors has a kind of its own
                raise ModelError(
                    f"{self._path(unit)}: these quantised weights cannot be read ({error}); remove {self.folder}, and "
                    "the next run makes them anew"
                ) from error
            for name, tensor in tensors.items():
                place, _, kind = name.rpartition(".")
                if place in self.linears:
                    continue
                setattr(places[place], kind, nn.Parameter(tensor, requires_grad=False))
            for name in self.linears:
                if f"{name}.packed" in tensors:
                    shape = tuple(self.linears[name].weight.shape)
                    packed, bias = tensors[f"{name}.packed"], tensors.get(f"{name}.bias")
                    self.model.set_submodule(name, QuantizedLinear(packed, shape, self.kind, bias, self.dtype))
        self.model.tie_weights()
        unset = [n for n, t in (*self.model.named_parameters(), *self.model.named_buffers()) if t.is_meta]
        if unset:
            raise ModelError(
                f"{type(self.model).__name__}: nothing sets {', '.join(unset[:5])}; use model.quantization=none"
            )
        return self.model

    def _parameters(self, unit: str) -> Iterator[tuple[str, Tensor]]:
        if unit != REST:
            yield from self.weights.parameters(self.layers[unit], unit, recurse=True)
            return
        inside = {m for layer in self.layers.values() for m in layer.modules()}
        seen: set[nn.Parameter] = set()  # tied weights are written once, under their first name
        for name, module in self.model.named_modules():
            own = set(module.parameters(recurse=False))
            if module not in inside and own - seen:
                seen |= own
                yield from self.weights.parameters(module, name, recurse=False)

    def _pack(self, name: str, tensor: Tensor) -> tuple[str, Tensor]:
        layer, _, kind = name.rpartition(".")
        if kind == "weight" and layer in self.linears:
            # From what the checkpoint says, not from its rounding to the dtype of arithmetic.
            return f"{layer}.packed", quantize(tensor.to(self.device), self.kind).cpu()
        return name, tensor.to("cpu", self.dtype).contiguous()

    def _check_room(self) -> None:
        there = sum(p.stat().st_size for p in self.folder.glob("*.safetensors"))
        needed, free = self.nbytes - there, shutil.disk_usage(self.folder).free
        if needed > free:
            raise ModelError(
                f"cache_dir: the quantised weights take {needed / 2**30:.1f} GiB more in {self.folder}, "
                f"{free / 2**30:.1f} GiB are free; free some, or set cache_dir to another disk"
            )
