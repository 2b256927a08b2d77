"""A model counted from its configuration alone: modules on the meta device, no weights anywhere."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, OPTConfig, PretrainedConfig, PreTrainedModel

from fastft import peft
from fastft.config import Config, PeftConfig
from fastft.errors import ModelError
from fastft.methods import ft
from fastft.models import loading
from fastft.models.causal import PackedCausalLM
from fastft.models.recompute import attention_modules
from fastft.models.tiled_mlp import mlp_modules

ITEMSIZE = {"bfloat16": 2, "float16": 2, "float32": 4}


def _opt(hidden: int, layers: int, heads: int, embedding: int | None = None) -> OPTConfig:
    return OPTConfig(
        vocab_size=50272,
        hidden_size=hidden,
        word_embed_proj_dim=embedding or hidden,
        ffn_dim=4 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        max_position_embeddings=2048,
        do_layer_norm_before=embedding is None,  # OPT-350M alone normalises behind its blocks
    )


# Published shapes: Zhang et al. 2022 (arXiv 2205.01068), table 1, and the models' config.json.
PUBLISHED = {
    "facebook/opt-125m": _opt(768, 12, 12),
    "facebook/opt-350m": _opt(1024, 24, 16, embedding=512),
    "facebook/opt-1.3b": _opt(2048, 24, 32),
    "facebook/opt-2.7b": _opt(2560, 32, 32),
    "facebook/opt-6.7b": _opt(4096, 32, 32),
    "facebook/opt-13b": _opt(5120, 40, 40),
    "facebook/opt-30b": _opt(7168, 48, 56),
    "facebook/opt-66b": _opt(9216, 64, 72),
    "smollm2-135m": LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        max_position_embeddings=8192,
        tie_word_embeddings=True,
    ),
}


def find_config(config: Config) -> tuple[PretrainedConfig, str]:
    """The configuration of model.name_or_path, and where it is from: a folder, this table, or the hub and its cache.

    Raises ModelError where there is none.
    """
    m = config.model
    if m.name_or_path in loading.PACKAGED:
        return PUBLISHED[m.name_or_path], "fastft's table of published shapes"
    path = loading.resolve(m.name_or_path, config.cache_path)
    options = {"revision": m.revision, "trust_remote_code": m.trust_remote_code}
    if Path(path).is_dir():
        return _read(path, options), f"{path}/config.json"
    try:
        return AutoConfig.from_pretrained(path, local_files_only=True, **options), "the hub's config.json, in the cache"
    except (OSError, ValueError):
        if m.name_or_path in PUBLISHED:
            return PUBLISHED[m.name_or_path], "fastft's table of published shapes; the hub's config.json is not here"
    return _read(path, options), "the hub's config.json"


def _read(path: str, options: dict) -> PretrainedConfig:
    try:
        return AutoConfig.from_pretrained(path, **options)
    except (OSError, ValueError) as error:
        tables = ", ".join(PUBLISHED)
        raise ModelError(
            f"model.name_or_path={path}: its config.json cannot be read ({str(error).strip().splitlines()[0]}); give a "
            f"folder that holds it, or a model that fastft knows: {tables}"
        ) from error


def build(model_config: PretrainedConfig, *, dtype: str, layers: int | None = None) -> PreTrainedModel:
    """The model on the meta device, frozen, as `models.loading` makes it; layers: only so many of its own."""
    model_config = copy.deepcopy(model_config)
    model_config.use_cache = False
    if layers is not None:
        model_config.num_hidden_layers = layers
        kinds = getattr(model_config, "layer_types", None)
        if kinds:
            model_config.layer_types = kinds[:layers]
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(model_config, dtype=getattr(torch, dtype))
    return loading.arrange(model)


def inject(
    lm: PackedCausalLM, config: PeftConfig, num_labels: int | None, head: str = "linear"
) -> dict[str, nn.Parameter]:
    """The trained parameters by name, as a run makes them; num_labels: with a head for so many, see ft.head."""
    if num_labels is None:
        return peft.inject(lm.model, config)
    new = ft.replace_head(lm, num_labels, head)
    return {**peft.inject(lm.model, config), **{name: p.requires_grad_(True) for name, p in new.items()}}


@dataclass(frozen=True)
class Counts:
    """What a model is made of, in parameters, and what of it a run trains.

    linear: weights that every token is multiplied by, the head apart: matrices of the decoder layers and of projections
    around them; again_layers, again_attention, again_mlp: those that backward multiplies by once more where it computes
    a layer, its attention, or an MLP that is a module again. small: those of tensors below ZeRO-3's
    persistence threshold, which every rank keeps whole. bias_copies: what BitFit keeps of the base.
    """

    parameters: int
    linear: int
    again_layers: int
    again_attention: int
    again_mlp: int
    quantisable: int  # weights of the decoder layers' linear modules
    quantisable_rows: int
    in_layers: int  # of the decoder layers
    small: int
    head: int  # [V, H] of the head
    layers: int
    hidden: int
    head_size: int  # D
    query_width: int  # H heads of D
    kv_width: int  # G heads of D
    positions: int | None
    trained: int
    added: int  # parameters that the base does not have
    trained_sizes: tuple[int, ...]
    trained_linear: int  # of `linear`, weights that get a gradient
    adapter: int  # weights of adapters that every token is multiplied by
    bias_copies: int


def _again(blocks: list[nn.Module], linear: dict[int, int]) -> int:
    """Weights of linears in `blocks` but for each block's last one where it is frozen: recomputing stops before it."""
    total = 0
    for block in blocks:
        *others, last = (m for m in block.modules() if hasattr(m, "in_features"))
        is_trained = any(p.requires_grad and p.dim() > 1 for p in last.parameters())
        needed = [*others, last] if is_trained else others
        total += sum(linear.get(id(p), 0) for m in needed for p in m.parameters(recurse=False))
    return total


PERSISTENT = 100_000  # elements; DeepSpeed's stage3_param_persistence_threshold


def count(model_config: PretrainedConfig, config: Config, num_labels: int | None = None) -> Counts:
    """Parameters of a model and of what the run trains of it; num_labels: with a classification head of so many."""
    model = build(model_config, dtype=config.model.dtype)
    lm = PackedCausalLM(model)
    if not lm.layers:
        raise ModelError(f"{type(model).__name__} does not name its decoder layers; the planner cannot count it")
    parameters = dict(model.named_parameters())  # a tied head once
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)} | {id(lm.head.weight)}
    linear = {id(p): p.numel() for p in parameters.values() if p.dim() == 2 and id(p) not in embeddings}
    inside = [m for layer in lm.layers for m in layer.modules() if isinstance(m, nn.Linear)]
    text = model_config.get_text_config()
    heads = text.num_attention_heads
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // heads
    total, head = sum(p.numel() for p in parameters.values()), lm.head.weight.numel()
    layer_sizes = [sum(p.numel() for p in layer.parameters()) for layer in lm.layers]  # the adapter is not there yet
    small = sum(p.numel() for p in parameters.values() if p.numel() < PERSISTENT)
    with torch.device("meta"):
        trained = inject(lm, config.peft, num_labels, config.ft.head)
    return Counts(
        parameters=total,
        linear=sum(linear.values()),
        again_layers=_again(lm.layers, linear),
        again_attention=_again(attention_modules(lm), linear),
        again_mlp=_again(mlp_modules(lm), linear),
        quantisable=sum(m.weight.numel() for m in inside),
        quantisable_rows=sum(m.weight.shape[0] for m in inside),
        in_layers=sum(layer_sizes),
        small=small,
        head=head,
        layers=len(layer_sizes),
        hidden=text.hidden_size,
        head_size=head_dim,
        query_width=heads * head_dim,
        kv_width=(getattr(text, "num_key_value_heads", None) or heads) * head_dim,
        positions=loading.max_positions(model.config),
        trained=sum(p.numel() for p in trained.values()),
        added=sum(p.numel() for p in trained.values() if id(p) not in {id(p) for p in parameters.values()}),
        trained_sizes=tuple(p.numel() for p in trained.values()),
        trained_linear=sum(linear.get(id(p), 0) for p in trained.values()),
        adapter=sum(p.numel() for p in trained.values() if p.dim() == 2 and id(p) not in {*linear, *embeddings}),
        bias_copies=sum(b.numel() for name, b in model.named_buffers() if name.endswith("base_bias")),
    )
