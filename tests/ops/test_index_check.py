"""Ids outside of a vocabulary: what the kernels write down, and when Python raises it."""

import pytest
import torch

from fastft.ops import index_check, linear_cross_entropy, linear_topk_kl, raise_deferred_errors

CUDA = torch.device("cuda:0")


def empty_record():
    return torch.zeros(len(index_check.RECORD_FIELDS), dtype=torch.int64)


def written(index, vocab, ignore=0, record=None):
    """The record's fields without its state, or None where it is empty."""
    record = empty_record() if record is None else record
    torch.ops.fastft.index_check(index, vocab, ignore, 1, record)
    state, *fields = record.tolist()
    assert state in (0, index_check.WRITTEN)
    return tuple(fields) if state else None


@pytest.mark.parametrize("k", [None, 1, 3])
@pytest.mark.parametrize("bad", [-1, 9, 2**40, -(2**63)])
def test_the_first_bad_id_is_found_wherever_it_is(bad, k):
    shape = (5,) if k is None else (5, k)
    ids = torch.randint(0, 9, shape)
    assert written(ids, 9) is None
    for at in range(ids.numel()):
        wrong = ids.clone()
        wrong.view(-1)[at:] = bad
        assert written(wrong, 9) == (1, at // (k or 1), bad, 9, 0)


def test_an_ignored_id_is_allowed_and_nothing_beside_it():
    ids = torch.tensor([3, -100, 8])
    assert written(ids, 9, ignore=-100) is None
    assert written(ids, 9, ignore=-1) == (1, 1, -100, 9, -1)


def test_a_written_record_stays_as_it_is():
    record = empty_record()
    first = written(torch.tensor([0, 7]), 7, record=record)
    assert written(torch.tensor([9]), 7, record=record) == first == (1, 1, 7, 7, 0)


@pytest.mark.parametrize("shape", [(0,), (0, 3), (3, 0)])
def test_no_ids(shape):
    assert written(torch.empty(shape, dtype=torch.int64), 1) is None


def test_opcheck():
    torch.library.opcheck(torch.ops.fastft.index_check.default, (torch.tensor([[0, 9]]), 9, 0, 0, empty_record()))


@pytest.mark.parametrize(
    ("index", "record", "message"),
    [
        (torch.zeros(3, dtype=torch.int32), empty_record(), "index must be"),
        (torch.zeros(2, 2, 2, dtype=torch.int64), empty_record(), "index must be"),
        (torch.zeros(3, dtype=torch.int64), torch.zeros(2, dtype=torch.int64), "record must be"),
    ],
)
def test_errors(index, record, message):
    with pytest.raises(RuntimeError, match=f"index_check: {message}"):
        torch.ops.fastft.index_check(index, 9, 0, 0, record)


def test_what_a_device_has_written_is_raised_once(monkeypatch):
    """A CUDA device's record, written here by the CPU's kernel: host and record have one protocol."""
    record = empty_record()
    monkeypatch.setattr(index_check, "_records", {CUDA: record})
    raise_deferred_errors(synchronize=False)
    torch.ops.fastft.index_check(torch.tensor([4, 2, 9]), 9, -100, 0, record)
    message = (
        r"linear_cross_entropy: labels contains 9 in row 2, expected 0 <= id < 9 or ignore_index=-100 "
        r"\(found by this call or an earlier one on cuda:0\)"
    )
    with pytest.raises(ValueError, match=message):
        raise_deferred_errors(synchronize=False)
    raise_deferred_errors(synchronize=False)
    assert record.tolist() == [0] * len(index_check.RECORD_FIELDS)


def test_a_record_that_is_being_written_is_not_read(monkeypatch):
    record = empty_record()
    record[0] = 1
    monkeypatch.setattr(index_check, "_records", {CUDA: record})
    raise_deferred_errors(synchronize=False)
    assert record[0] == 1


# On a GPU ----------------------------------------------------------------------------------------------


@pytest.fixture
def cuda(device):
    if device.type == "cpu":
        pytest.skip("on the CPU the call itself raises")
    yield device
    for record in index_check._records.values():
        record.zero_()


def bad_labels(device):
    labels = torch.tensor([0, 9, -1, 8], device=device)
    return torch.randn(4, 8, device=device), torch.randn(9, 8, device=device), labels


def test_a_later_call_raises(cuda):
    hidden, weight, labels = bad_labels(cuda)
    linear_cross_entropy(hidden, weight, labels, reduction="none")
    torch.cuda.synchronize()
    with pytest.raises(ValueError, match=r"linear_cross_entropy: labels contains (9 in row 1|-1 in row 2), .* cuda:0"):
        linear_topk_kl(hidden, weight, labels.new_zeros(4, 1), hidden.new_zeros(4, 1))
    linear_topk_kl(hidden, weight, labels.new_zeros(4, 1), hidden.new_zeros(4, 1))
    raise_deferred_errors()


@pytest.mark.parametrize("tail", [True, False])
def test_ids_of_every_path_are_looked_at(cuda, tail):
    """Also where the listed rows of the head are gathered, and no kernel sees the ids."""
    hidden, weight = torch.randn(4, 8, device=cuda), torch.randn(2003, 8, device=cuda)
    ids = torch.tensor([[1, 2], [3, 4], [5, 2003], [6, 7]], device=cuda)
    linear_topk_kl(hidden, weight, ids, torch.zeros(4, 2, device=cuda), tail=tail)
    with pytest.raises(ValueError, match="linear_topk_kl: topk_ids contains 2003 in row 2, expected 0 <= id < 2003 "):
        raise_deferred_errors()


def test_a_captured_graph_reports_what_its_replay_finds(cuda):
    hidden, weight, labels = bad_labels(cuda)
    good = labels.clamp(0, 8)
    ids = good.clone()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        linear_cross_entropy(hidden, weight, ids)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = linear_cross_entropy(hidden, weight, ids)
    graph.replay()
    raise_deferred_errors()
    assert loss.isfinite()
    ids.copy_(labels)
    graph.replay()
    with pytest.raises(ValueError, match="linear_cross_entropy: labels contains"):
        raise_deferred_errors()
    assert loss.isnan()


def test_nothing_waits_for_the_device(cuda):
    hidden, weight, labels = bad_labels(cuda)
    linear_cross_entropy(hidden, weight, labels.clamp(0, 8))
    torch.cuda.synchronize()
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        linear_cross_entropy(hidden, weight, labels)
    finally:
        torch.cuda.set_sync_debug_mode(before)
    with pytest.raises(ValueError, match="labels contains"):
        raise_deferred_errors()
