"""Models, configs and workloads that plans are made for."""

from __future__ import annotations

from transformers import GPTNeoXConfig, LlamaConfig, OPTConfig, Qwen2Config

from fastft.config import Config, validate
from fastft.plan import architecture
from fastft.plan.workload import Workload

COMMON = {"vocab_size": 120, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4}
GROUPED = {**COMMON, "intermediate_size": 48, "num_key_value_heads": 2}
TINY = {
    "opt": OPTConfig(**COMMON, word_embed_proj_dim=16, ffn_dim=64),
    "llama": LlamaConfig(**GROUPED, tie_word_embeddings=True),
    "gpt_neox": GPTNeoXConfig(**COMMON, intermediate_size=48),
    "qwen2": Qwen2Config(**GROUPED),
}
LLAMA_8B = LlamaConfig(
    vocab_size=128256,
    hidden_size=4096,
    intermediate_size=14336,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=8,
    max_position_embeddings=131072,
)


def config(**values) -> Config:
    return validate({"output_dir": "unused", **values})


def opt_30b(**values) -> tuple[Config, architecture.Counts]:
    c = config(model={"name_or_path": "facebook/opt-30b"}, **values)
    return c, architecture.count(architecture.find_config(c)[0], c)


def workload(contexts=(), sequences=(), asked=()) -> Workload:
    return Workload(tuple(contexts), tuple(sequences), tuple(sequences), tuple(asked), 0, "a test")
