"""The DeepSpeed configuration, derived from a run's config; a user's own file is merged over it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from deepspeed.ops.op_builder import AsyncIOBuilder
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
from pydantic import ValidationError

from fastft.config import Config
from fastft.distributed import REDUCE_BUCKET
from fastft.errors import ConfigError
from fastft.models.causal import PackedCausalLM

# What fastft computes itself: a second value in a user's file could only contradict the config.
OWNED = {
    "optimizer": "train.optimizer, train.lr, ...",
    "scheduler": "train.schedule and train.warmup_steps",
    "train_batch_size": "train.batch_size",
    "train_micro_batch_size_per_gpu": "train.batch_size and train.micro_batches",
    "gradient_accumulation_steps": "train.micro_batches",
    "gradient_clipping": "train.max_grad_norm",
    "bf16": "model.dtype",
    "fp16": "model.dtype",
}


def derive(config: Config, world_size: int, lm: PackedCausalLM) -> dict[str, Any]:
    """DeepSpeed's configuration for a model on `world_size` processes.

    ZeRO-3 gathers the layer at work and the next. By its own settings it keeps what it meets again within a billion
    parameters, so that a model of 1.3 billion took more memory on each of two processes than on one, and fetches 50
    million ahead, a twelfth of a layer of OPT-30B.

    Its bucket for gradients is allocated whole: 1 GB in bfloat16, where LoRA fills a fifth and BitFit nothing. It is
    made as large as the gradients are.

    Raises ConfigError for a user's file that is missing, is not JSON or sets what the config already says.
    """
    ds = config.deepspeed
    zero: dict[str, Any] = {"stage": ds.zero_stage}
    for key, device in (("offload_optimizer", ds.offload_optimizer), ("offload_param", ds.offload_param)):
        if device != "none":
            zero[key] = {"device": device, "pin_memory": False}
        if device == "nvme":
            zero[key]["nvme_path"] = _nvme_folder(key, ds.nvme_path)
    if lm.layers and ds.zero_stage == 3 and (world_size > 1 or ds.offload_param != "none"):
        layer = max(sum(p.numel() for p in layer.parameters()) for layer in lm.layers)
        zero["stage3_max_live_parameters"] = zero["stage3_max_reuse_distance"] = 2 * layer
        zero["stage3_prefetch_bucket_size"] = layer
    if ds.offload_param == "nvme":
        # DeepSpeed (0.19) swaps in twice a parameter that it meets twice ahead, and then stops at an assertion.
        zero["stage3_prefetch_bucket_size"] = 0
        zero["offload_param"].update(_swap_buffers(lm, world_size))
    trained = sum(p.numel() for p in lm.parameters() if p.requires_grad)
    if trained:
        zero["reduce_bucket_size"] = min(trained, REDUCE_BUCKET)
    derived = {
        # DeepSpeed counts "samples" only to check this product; fastft's batches are packed, one row each.
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": config.train.micro_batches,
        "train_batch_size": world_size * config.train.micro_batches,
        "gradient_clipping": config.train.max_grad_norm,
        "steps_per_print": 2**31 - 1,
        "wall_clock_breakdown": False,
        "bf16": {"enabled": config.model.dtype == "bfloat16"},
        "fp16": {"enabled": config.model.dtype == "float16"},
        "zero_optimization": zero,
        # Any torch optimizer, and no JIT build of DeepSpeed's own: the trained parameters are few.
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }
    return merge(derived, _read(ds.config_file)) if ds.config_file else derived


def check_file(config: Config) -> None:
    """Raise ConfigError, before anything is computed, for a user's file that `derive` refuses."""
    if config.deepspeed.config_file:
        _read(config.deepspeed.config_file)


def _swap_buffers(lm: PackedCausalLM, world_size: int) -> dict[str, int]:
    """Buffers in host memory for what is on the disk: for all of a layer, which is gathered whole, and what follows.

    Each is as large as the largest partition.
    """
    largest = max(p.numel() for p in lm.parameters())
    in_a_layer = max(sum(1 for _ in layer.parameters()) for layer in lm.layers)
    return {"buffer_count": in_a_layer + 2, "buffer_size": -(-largest // world_size)}


def _nvme_folder(key: str, path: str) -> str:
    """The folder that DeepSpeed swaps to; raises ConfigError where it cannot."""
    if not AsyncIOBuilder().is_compatible(verbose=False):
        raise ConfigError(
            f"deepspeed.{key}=nvme needs DeepSpeed's async_io op, compiled against libaio: install its headers "
            "(Debian, Ubuntu: apt install libaio-dev), or offload to cpu"
        )
    folder = Path(path).expanduser()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"deepspeed.nvme_path={path}: cannot be written: {error.strerror}") from None
    return str(folder)


def merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """`over` on top of `base`, section by section."""
    merged = dict(base)
    for key, value in over.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = merge(merged[key], value) if both else value
    return merged


def _read(path: str) -> dict[str, Any]:
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"deepspeed.config_file={path}: {error.strerror}") from None
    except ValueError as error:
        raise ConfigError(f"deepspeed.config_file={path}: not JSON: {error}") from None
    if not isinstance(value, dict):
        raise ConfigError(f"deepspeed.config_file={path}: expected an object, found {type(value).__name__}")
    zero = value.get("zero_optimization", {})
    if not isinstance(zero, dict):
        raise ConfigError(
            f"deepspeed.config_file={path}: zero_optimization is {type(zero).__name__}, expected an object"
        )
    problems = [f"  {key}: set {OWNED[key]} instead" for key in value if key in OWNED]
    if "stage" in zero:
        problems.append("  zero_optimization.stage: set deepspeed.zero_stage instead")
    try:
        DeepSpeedZeroConfig(**zero)
    except ValidationError as error:
        problems += [f"  zero_optimization.{e['loc'][0]}: {e['msg']}" for e in error.errors()]
    if problems:
        raise ConfigError("\n".join([f"deepspeed.config_file={path} cannot be used:", *problems]))
    return value
