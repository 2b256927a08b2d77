"""The tokenizer as three functions: text to ids, ids to text, and where generated text ends."""

from __future__ import annotations

from functools import lru_cache

from transformers import PreTrainedTokenizerBase

from fastft.models.loading import leading_tokens

BREAK = "\n"  # a token of its own in front of any text, for tokenizers that put a space there


class Text:
    """A text is cut into tokens in parts: leading tokens, what the sequence begins with, and what comes behind it.

    Tokenizers of sentencepiece's kind (Llama 2, Mistral, Phi-3) put a space in front of any text that they are given.
    It belongs to the first part alone: behind a query " Yes" would have two.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self.tokenizer = tokenizer
        self._break = self._ids([BREAK])[0]
        alone, behind = self._ids(["a", f"{BREAK}a"])
        # Where line breaks are dropped, so is the space in front of " Yes".
        knows_breaks = tokenizer.decode(self._break) == BREAK
        self._adds_space = knows_breaks and behind[len(self._break) :] != alone
        self.leading = leading_tokens(tokenizer)
        self.special = set(tokenizer.all_special_ids)
        self.decode_token = lru_cache(maxsize=None)(lambda token: tokenizer.decode([token]))

    def encode(self, text: str) -> list[int]:
        """Ids of `text` behind other text, nothing put in front or behind."""
        return self.encode_all([text])[0]

    def begin(self, text: str) -> list[int]:
        """Ids of `text` right behind the leading tokens."""
        return self._ids([text])[0]

    def encode_all(self, texts: list[str], *, begin: bool = False) -> list[list[int]]:
        """`encode` of each text in one call, or `begin` of each."""
        if begin or not self._adds_space:
            return self._ids(texts)
        size, found = len(self._break), self._ids([BREAK + text for text in texts])
        return [ids[size:] if ids[:size] == self._break else self.begin(t) for ids, t in zip(found, texts, strict=True)]

    def _ids(self, texts: list[str]) -> list[list[int]]:
        return self.tokenizer(texts, add_special_tokens=False).input_ids if texts else []

    def cut(self, ids: list[int], max_tokens: int) -> list[int]:
        """The ids that `tokenizer(text, truncation=True, max_length=max_tokens)` keeps behind the leading tokens."""
        room = max(max_tokens - len(self.leading), 0)
        return ids[-room:] if room and self.tokenizer.truncation_side == "left" else ids[:room]

    def decode(self, ids: list[int]) -> str:
        """The text of ids behind other text, special tokens left out."""
        if not self._adds_space:
            return self.tokenizer.decode(ids, skip_special_tokens=True)
        return self.tokenizer.decode([*self._break, *ids], skip_special_tokens=True).removeprefix(BREAK)

    def ends_line(self, ids: list[int]) -> bool:
        """Whether the last id is a special token or holds a line break."""
        return ids[-1] in self.special or "\n" in self.decode_token(ids[-1])
