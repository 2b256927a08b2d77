"""Texts in parts give the tokens of the whole, whatever the tokenizer does with spaces."""

from __future__ import annotations

import json

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from fastft.methods import icl
from fastft.models.text import Text
from fastft.tasks import Example, Pattern

CORPUS = ["Question: is the mill old? Answer: Yes\n\nQuestion: is the goat a bell? Answer: No, never\n"] * 4


def sentencepiece(kind: str) -> PreTrainedTokenizerFast:
    """As Llama 2's is converted: a space in front of the text, spaces as \u2581, line breaks as bytes."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    if kind == "legacy":
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
        tokenizer.pre_tokenizer = pre_tokenizers.Split("\u2581", "merged_with_next")
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace("\u2581", prepend_scheme="first")
    characters = ["<unk>", "<s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=characters)
    tokenizer.train_from_iterator([text.replace("\n", " ") for text in CORPUS], trainer)
    trained = json.loads(tokenizer.to_str())
    trained["added_tokens"] = trained["added_tokens"][:2]  # the bytes are tokens like others
    tokenizer = Tokenizer.from_str(json.dumps(trained))
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", unk_token="<unk>")


@pytest.fixture(params=["byte-level", "legacy", "metaspace"])
def text(request, tokenizer):
    return Text(tokenizer if request.param == "byte-level" else sentencepiece(request.param))


def test_a_query_and_its_answer_are_the_tokens_of_both(text):
    pattern, example = (
        Pattern("Question: {text1} Answer:", ("Yes", "No, never")),
        Example({"text1": "is the mill old?"}, 0),
    )
    queries = icl.encode_queries(pattern, [example], text, behind_demonstrations=False)
    for words, ids in zip(pattern.choices(example), queries.choices[0], strict=True):
        whole = text.tokenizer("Question: is the mill old? Answer:" + words).input_ids
        assert [*text.leading, *queries.prompts[0], *ids] == whole


def test_demonstrations_and_a_query_are_the_tokens_of_both(text):
    pattern = Pattern("Question: {text1} Answer:", ("Yes", "No"))
    shots = [Example({"text1": "is the goat a bell?"}, 1), Example({"text1": "is the mill old?"}, 0)]
    queries = icl.encode_queries(pattern, shots[:1], text, behind_demonstrations=True)
    whole = "\n\n".join([*map(pattern.demonstrate, shots), pattern.ask(shots[0])])
    parts = [*icl.encode_demonstrations(pattern, shots, text), *queries.prompts[0]]
    assert parts == text.tokenizer(whole).input_ids


def test_what_begins_a_sequence_is_as_the_tokenizer_writes_it(text):
    for words in ("Question", " Yes", "\n\nNo", ""):
        assert [*text.leading, *text.begin(words)] == text.tokenizer(words).input_ids
        assert text.decode(text.encode(words)) == words
