"""Sequence parallelism: two and three processes over gloo against one process that has everything, in float64."""

from __future__ import annotations

import functools
import socket
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from transformers import LlamaConfig, LlamaForCausalLM, OPTConfig, OPTForCausalLM
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from fastft.config import DistillConfig
from fastft.data.sequences import Sequence, Window
from fastft.distributed import Ranks
from fastft.errors import ModelError
from fastft.methods.distill import teach
from fastft.methods.evaluation import QuestionSet, evaluate
from fastft.models.attention import PackedSequences, implementation
from fastft.models.causal import PackedCausalLM
from fastft.models.generation import generate
from fastft.models.ulysses import SharedPrefix, check_heads, check_model, deal

LAYERS, HEAD, VOCABULARY = 2, 8, 97
CONTEXT = 23
# Query heads, key/value heads: with two and three ranks they come out even, or do not.
MODELS = {"opt": (4, 4), "llama-grouped": (12, 6), "llama-uneven": (9, 3)}
WAYS = ("kernel", "sdpa", "int8", "host", "layers")
RESULTS = ("teach", "evaluate", "generate")


def build(name: str) -> OPTForCausalLM | LlamaForCausalLM:
    """A model with sharp attention, so that a wrong key would show."""
    heads, kv_heads = MODELS[name]
    common = {"vocab_size": VOCABULARY, "hidden_size": heads * HEAD, "num_hidden_layers": LAYERS}
    common["num_attention_heads"] = heads
    torch.manual_seed(0)
    if name == "opt":
        config = OPTConfig(ffn_dim=32, word_embed_proj_dim=heads * HEAD, max_position_embeddings=96, **common)
        model = OPTForCausalLM(config)
    else:
        model = LlamaForCausalLM(LlamaConfig(intermediate_size=32, num_key_value_heads=kv_heads, **common))
    with torch.no_grad():
        for parameter, p in model.named_parameters():
            if "q_proj" in parameter or "k_proj" in parameter:
                p.mul_(20)
    for module in model.modules():
        if isinstance(module, LlamaRMSNorm):  # which computes in float32 whatever the model's dtype is
            module.forward = functools.partial(rms_norm, module)
    return model.double().eval()


def rms_norm(module, x):
    return module.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + module.variance_epsilon)


def language_model(name: str, way: str, shared_by: Ranks | None) -> PackedCausalLM:
    model = build(name)
    model.set_attn_implementation(implementation("sdpa" if way == "sdpa" else "auto"))
    lm = PackedCausalLM(model, placement=way if way in ("int8", "host") else "device", shared_by=shared_by)
    if way == "layers":
        lm.keep_layers_on_host(torch.device("cpu"), copies=True)
    return lm


class Written:
    """Stands in for a store's writer."""

    error = None

    def __init__(self):
        self.targets: dict[int, torch.Tensor] = {}

    def write(self, members, targets):
        parts = targets["hidden"].split([len(SEQUENCES[i].target_positions("all")) for i in members])
        self.targets |= dict(zip(members, parts, strict=True))


class Words:
    """Stands in for a tokenizer: a token is its number."""

    leading = (1,)

    def ends_line(self, ids: list[int]) -> bool:
        return ids[-1] % 7 == 0

    def decode(self, ids: list[int]) -> str:
        return " ".join(map(str, ids))


def ids(*lengths: int, seed: int) -> list[tuple[int, ...]]:
    generator = torch.Generator().manual_seed(seed)
    return [tuple(torch.randint(2, VOCABULARY, (n,), generator=generator).tolist()) for n in lengths]


# Two windows, of which the second is shorter than three ranks with a token each would like, and an odd number of
# ragged batches behind each: a rank is left without one of its own.
WINDOWS = [Window("d", "", w) for w in ids(CONTEXT, 4, seed=1)]
SEQUENCES = [
    *(Sequence(0, "passage", s[:2], s[2:]) for s in ids(5, 9, 3, 7, 12, seed=2)),
    *(Sequence(1, "passage", s[:1], s[1:]) for s in ids(4, 2, seed=3)),
]
PROMPTS = [list(p) for p in ids(3, 1, 6, 2, seed=4)]


@torch.no_grad()
def results(name: str, way: str, ranks: Ranks, *, shared: bool) -> dict:
    """What a rank computes: targets, scores with branches and answers, sampled continuations, bytes of a context."""
    lm = language_model(name, way, ranks if shared else None)
    writer = Written()
    prefix_bytes = teach(lm, WINDOWS, SEQUENCES, DistillConfig(), writer, ranks, batch_size=2, advance=lambda n: None)
    answers = [[list(a) for a in ids(3, 1, 2, seed=5 + i)] for i in range(3)]
    questions = QuestionSet("d", WINDOWS, PROMPTS[:3], answers, [("5 9 12",)] * 3, ["q"] * 3)
    scores = evaluate(lm, [questions], Words(), ranks, in_context=True, batch_size=2, max_new_tokens=5)[0]
    # Ragged prompts, of which each rank has its own; they end at different steps.
    own = PROMPTS[ranks.rank :: ranks.world_size] if shared else PROMPTS
    seeds = list(range(4))[ranks.rank :: ranks.world_size] if shared else list(range(4))
    prefix = lm.encode_prefix(WINDOWS[0].token_ids)
    written = generate(
        lm, own, stop=Words().ends_line, max_new_tokens=9, prefix=prefix, temperature=1.0, seeds=seeds, ranks=ranks
    )
    return {
        "teach": writer.targets,
        "evaluate": torch.tensor([scores.nll, scores.nll_first_window, scores.f1], dtype=torch.float64),
        "generate": dict(zip(seeds, written, strict=True)),
        "bytes": (prefix.nbytes, prefix_bytes),
    }


def work(rank: int, world_size: int, port: int, folder: Path) -> None:
    torch.set_num_threads(1)
    address = f"tcp://127.0.0.1:{port}"
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=world_size)
    ranks = Ranks(rank, world_size)
    found = {(name, way): results(name, way, ranks, shared=True) for name in MODELS for way in WAYS}
    torch.save(found, folder / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module", params=[2, 3])
def found(request, tmp_path_factory) -> list[dict]:
    """The results of every rank."""
    folder = tmp_path_factory.mktemp("ranks")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    mp.spawn(work, (request.param, port, folder), request.param)
    return [torch.load(folder / f"{rank}.pt") for rank in range(request.param)]


@functools.cache
def expected(name: str, way: str) -> dict:
    return results(name, way, Ranks(), shared=False)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", MODELS)
def test_results_are_those_of_one_process(found, name, way):
    whole, of_ranks = expected(name, way), [own[name, way] for own in found]
    targets = {i: x for own in of_ranks for i, x in own["teach"].items()}
    assert sorted(targets) == list(range(len(SEQUENCES)))
    assert sum(len(own["teach"]) for own in of_ranks) == len(SEQUENCES)  # each is counted once
    for i, x in targets.items():
        torch.testing.assert_close(x, whole["teach"][i], rtol=1e-10, atol=1e-10)
    for own in of_ranks:
        torch.testing.assert_close(own["evaluate"], whole["evaluate"], rtol=1e-10, atol=1e-10)
    written = {i: words for own in of_ranks for i, words in own["generate"].items()}
    assert written == whole["generate"]
    assert len({len(words) for words in written.values()}) > 1


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", MODELS)
def test_a_rank_keeps_the_keys_and_values_of_its_heads(found, name, way):
    kv_heads, width = MODELS[name][1], HEAD + 4 if way == "int8" else 8 * HEAD
    token_and_head = 2 * LAYERS * width
    for own, heads in zip(found, deal(kv_heads, len(found)), strict=True):
        kept, largest = own[name, way]["bytes"]
        assert kept == token_and_head * CONTEXT * heads
        assert largest == (kept if way != "layers" else kept // LAYERS)
    assert expected(name, way)["bytes"][0] == token_and_head * CONTEXT * kv_heads


def test_heads_are_dealt_out():
    assert deal(3, 2) == [2, 1] and deal(8, 4) == [2, 2, 2, 2] and deal(5, 3) == [2, 2, 1]
    check_heads(3, 3)
    with pytest.raises(ModelError, match="has 3 for 4 processes; use up to 3 processes"):
        check_heads(3, 4)


def test_models_that_cannot_be_shared_are_refused():
    check_model(build("opt"), 4)
    with pytest.raises(ModelError, match="has 3 for 4 processes"):
        check_model(build("llama-uneven"), 4)
    shape = {"vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1}
    shape |= {"num_attention_heads": 4, "max_position_embeddings": 64}
    for rope in ({"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0}, {"rope_type": "dynamic"}):
        rope |= {"factor": 2.0, "original_max_position_embeddings": 32}
        model = LlamaForCausalLM(LlamaConfig(rope_parameters={"rope_theta": 1e4, **rope}, **shape))
        if rope["rope_type"] == "llama3":
            check_model(model, 2)
        else:
            with pytest.raises(ModelError, match="rope_type=dynamic\\) follow from the largest position in a pass"):
                check_model(model, 2)


def test_stretches_of_a_context_cover_it():
    stretches = [(p.begin, p.end) for p in (SharedPrefix(8, Ranks(rank, 3)) for rank in range(3))]
    assert stretches == [(0, 3), (3, 6), (6, 8)]
    with pytest.raises(ValueError, match="length is 2, expected a token or more for each of 3 ranks"):
        SharedPrefix(2, Ranks(0, 3))


def test_a_context_of_fewer_tokens_than_ranks_is_each_ranks_own():
    lm = PackedCausalLM(build("opt"), shared_by=Ranks(0, 3))
    job, prefix = lm.context((5, 6))
    assert not isinstance(prefix, SharedPrefix) and job.packed.exchange is None and job.input_ids.shape == (1, 2)


def test_a_pack_is_behind_one_context_and_takes_no_gradient():
    prefix = SharedPrefix(6, Ranks(0, 1))
    with pytest.raises(ValueError, match="a pack has 2 prefixes, expected all of it behind this one"):
        PackedSequences([2, 3], prefixes=[(prefix, 1), (SharedPrefix(6, Ranks(0, 1)), 1)]).exchange  # noqa: B018
    assert not PackedSequences([6], capture=prefix).takes_gradient
