"""Windows, passages and batches."""

from __future__ import annotations

import itertools

import pytest

from fastft.config import Config, DataConfig
from fastft.data.sequences import Sequence, batches, make_windows, passages
from fastft.errors import DataError
from fastft.tasks import Document

WORDS = " ".join(f"w{i}" for i in range(100))


def encode(text: str) -> list[int]:
    return [int(word[1:]) if word.startswith("w") else 999 for word in text.split()]


def decode(ids: list[int]) -> str:
    return " ".join(f"w{i}" for i in ids)


def windows(**window):
    config = DataConfig(window=window)
    return make_windows(Document("d", "D", WORDS), config, encode, decode, leading=[7], positions=None, reserve=0)


def test_windows_cover_the_document_and_overlap():
    found = windows(tokens=40, overlap=10)
    assert len(found) > 1
    assert all(len(w.token_ids) <= 40 and w.token_ids[0] == 7 for w in found)
    bodies = [encode(w.text) for w in found]
    assert {t for body in bodies for t in body} == set(range(100))
    for left, right in itertools.pairwise(bodies):
        assert left[-10:] == right[:10]


def test_one_window_where_it_fits():
    (window,) = windows()
    assert window.token_ids == (7, *range(100))


def test_a_long_document_is_refused_where_windows_are_off():
    with pytest.raises(DataError, match="enabled=true"):
        windows(tokens=40, enabled=False)
    with pytest.raises(DataError, match=r"overlap=64; raise data\.window\.tokens=40"):
        windows(tokens=40)
    with pytest.raises(DataError, match=r"0 tokens are left .* positions 300 are kept for the longest query"):
        document = Document("d", "D", WORDS)
        make_windows(document, DataConfig(), encode, decode, leading=[], positions=250, reserve=300)
    with pytest.raises(DataError, match="holds 60"):
        config = DataConfig(window={"enabled": False})
        document = Document("d", "D", WORDS)
        make_windows(document, config, encode, decode, leading=[], positions=300, reserve=240)


def cut(window, **how):
    data = {"query_pattern": "w300 {question} w301", "answer_pattern": " {answer}", "answer_end": " w302"}
    config = Config(output_dir="unused", queries={"passages": how}, data=data)
    return passages(window, 3, config, encode, decode)


def test_passages_reach_every_token():
    (window,) = windows()
    found = cut(window, tokens=20, prompt_tokens=8, stride=6)
    assert {t for s in found for t in s.completion} >= set(range(8, 100))
    assert all(s.window == 3 and len(s.token_ids) <= 20 for s in found)
    assert cut(window, stride=0) == []


def test_passages_in_the_query_pattern_hold_the_same_tokens():
    (window,) = windows()
    how = {"tokens": 20, "prompt_tokens": 8, "stride": 6}
    plain, framed, both = (cut(window, **how, pattern=pattern) for pattern in ("text", "query", "both"))
    for s, f in zip(plain, framed, strict=True):
        assert f.prompt == (300, *s.prompt, 301)
        assert f.completion == (*s.completion, 302)
    assert both == [(plain, framed)[i % 2][i] for i in range(len(plain))]


def test_target_positions():
    sequence = Sequence(0, "passage", (1, 2, 3), (4, 5))
    assert list(sequence.target_positions("all")) == [0, 1, 2, 3, 4]
    assert list(sequence.target_positions("completion")) == [2, 3, 4]


@pytest.mark.parametrize(("world_size", "micro_batches"), [(1, 1), (2, 1), (3, 2), (8, 1)])
def test_a_step_holds_the_same_examples_for_any_number_of_ranks(world_size, micro_batches):
    counts = list(range(1, 12))

    def plan(rank, size, micro):
        options = {"steps": 9, "batch_size": 5, "seed": 3}
        return list(batches(counts, **options, micro_batches=micro, rank=rank, world_size=size))

    alone = plan(0, 1, 1)
    together = [plan(rank, world_size, micro_batches) for rank in range(world_size)]
    for step, (only,) in enumerate(alone):
        dealt = sorted(i for rank in together for batch in rank[step] for i in batch.examples)
        assert dealt == sorted(only.examples)
        assert {b.total_targets for rank in together for b in rank[step]} == {sum(counts[i] for i in dealt)}
    seen = [i for (batch,) in alone for i in batch.examples]
    assert sorted(seen[:11]) == list(range(11))
