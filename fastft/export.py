"""`fastft export`: what a run trained, from its end or from a checkpoint, in formats that load without fastft.

peft     adapter_config.json and adapter_model.safetensors, for `PeftModel.from_pretrained` and vLLM's `--lora-modules`
merged   the whole model with what was trained in it, and the tokenizer, for transformers alone
delta    delta.safetensors: trained biases minus the base's; how to add them is in its metadata

vLLM takes a rank up to its --max-lora-rank and knows neither modules_to_save nor alpha_pattern: a factor that a layer
has of its own goes into its lora_B, and a classifier's adapter is for PEFT alone.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedModel

from fastft.config import Config, PeftConfig, load_config
from fastft.engine.checkpoints import Checkpoint, best_checkpoint, list_checkpoints, newest_intact
from fastft.errors import FastftError, ModelError
from fastft.files import sync
from fastft.models import loading
from fastft.models.quantized import dequantise
from fastft.peft.files import CLASSIFICATION_HEAD, head_name, save_peft
from fastft.tensor_file import write_tensors

FORMATS = ("peft", "merged", "delta")
DEFAULTS = {"lora": "peft", "bitfit": "delta", "full": "merged", "head": "merged"}
BIAS_SWITCHES = ("attention_bias", "mlp_bias")  # in transformers' configs
HOW = (
    "Add each tensor, in float32, to the base model's parameter of the same name. A name that the base does not have "
    "is a bias that its layer begins to have, or a classification head: the tensor is the whole of it."
)


@dataclass
class Trained:
    """What a run trained, by name in the model (a classification head as score.weight), read one by one."""

    names: list[str]
    read: Callable[[str], torch.Tensor]
    base: str | None  # fingerprint, where a checkpoint says it

    @property
    def lora_layers(self) -> list[str]:
        return [name.removesuffix(".lora_A") for name in self.names if name.endswith(".lora_A")]


def export(run: Path, *, kind: str | None = None, checkpoint: str | None = None, out: Path | None = None) -> Path:
    """Write a run's trained parameters in a format; returns the folder.

    kind: one of FORMATS; None: peft for LoRA, delta for BitFit, else merged.
    checkpoint: "last", "best" (train.keep_best) or "step_<N>"; None: the run's end, its adapter/.
    out: a folder that does not exist; None: <run>/export/<kind>, for a checkpoint <run>/export/<kind>-<checkpoint>.
    Raises FastftError for a format that cannot hold what was trained, and where something is missing.
    """
    if not (run / "config.yaml").is_file():
        raise FastftError(f"{run} is not the folder of a run: it has no config.yaml")
    config = load_config(run / "config.yaml")
    kind = kind or (DEFAULTS[config.peft.kind] if config.peft.is_plain else "merged")
    _check(config, kind)
    out = out or run / "export" / (f"{kind}-{checkpoint}" if checkpoint else kind)
    if out.exists():
        raise FastftError(f"--out {out}: this is there already; remove it or name another folder")
    path = loading.resolve(config.model.name_or_path, config.cache_path)
    trained = _from_checkpoint(run, config, checkpoint, path) if checkpoint else _from_adapter(run, config)
    with _complete(out) as partial:
        if kind == "merged" and config.peft.kind == "full" and not checkpoint:
            shutil.copytree(run / "adapter", partial, dirs_exist_ok=True)  # it is the whole model
        else:
            {"peft": _write_peft, "merged": _write_merged, "delta": _write_delta}[kind](partial, trained, config, path)
        if kind == "merged":
            m = config.model
            tokenizer = loading.load_tokenizer(path, revision=m.revision, trust_remote_code=m.trust_remote_code)
            tokenizer.save_pretrained(partial)
    return out


def _check(config: Config, kind: str) -> None:
    """Raise FastftError where the format has no place for what the config trains."""
    peft, problem = config.peft, None
    quantized = config.model.quantization
    if config.method == "icl":
        problem = "method=icl trains nothing"
    elif config.ft.head != "linear":
        problem = (
            f"ft.head={config.ft.head} has no place in transformers' classifiers, whose head is one linear layer; load "
            "adapter/ with fastft.peft.load_trained"
        )
    elif kind == "merged" and config.method == "ft" and quantized != "none":
        problem = f"a classifier on a base with model.quantization={quantized} cannot be merged; use peft"
    elif kind == "delta" and peft.kind != "bitfit":
        problem = f"it holds biases, and peft.kind={peft.kind} trains others; use {DEFAULTS[peft.kind]}"
    elif kind == "peft" and peft.kind == "bitfit":
        problem = "PEFT and vLLM have no adapters of biases alone (peft.kind=bitfit); use delta or merged"
    elif kind == "peft" and peft.kind != "lora":
        problem = f"peft.kind={peft.kind} is no adapter; use merged"
    elif peft.kind == "lora" and peft.activation != "none":
        problem = (
            f"peft.activation={peft.activation} stands between lora_A and lora_B, so they are no change of the weight "
            "that could be merged, and PEFT has no such layer; load adapter/ with fastft.peft.load_trained"
        )
    elif peft.kind == "lora" and peft.adapter_biases:
        problem = "peft.adapter_biases=true has no place in it; load adapter/ with fastft.peft.load_trained"
    elif kind == "peft" and peft.train_embeddings:
        problem = "peft.train_embeddings=true trains more than adapters; use merged"
    if problem:
        raise FastftError(f"fastft export --format {kind}: {problem}")


def _from_adapter(run: Path, config: Config) -> Trained:
    """From adapter/, which a run writes when its last step is done."""
    folder = run / "adapter"
    if not folder.is_dir():
        raise FastftError(
            f"{run} has no adapter/: its training is not done. --checkpoint last takes its last checkpoint"
        )
    names = {}
    for path in folder.glob("*.safetensors"):
        file = safe_open(path, "pt")
        names |= {_plain_name(key): (file, key) for key in file.offset_keys()}

    def read(name: str) -> torch.Tensor:
        file, key = names[name]
        return file.get_tensor(key)

    return Trained(list(names), read, None)


def _plain_name(key: str) -> str:
    """A tensor's name in the model, from its name in PEFT's file."""
    name = key.removeprefix("base_model.model.")
    return name.removesuffix(".weight") if ".lora_" in name else name


def _from_checkpoint(run: Path, config: Config, which: str, path: str) -> Trained:
    folder = run / "checkpoints"
    if which == "last":
        found, problems = newest_intact(folder)
        if found is None:
            raise FastftError("; ".join([f"{folder} has no intact checkpoint", *problems]))
    elif which == "best":
        best = best_checkpoint(folder)
        if best is None:
            raise FastftError(f"{folder} has no checkpoint with an evaluation; set train.keep_best and eval_every")
        found = Checkpoint.verified(best)
    else:
        there = [p.name for p in list_checkpoints(folder)]
        if which not in there:
            raise FastftError(f"--checkpoint {which}: {folder} has {', '.join(there) or 'none'}")
        found = Checkpoint.verified(folder / which)
    described = found.about["parameters"]
    names = {name: name for name in described}
    if config.method == "ft":
        with torch.device("meta"):
            head = head_name(AutoModelForCausalLM.from_config(_config(config, path)))
        names[CLASSIFICATION_HEAD] = names.pop(f"{head}.weight")

    def read(name: str) -> torch.Tensor:
        own = names[name]
        return found.saved.parameter(own).to(getattr(torch, described[own]["dtype"]))

    return Trained(list(names), read, found.about["base"])


def _config(config: Config, path: str):
    m = config.model
    return AutoConfig.from_pretrained(path, revision=m.revision, trust_remote_code=m.trust_remote_code)


def _load_base(config: Config, path: str, trained: Trained) -> tuple[PreTrainedModel, str]:
    """The base as the run had it, and its fingerprint.

    A quantised base comes with the values that its weights stand for: they are what the adapter was trained on. For a
    classifier with an empty head in the place of the language model's.
    """
    m = config.model
    common = {"revision": m.revision, "trust_remote_code": m.trust_remote_code}
    if config.method == "ft":
        labels, _ = trained.read(CLASSIFICATION_HEAD).shape
        kind = AutoModelForSequenceClassification
        model = kind.from_pretrained(path, num_labels=labels, dtype=getattr(torch, m.dtype), **common)
        return model, loading.fingerprint(model)
    source = {"dtype": m.dtype, "random_weights": m.random_weights, "seed": config.seed, **common}
    if m.quantization == "none":
        model = loading.load_model(path, **source)
        found = loading.fingerprint(model)
    else:
        files = loading.quantized_files(path, kind=m.quantization, cache_dir=config.cache_path, **source)
        if not files.is_complete:
            files.make(files.lacking())
            files.finish()
        model = files.load()
        found = loading.fingerprint(model, files.digest())
        dequantise(model)
    if trained.base and trained.base != found:
        raise ModelError(
            f"model.name_or_path={path} is not the base that the run was trained on: fingerprint {found[:16]}, that of "
            f"the checkpoint is {trained.base[:16]}"
        )
    model.config.use_cache = _config(config, path).use_cache  # which training switched off
    return model, found


def _scaling(peft: PeftConfig, layer: str, trained: Trained) -> float:
    """What lora_B @ lora_A of a layer is multiplied with."""
    fitting = (alpha for name, alpha in peft.alpha_pattern.items() if f".{layer}".endswith(f".{name}"))
    scale = float(trained.read(f"{layer}.lora_scale")) if peft.trained_scale else 1.0
    return scale * next(fitting, peft.lora_alpha) / peft.r


def _write_peft(folder: Path, trained: Trained, config: Config, path: str) -> None:
    peft, tensors = config.peft, {}
    for layer in trained.lora_layers:
        own = _scaling(peft, layer, trained) / (peft.lora_alpha / peft.r)
        lora_B = trained.read(f"{layer}.lora_B")
        tensors[f"{layer}.lora_A"] = trained.read(f"{layer}.lora_A")
        tensors[f"{layer}.lora_B"] = lora_B if own == 1 else (own * lora_B.float()).to(lora_B.dtype)
    if CLASSIFICATION_HEAD in trained.names:
        tensors[CLASSIFICATION_HEAD] = trained.read(CLASSIFICATION_HEAD)
    uniform = peft.model_copy(update={"alpha_pattern": {}, "trained_scale": False})
    save_peft(folder, tensors, uniform, base_model=path)


@torch.no_grad()
def _write_merged(folder: Path, trained: Trained, config: Config, path: str) -> None:
    """With one copy of the model in memory, and one layer's change of it."""
    model, _ = _load_base(config, path, trained)
    for name in trained.names:
        if ".lora_" not in name:
            _put(model, name, trained.read(name))
    for layer in trained.lora_layers:
        weight = model.get_submodule(layer).weight
        lora_A, lora_B = (trained.read(f"{layer}.lora_{x}").float() for x in "AB")
        weight.copy_(weight.float() + _scaling(config.peft, layer, trained) * (lora_B @ lora_A))
    if config.peft.add_biases:
        _declare_biases(model)
    model.save_pretrained(folder)


def _put(model: nn.Module, name: str, value: torch.Tensor) -> None:
    """Set a parameter, or give its module the bias that it does not have."""
    place, _, kind = name.rpartition(".")
    module = model.get_submodule(place)
    there = getattr(module, kind, None)
    if there is None:
        setattr(module, kind, nn.Parameter(value, requires_grad=False))
    else:
        there.copy_(value)


def _declare_biases(model: PreTrainedModel) -> None:
    """Let the model's config say that it has the biases that were added; zero ones where it then has more."""
    for switch in BIAS_SWITCHES:
        if hasattr(model.config, switch):
            setattr(model.config, switch, True)
    with torch.device("meta"):
        declared = dict(type(model)(model.config).named_parameters())
    own = dict(model.named_parameters())
    if nowhere := sorted(own.keys() - declared.keys()):
        raise FastftError(
            f"fastft export --format merged: {type(model).__name__} has no place for the biases that "
            f"peft.add_biases=true added, {nowhere[0]} for one; use delta"
        )
    for name in declared.keys() - own.keys():
        _put(model, name, torch.zeros(declared[name].shape, dtype=model.dtype))


def _write_delta(folder: Path, trained: Trained, config: Config, path: str) -> None:
    model, fingerprint = _load_base(config, path, trained)
    base = dict(model.named_parameters())

    def difference(name: str) -> torch.Tensor:
        value = trained.read(name).float()
        is_new = name not in base or name == CLASSIFICATION_HEAD
        return value if is_new else value - base[name].float()

    write_tensors(
        folder / "delta.safetensors",
        {name: (torch.float32, tuple(trained.read(name).shape)) for name in trained.names},
        difference,
        {"format": "pt", "how": HOW, "base_model_name_or_path": path, "base_fingerprint": fingerprint},
    )


@contextmanager
def _complete(out: Path) -> Iterator[Path]:
    """A folder to write, which gets its name when the block ends without an exception."""
    partial = out.with_name(f".{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        yield partial
        for path in [*partial.iterdir(), partial]:
            sync(path)
        os.replace(partial, out)
        sync(out.parent)
    except (OSError, SafetensorError) as error:
        raise FastftError(f"--out {out} cannot be written: {error}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
