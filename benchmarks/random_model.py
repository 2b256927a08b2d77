"""A folder with an OPT of a published size without weights, and a tokenizer: speed and memory can be measured anywhere.

python benchmarks/random_model.py opt-1.3b FOLDER
fastft train --cfg configs/quickstart.yaml model.name_or_path=FOLDER model.random_weights=true ...

The tokenizer is a byte-level BPE trained on the documents that fastft ships; the model keeps OPT's full vocabulary of
50,272, so that its head costs what it costs.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from tokenizers import ByteLevelBPETokenizer
from transformers import OPTConfig, PreTrainedTokenizerFast

from fastft.config import DataConfig
from fastft.tasks import load_documents

SIZES = {  # hidden size, layers, heads (Zhang et al. 2022, arXiv 2205.01068, table 1)
    "opt-125m": (768, 12, 12),
    "opt-1.3b": (2048, 24, 32),
    "opt-2.7b": (2560, 32, 32),
    "opt-6.7b": (4096, 32, 32),
    "opt-13b": (5120, 40, 40),
    "opt-30b": (7168, 48, 56),
    "opt-66b": (9216, 64, 72),
}


def write(size: str, folder: Path) -> None:
    hidden, layers, heads = SIZES[size]
    config = OPTConfig(
        vocab_size=50272,
        hidden_size=hidden,
        word_embed_proj_dim=hidden,
        ffn_dim=4 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        max_position_embeddings=2048,
        dropout=0.0,
        architectures=["OPTForCausalLM"],
    )
    config.save_pretrained(folder)
    bpe = ByteLevelBPETokenizer()
    texts = [d.text for d in load_documents(DataConfig())]
    bpe.train_from_iterator(texts, vocab_size=2048, special_tokens=["</s>"], show_progress=False)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe._tokenizer, bos_token="</s>", eos_token="</s>", pad_token="</s>"
    )
    tokenizer.save_pretrained(folder)


def main() -> int:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("size", choices=SIZES)
    p.add_argument("folder", type=Path)
    a = p.parse_args()
    write(a.size, a.folder)
    print(a.folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
