"""What a forward and backward keep in memory: the model's own code, run on tensors that have shapes and no data.

Nothing is estimated by formula here: modules, autograd and fastft's ops do what they do in a run, under
`FakeTensorMode`, and every tensor's storage is counted from its creation to its end. Two layers and three are traced;
each further layer adds what the third added.
"""

from __future__ import annotations

import functools
import weakref
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import ClassVar, TypeVar

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import PretrainedConfig

from fastft.config import PeftConfig
from fastft.distributed import Ranks
from fastft.models.attention import PackedSequences, Prefix
from fastft.models.causal import PackedCausalLM
from fastft.models.recompute import checkpoint_activations
from fastft.models.tiled_mlp import tile_mlps
from fastft.models.ulysses import Exchange, SharedPrefix
from fastft.ops import linear_cross_entropy, linear_log_softmax_kl
from fastft.ops._common import chunk_size
from fastft.plan import architecture

T = TypeVar("T")
ACTIVATIONS, LIVE, LOGITS = "activations", "live layer", "logits chunk"


@dataclass(frozen=True)
class Pass:
    """One forward over a pack, and its backward where something is trained.

    lengths: tokens of the sequences in the pack. targets: rows that go through the head. capture: the pack is a context
    whose keys and values are kept. loss: "kl" against the teacher's hidden states, "ce", or "none". checkpointing:
    train.activation_checkpointing. mlp_tile: model.mlp_tile. ranks: so many share its attention
    (model.sequence_parallel): the tokens of a context are dealt out to them, or each has a pack of these lengths.
    """

    lengths: tuple[int, ...]
    targets: int
    trains: bool = False
    capture: bool = False
    loss: str = "none"
    checkpointing: str | int = "none"
    mlp_tile: int | None = None
    ranks: int = 1


class Alike(Ranks):
    """The first of ranks that do the same and send each other tensors without data."""

    def gather(self, value: T) -> list[T]:
        return [value] * self.world_size

    def all_to_all(self, x: Tensor, sent: list[int], received: list[int]) -> Tensor:
        return x.new_empty(sum(received))


def _packed(job: Pass) -> PackedSequences:
    """What a rank has in the decoder."""
    ranks, lengths = Alike(0, job.ranks), list(job.lengths)
    if job.capture:
        shares = job.ranks > 1 and job.lengths[0] >= job.ranks
        prefix = SharedPrefix(lengths[0], ranks) if shares else Prefix()
        packed = PackedSequences([prefix.end - prefix.begin] if shares else lengths, capture=prefix)
        packed.exchange  # noqa: B018 (made where tensors have data)
        return packed
    packed = PackedSequences(lengths)
    if job.ranks > 1:
        whole = PackedSequences(lengths * job.ranks)
        packed.exchange = Exchange(ranks, [sum(lengths)] * job.ranks, whole)
    return packed


class Tracker(TorchDispatchMode):
    """Bytes of the storages that are alive, by the category that was set when they came, and the highest sum of them.

    known: tensors that were there before, which do not count.
    """

    def __init__(self, known: list[Tensor]):
        super().__init__()
        self.category = LIVE
        self.live: Counter[str] = Counter()
        self.peak: Counter[str] = Counter()
        self._known = {x.untyped_storage()._cdata for x in known}
        self._seen: set[int] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        workspace = WORKSPACES.get(func.name())
        if workspace:
            self._note(extra=workspace(args))
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, Tensor):
                self._add(x.untyped_storage())
        return out

    def _add(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self._known or key in self._seen:
            return
        self._seen.add(key)
        self.live[self.category] += storage.nbytes()
        weakref.finalize(storage, self._remove, key, self.category, storage.nbytes())
        self._note()

    def _remove(self, key: int, category: str, nbytes: int) -> None:
        self._seen.discard(key)
        self.live[category] -= nbytes

    def _note(self, extra: int = 0) -> None:
        now = self.live + Counter({LOGITS: extra})
        if now.total() > self.peak.total():
            self.peak = now


def _kl_workspace(args: tuple) -> int:
    """A chunk's logits of student and teacher, and their rows side by side (`ops.linear_log_softmax_kl._kernel`)."""
    student, _, weight, teacher_weight, *_, chunk_rows, _, _ = args
    size = min(chunk_size(len(student), 2 * len(weight) * weight.element_size(), chunk_rows), len(student))
    pair = 0 if teacher_weight is not None else student.shape[1]
    return 2 * size * (len(weight) + pair) * weight.element_size()


def _ce_workspace(args: tuple) -> int:
    hidden, weight = args[:2]
    size = min(chunk_size(len(hidden), len(weight) * weight.element_size(), 0), len(hidden))
    return size * len(weight) * weight.element_size()


# What ops allocate inside, where a trace does not look.
WORKSPACES = {
    "fastft::linear_log_softmax_kl": _kl_workspace,
    "fastft::linear_cross_entropy": _ce_workspace,
    "fastft::linear_topk_kl": _ce_workspace,
}


class Tracer:
    """Traces of passes through one model; each pass is traced once in a process."""

    _known: ClassVar[dict[tuple, dict[str, int]]] = {}

    def __init__(
        self,
        model_config: PretrainedConfig,
        peft: PeftConfig,
        dtype: str,
        num_labels: int | None,
        head: str = "linear",
    ):
        self.model_config, self.peft, self.dtype = model_config, peft, dtype
        self.num_labels, self.head = num_labels, head
        self.layers = model_config.get_text_config().num_hidden_layers
        self._key = (model_config.to_json_string(), peft.model_dump_json(), dtype, num_labels, head)

    def peak(self, job: Pass) -> dict[str, int]:
        """Bytes by category when their sum is highest, weights and their gradients left out."""
        key = (*self._key, job)
        if key not in self._known:
            self._known[key] = dict(self._trace(job))
        return self._known[key]

    def _trace(self, job: Pass) -> Counter[str]:
        if isinstance(job.checkpointing, int):  # some of the layers: what is kept lies in between, and both kinds live
            none, every = (Counter(self.peak(replace(job, checkpointing=what))) for what in ("none", "full"))
            share = min(1.0, job.checkpointing / self.layers)
            kept = int((1 - share) * none[ACTIVATIONS] + share * every[ACTIVATIONS])
            return Counter({**(none | every), ACTIVATIONS: kept})
        if self.layers <= 3:
            return self._run(job, self.layers)
        two, three = self._run(job, 2), self._run(job, 3)
        return Counter({name: two[name] + (three[name] - two[name]) * (self.layers - 2) for name in three})

    def _run(self, job: Pass, layers: int) -> Counter[str]:
        model = architecture.build(self.model_config, dtype=self.dtype, layers=layers)
        packed = _packed(job)
        with FakeTensorMode(allow_non_fake_inputs=True):
            model = model.to_empty(device="cpu")
            lm = PackedCausalLM(model)
            trained = architecture.inject(lm, self.peft, self.num_labels, self.head) if job.trains else {}
            for parameter in trained.values():  # DeepSpeed takes a gradient as soon as it is there
                parameter.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
            ids = torch.zeros(1, sum(packed.lengths), dtype=torch.long)
            tracker = Tracker([*model.parameters(), *model.buffers(), ids])
            if job.mlp_tile:
                tile_mlps(lm, job.mlp_tile)
            checkpoint_activations(lm, job.checkpointing)
            for layer in lm.layers:
                layer.forward = functools.partial(_layer_forward, layer.forward, tracker=tracker, job=job)
            with tracker, torch.set_grad_enabled(job.trains):
                loss = lm(ids, packed, functools.partial(_head, tracker=tracker, job=job))
                tracker.category = LIVE
                if job.trains:
                    loss.backward()
        return tracker.peak


def _layer_forward(forward: Callable, *args, tracker: Tracker, job: Pass, **kwargs):
    """A decoder layer; what it makes and what lives on is kept for backward. Recomputed, it is not kept."""
    tracker.category = ACTIVATIONS if job.trains else LIVE
    return forward(*args, **kwargs)


def _head(hidden: Tensor, weight: Tensor, *, tracker: Tracker, job: Pass) -> Tensor:
    tracker.category = LIVE
    rows = hidden[: job.targets]
    if job.loss == "kl":
        return linear_log_softmax_kl(rows, torch.empty_like(rows), weight, reduction="sum")
    if job.loss == "ce":
        labels = torch.zeros(len(rows), dtype=torch.long)
        return linear_cross_entropy(rows, weight, labels, reduction="sum" if job.trains else "none")
    return rows
