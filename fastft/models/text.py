"""The tokenizer as three functions: text to ids, ids to text, and where generated text ends."""

from __future__ import annotations

from functools import lru_cache

from transformers import PreTrainedTokenizerBase

from fastft.models.loading import leading_tokens


class Text:
    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self.tokenizer = tokenizer
        self.leading = leading_tokens(tokenizer)
        self.special = set(tokenizer.all_special_ids)
        self.decode_token = lru_cache(maxsize=None)(lambda token: tokenizer.decode([token]))

    def encode(self, text: str) -> list[int]:
        """Ids of `text` alone, nothing put in front or behind."""
        return self.tokenizer(text, add_special_tokens=False).input_ids

    def encode_all(self, texts: list[str]) -> list[list[int]]:
        """`encode` of each text, in one call."""
        return self.tokenizer(texts, add_special_tokens=False).input_ids if texts else []

    def decode(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=True)

    def ends_line(self, ids: list[int]) -> bool:
        """Whether the last id is a special token or holds a line break."""
        return ids[-1] in self.special or "\n" in self.decode_token(ids[-1])
