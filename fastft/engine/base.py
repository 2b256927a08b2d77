"""What a run starts from: the frozen base model, and what is prepared for training and evaluation."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass

from fastft.config import Config
from fastft.data.sequences import Sequence, Window
from fastft.distributed import Ranks
from fastft.errors import FastftError
from fastft.methods.evaluation import QuestionSet
from fastft.methods.icl import ChoiceSet
from fastft.models import loading
from fastft.models.causal import PackedCausalLM
from fastft.models.text import Text


@dataclass
class Base:
    """The frozen model with what identifies it."""

    lm: PackedCausalLM
    text: Text
    path: str
    fingerprint: str
    tokenizer_fingerprint: str
    attention: str  # who computes it on a GPU, in words; empty on a CPU


@dataclass
class Prepared:
    """All that training and evaluation read."""

    windows: list[Window]
    sequences: list[Sequence]
    evaluated: list[QuestionSet] | list[ChoiceSet]
    control: list[QuestionSet]


def load_base(config: Config, ranks: Ranks) -> Base:
    m = config.model
    if m.dtype == "float16" and ranks.device.type == "cpu":
        raise FastftError("model.dtype=float16 needs a GPU; on the CPU use bfloat16 or float32")
    if ranks.is_first:
        path = loading.resolve(m.name_or_path, config.cache_path)
    ranks.barrier()
    path = loading.resolve(m.name_or_path, config.cache_path)
    tokenizer = loading.load_tokenizer(path, revision=m.revision, trust_remote_code=m.trust_remote_code)
    model = loading.load_model(
        path,
        dtype=m.dtype,
        attention=m.attention,
        dropout=m.dropout,
        revision=m.revision,
        trust_remote_code=m.trust_remote_code,
        random_weights=m.random_weights,
        seed=config.seed,
    )
    loading.check_tokenizer(tokenizer, model, path)
    # A back end that was asked for and cannot be used is refused here, not at the first layer.
    backend = loading.attention_backend(model, m.attention, ranks.device)
    fingerprint = loading.fingerprint(model)
    vocabulary = json.dumps(sorted(tokenizer.get_vocab().items()))
    return Base(
        PackedCausalLM(model.to(ranks.device), placement=m.prefix),
        Text(tokenizer),
        path,
        fingerprint,
        hashlib.sha256(vocabulary.encode()).hexdigest(),
        "" if ranks.device.type == "cpu" else f"  attention {backend.title if backend else 'padded'}",
    )


def prefix_key(config: Config) -> dict[str, str]:
    """What the placement of the context's keys and values adds to a key: only int8 changes what the teacher says."""
    return {"prefix": "int8"} if config.model.prefix == "int8" else {}
