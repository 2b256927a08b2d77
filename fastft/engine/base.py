"""What a run starts from: the frozen base model, and what is prepared for training and evaluation."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from fastft.config import Config
from fastft.data.sequences import Sequence, Window
from fastft.distributed import Ranks
from fastft.engine.progress import Reporter
from fastft.errors import FastftError
from fastft.methods.evaluation import QuestionSet
from fastft.methods.icl import ChoiceSet
from fastft.models import loading
from fastft.models.causal import PackedCausalLM
from fastft.models.quantized import parameter_count
from fastft.models.quantized_loading import QuantizedFiles
from fastft.models.text import Text
from fastft.models.tiled_mlp import tile_mlps
from fastft.models.ulysses import check_model


@dataclass
class Base:
    """The frozen model with what identifies it."""

    lm: PackedCausalLM
    text: Text
    path: str
    fingerprint: str
    tokenizer_fingerprint: str
    attention: str  # who computes it, in words

    def describe(self, config: Config, ranks: Ranks) -> str:
        """A line of a run's beginning."""
        count, m = parameter_count(self.lm), config.model
        held = m.dtype if m.quantization == "none" else f"{m.quantization} + {m.dtype}"
        processes, threads = ranks.world_size, torch.get_num_threads()
        return (
            f"model      {m.name_or_path}  {count:,} parameters  {held}  {ranks.device}  "
            f"{processes} process{'es' if processes > 1 else ''} x {threads} thread{'s' if threads > 1 else ''}  "
            f"attention {self.attention}"
            f"{'' if self.lm.shared_by is None else ', contexts shared (Ulysses)'}"
        )


@dataclass
class Prepared:
    """All that training and evaluation read."""

    windows: list[Window]
    sequences: list[Sequence]
    evaluated: list[QuestionSet] | list[ChoiceSet]
    control: list[QuestionSet]


def load_base(config: Config, ranks: Ranks, out: Reporter) -> Base:
    m = config.model
    if ranks.device.type == "cpu":
        refuse_what_needs_a_gpu(config)
    make_cache_folder(config)
    if ranks.is_first:
        path = loading.resolve(m.name_or_path, config.cache_path)
    ranks.barrier()
    path = loading.resolve(m.name_or_path, config.cache_path)
    tokenizer = loading.load_tokenizer(path, revision=m.revision, trust_remote_code=m.trust_remote_code)
    source = {
        "dtype": m.dtype,
        "revision": m.revision,
        "trust_remote_code": m.trust_remote_code,
        "random_weights": m.random_weights,
        "seed": config.seed,
    }
    if m.quantization == "none":
        model = loading.load_model(path, attention=m.attention, dropout=m.dropout, **source)
        fingerprint = loading.fingerprint(model)
    else:
        files = loading.quantized_files(
            path, kind=m.quantization, cache_dir=config.cache_path, device=ranks.device, **source
        )
        quantize(files, ranks, out)
        model = loading.prepare_model(files.load(), path, attention=m.attention, dropout=m.dropout)
        fingerprint = loading.fingerprint(model, files.digest())
    loading.check_tokenizer(tokenizer, model, path)
    # A back end that was asked for and cannot be used is refused here, not at the first layer.
    backend = loading.attention_backend(model, m.attention, ranks.device)
    vocabulary = json.dumps(sorted(tokenizer.get_vocab().items()))
    lm = PackedCausalLM(model, placement=m.prefix, shared_by=sharing(config, model, ranks, out))
    if m.mlp_tile:
        tile_mlps(lm, m.mlp_tile)
    if config.has_host_layers:
        lm.keep_layers_on_host(ranks.device)
    else:
        model.to(ranks.device)
    return Base(
        lm,
        Text(tokenizer),
        path,
        fingerprint,
        hashlib.sha256(vocabulary.encode()).hexdigest(),
        backend.title if backend else "fastft" if ranks.device.type == "cpu" and m.attention == "auto" else "padded",
    )


def make_cache_folder(config: Config) -> None:
    """Raise FastftError, before anything is computed, where there can be no cache folder."""
    try:
        config.cache_path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise FastftError(
            f"cache_dir={config.cache_path}: the folder cannot be made: {error.strerror}; set cache_dir or "
            "FASTFT_CACHE to one that can"
        ) from error


def refuse_what_needs_a_gpu(config: Config) -> None:
    """Raise FastftError for a value that a run on the CPU cannot have."""
    if config.model.dtype == "float16":
        raise FastftError("model.dtype=float16 needs a GPU; on the CPU use bfloat16 or float32")
    if config.train.activation_offloading:
        raise FastftError(
            "train.activation_offloading=true needs a GPU: on the CPU activations are in host memory already; "
            "use train.activation_offloading=false"
        )
    if config.train.optimizer.startswith("paged_"):
        unpaged = config.train.optimizer.removeprefix("paged_")
        raise FastftError(
            f"train.optimizer={config.train.optimizer} needs a GPU: its state is in CUDA's unified memory, and on the "
            f"CPU it is in host memory already; use train.optimizer={unpaged}"
        )


def quantize(files: QuantizedFiles, ranks: Ranks, out: Reporter) -> None:
    """Make the quantised weights that the cache folder lacks, the layers dealt out to the ranks."""
    if ranks.all(files.is_complete):
        return
    lacking = ranks.gather(files.lacking())[0]
    with out.phase("quantize", len(lacking), "layers") as phase:
        files.make(lacking[ranks.rank :: ranks.world_size], lambda: phase.advance(ranks.world_size))
        ranks.barrier()
    if ranks.is_first:
        files.finish()
    ranks.barrier()


def sharing(config: Config, model: PreTrainedModel, ranks: Ranks, out: Reporter) -> Ranks | None:
    """The ranks where they encode contexts together; raises ModelError where the model is not one for it."""
    if config.model.sequence_parallel == "none":
        return None
    if ranks.world_size == 1:
        out.line("model      sequence_parallel=ulysses changes nothing: there is one process, which has all heads")
        return None
    check_model(model, ranks.world_size)
    return ranks


def prefix_key(config: Config) -> dict[str, str]:
    """What the placement of the context's keys and values adds to a key: only int8 changes what the teacher says."""
    return {"prefix": "int8"} if config.model.prefix == "int8" else {}
