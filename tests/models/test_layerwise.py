"""Layer by layer over many packs: the same results as pack by pack, each weight copied once."""

from __future__ import annotations

import pytest
import torch

from fastft.errors import ModelError
from fastft.models.attention import PackedSequences
from fastft.models.causal import Job, PackedCausalLM
from fastft.models.generation import generate
from fastft.models.loading import load_model, prepare_model, quantized_files


def on_host(lm: PackedCausalLM) -> PackedCausalLM:
    """As on a GPU: every visit copies the layer's weights."""
    lm.keep_layers_on_host(torch.device("cpu"), copies=True)
    return lm


def stream(lm: PackedCausalLM):
    """Two contexts with two packs each, one of them with branches, and a pack without a context."""
    torch.manual_seed(0)
    for context in ((5, 9, 11, 40, 2), tuple(range(20, 29))):
        job, prefix = lm.context(context)
        yield job
        for lengths, branches in (([3, 4], None), ([2, 2], [[1, 2], []])):
            total = sum(lengths) + sum(map(sum, branches or []))
            ids = torch.randint(0, 400, (1, total))
            packed = PackedSequences(lengths, branches=branches, prefixes=[(prefix, 2)])
            yield Job(ids, packed, lambda hidden, weight: hidden @ weight.t(), (context, lengths))
    yield Job(torch.arange(7)[None], PackedSequences([4, 3]), None, "alone")


def results(lm: PackedCausalLM, **options) -> list:
    return [(job.item, found) for job, found in lm.each(stream(lm), **options) if job.item is not None]


@pytest.mark.parametrize("family", ["opt", "llama"])
def test_results_are_those_of_pack_by_pack(tiny, family):
    plain = results(PackedCausalLM(load_model(str(tiny(family)), dtype="float32")))
    lm = on_host(PackedCausalLM(load_model(str(tiny(family)), dtype="float32")))
    found = results(lm)
    assert [item for item, _ in found] == [item for item, _ in plain] and len(found) == 5
    for (_, ours), (_, theirs) in zip(found, plain, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)
    before = lm.host_layers.copied_bytes
    results(lm)
    assert lm.host_layers.copied_bytes - before == sum(p.nbytes for layer in lm.layers for p in layer.parameters())


def test_a_context_is_kept_for_one_layer_at_a_time(tiny):
    lm = on_host(PackedCausalLM(load_model(str(tiny("opt")), dtype="float32")))
    jobs = list(stream(lm))
    for _ in lm.each(iter(jobs)):
        pass
    prefix = jobs[0].packed.capture
    assert prefix.nbytes == 0 and prefix.peak_nbytes == 2 * 4 * 5 * 8 * 4
    kept = lm.encode_prefix((5, 9, 11))
    assert kept.nbytes == 2 * 2 * 4 * 3 * 8 * 4


def test_quantised_layers_visit_too_and_ordinary_passes_bring_them(tiny, tmp_path):
    def load():
        files = quantized_files(str(tiny("opt")), kind="nf4", dtype="float32", cache_dir=tmp_path)
        if not files.is_complete:
            files.make(files.lacking())
            files.finish()
        return PackedCausalLM(prepare_model(files.load(), "tiny", attention="auto", dropout=False))

    plain, lm = load(), on_host(load())
    home = [p.data.data_ptr() for layer in lm.layers for p in layer.parameters()]
    for (_, ours), (_, theirs) in zip(results(lm), results(plain), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)
    prompts = [[5, 6, 7], [8, 9]]
    written = [generate(m, prompts, stop=lambda ids: False, max_new_tokens=5) for m in (lm, plain)]
    assert written[0] == written[1]
    assert [p.data.data_ptr() for layer in lm.layers for p in layer.parameters()] == home
    lm.release_host_layers()
    assert generate(lm, prompts, stop=lambda ids: False, max_new_tokens=5) == written[0]
    assert all("forward" not in vars(layer) for layer in lm.layers)


def test_a_pass_that_fails_leaves_the_layers_at_home(tiny):
    lm = on_host(PackedCausalLM(load_model(str(tiny("opt")), dtype="float32")))
    home = [p.data.data_ptr() for layer in lm.layers for p in layer.parameters()]
    with pytest.raises(IndexError):
        list(lm.each([Job(torch.tensor([[10_000]]), PackedSequences([1]))]))
    broken, lm.layers[1].fc1.forward = lm.layers[1].fc1.forward, lambda x: x.nothing
    with pytest.raises(AttributeError):
        list(lm.each(stream(lm)))
    lm.layers[1].fc1.forward = broken
    assert [p.data.data_ptr() for layer in lm.layers for p in layer.parameters()] == home
    assert len(results(lm)) == 5


def test_a_model_that_does_not_name_its_layers_cannot_wait_on_the_host(tiny):
    lm = PackedCausalLM(load_model(str(tiny("opt")), dtype="float32"))
    lm.model._no_split_modules = None
    with pytest.raises(ModelError, match=r"does not name its decoder layers, .* use model\.layers=device"):
        lm.keep_layers_on_host(torch.device("cpu"))
