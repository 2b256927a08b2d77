"""Seconds of a run by part: operations over the device's rate, or bytes over its bandwidth where that takes longer.

With W weights of linears, a = 4 H D operations a layer for each pair of a query and a key that it sees, V h the head:

    forward of T tokens      2 W T + a * pairs        (causal: T^2 / 2 pairs, behind a context of C: T C more)
    backward, frozen base    2 W T + 2.5 a * pairs    (the gradient of the input; of the weights another 2 W' T)
    head and loss            three products of V h with each target row: student, teacher, gradient
    recompute                a forward of what train.activation_checkpointing names

A part takes at least the time of reading its weights once. A quantised weight is first written out in model.dtype and
read again, for each pass. What crosses the link to the host or to other ranks is a part of its own: nothing here
assumes that it overlaps, but for offloaded activations: of their copies there is what computing does not hide.
"""

from __future__ import annotations

from collections.abc import Iterable

from fastft.config import Config
from fastft.plan.architecture import ITEMSIZE, Counts
from fastft.plan.hardware import Device
from fastft.plan.memory import base_bytes, largest_share, offloaded_layers, optimizer_kind, paged_bytes, sharing_ranks
from fastft.plan.workload import Workload

STEP_PARTS = {
    "student_forward": "student, forward",
    "recompute": "recompute",
    "backward": "backward",
    "head_and_loss": "head and loss",
    "dequantise": "dequantise",
    "teacher": "teacher in the step",
    "optimizer": "optimizer",
    "link": "host link",
    "offloading": "activations over the link",
    "communication": "other ranks",
}


class Roofline:
    """Counts of operations and bytes of one rank, and their time on its device."""

    def __init__(self, config: Config, counts: Counts, workload: Workload, device: Device, ranks: int):
        self.config, self.counts, self.workload, self.device, self.ranks = config, counts, workload, device, ranks
        self.itemsize = ITEMSIZE[config.model.dtype]
        self.rate = device.flops(config.model.dtype)
        self.weights = sum(base_bytes(counts, config))
        self.sharing = sharing_ranks(config, ranks)

    # Operations.

    def attention_flops(self, pairs: float) -> float:
        """Products of scores and of values for so many (query, key) pairs, over all heads and layers."""
        return 4.0 * self.counts.query_width * self.counts.layers * pairs

    def linear_flops(self, tokens: float) -> float:
        return 2.0 * self.counts.linear * tokens

    def head_flops(self, rows: float) -> float:
        return 2.0 * self.counts.head * rows

    def forward_flops(self, lengths: Iterable[int], context: int = 0) -> float:
        """Of sequences behind a context that is there already, the head apart."""
        lengths = list(lengths)
        pairs = sum(n * n / 2 + n * context for n in lengths)
        return self.linear_flops(sum(lengths)) + self.attention_flops(pairs)

    # Seconds.

    def step(self) -> dict[str, float]:
        """An average optimizer step of one rank by part."""
        if not self.workload.sequences or self.config.method == "icl":
            return {}
        c, t = self.counts, self.config.train
        tokens, rows, squares = (x / self.ranks for x in self.workload.mean_step(self.config))
        pairs = squares / 2
        adapter = 2.0 * c.adapter * tokens
        forward = self.linear_flops(tokens) + self.attention_flops(pairs) + adapter
        backward = self.linear_flops(tokens) + 2.5 * self.attention_flops(pairs) + 2 * adapter
        backward += 2.0 * c.trained_linear * tokens
        online = self.config.method == "distill" and self.config.distill.teacher == "online"
        again, attention_again = self._recomputed(tokens / t.micro_batches)
        passes = 2 + again
        products = 3 if self.config.method == "distill" and self.config.distill.targets == "hidden" else 2
        found = {
            "student_forward": self._bound(forward, t.micro_batches),
            "recompute": self._seconds(
                again * (forward - self.attention_flops(pairs)) + attention_again * self.attention_flops(pairs),
                again * t.micro_batches * c.linear * self.itemsize,
            ),
            "backward": self._bound(backward, t.micro_batches),
            "head_and_loss": self._seconds(products * self.head_flops(rows), products * c.head * self.itemsize),
            "dequantise": self._dequantise(passes * t.micro_batches),
            "teacher": self._online_teacher() if online else 0.0,
            "optimizer": self._optimizer(),
            "link": self._link(passes * t.micro_batches),
            "communication": self._communication(passes * t.micro_batches),
        }
        computed = found["student_forward"], found["recompute"] + found["backward"]
        found["offloading"] = self._offloading(tokens, *computed)
        return {name: seconds for name, seconds in found.items() if seconds}

    def phases(self, step_s: float) -> dict[str, float]:
        """Seconds of a whole run: contexts and targets of the teacher, evaluations, all steps."""
        w, config = self.workload, self.config
        crossing = self._crossing()
        found = {}
        context = max(w.contexts, default=0)
        if w.contexts and (config.method != "distill" or config.distill.teacher == "stored" or w.asked):
            prefill = sum(self._bound(self._of_rank([n], 0, self.sharing), 1) for n in w.contexts)
            found["contexts"] = prefill + self._dequantise(len(w.contexts)) + self._exchange(sum(w.contexts))
        if config.method == "distill" and config.distill.teacher == "stored":
            forwards = -(-len(w.sequences) // config.evaluate.batch_size)
            flops, passes = self._of_rank(w.sequences, context, self.ranks), forwards / self.ranks
            seconds = self._bound(flops, passes) + self._dequantise(passes)
            found["teach"] = max(seconds, crossing) + self._exchange(sum(w.sequences))
        if config.method != "icl":
            found["train"] = step_s * config.train.steps
        if w.evaluated_tokens:
            linear = self.linear_flops(w.evaluated_tokens)
            pairs = self.attention_flops(w.evaluated_tokens * context)
            times = {"icl": (1, 1), "distill": (3, 1)}.get(config.method, (1, 0))  # evaluations, of them in context
            asked = (times[0] * linear / self.ranks + times[1] * pairs * self._share(self.ranks)) / self.rate
            found["evaluate"] = max(asked, times[0] * crossing) + times[1] * self._exchange(w.evaluated_tokens)
        return found

    def _share(self, ranks: int) -> float:
        """Of attention that is dealt out to ranks, what the one with the most of it does."""
        return largest_share(self.counts, ranks) if self.sharing > 1 else 1 / ranks

    def _of_rank(self, lengths: Iterable[int], context: int, ranks: int) -> float:
        """Of `forward_flops` what a rank does, where the tokens are dealt out to so many."""
        lengths = list(lengths)
        linear = self.linear_flops(sum(lengths))
        return linear / ranks + (self.forward_flops(lengths, context) - linear) * self._share(ranks)

    def _exchange(self, tokens: float) -> float:
        """Queries, keys, values and outputs of a rank's tokens on their way to the other ranks' heads and back."""
        if self.sharing == 1:
            return 0.0
        numbers = 2 * (self.counts.query_width + self.counts.kv_width) * self.counts.layers
        others = (self.ranks - 1) / self.ranks
        return others * tokens / self.ranks * numbers * self.itemsize / self.device.link

    def _recomputed(self, tokens: float) -> tuple[float, float]:
        """Of a forward's linears and of its products of scores and values, the shares that backward computes again.

        tokens: of a micro-batch. A tiled MLP is computed once more than its layer is.
        """
        c, what, tile = self.counts, self.config.train.activation_checkpointing, self.config.model.mlp_tile
        tiles = c.again_mlp if tile and tokens > tile else 0
        if what == "attention":
            return (tiles + c.again_attention) / c.linear, 1.0
        layers = {"none": 0.0, "full": 1.0}[what] if isinstance(what, str) else min(what, c.layers) / c.layers
        return (tiles + layers * c.again_layers) / c.linear, layers

    def _seconds(self, flops: float, nbytes: float) -> float:
        return max(flops / self.rate, nbytes / self.device.bandwidth)

    def _bound(self, flops: float, passes: float) -> float:
        """A forward or backward that reads all linears once for each of its passes."""
        return self._seconds(flops, passes * self.counts.linear * self.itemsize)

    def _dequantise(self, passes: float) -> float:
        """Read the codes, write the weights in model.dtype; the product's own read is in `_bound`."""
        kind, linear = self.config.model.quantization, self.counts.quantisable
        if kind == "none":
            return 0.0
        codes = linear * (1 if kind == "int8" else 0.5 + 1 / 64)
        return passes * (codes + linear * self.itemsize) / self.device.bandwidth

    def _online_teacher(self) -> float:
        w, size = self.workload, self.config.train.batch_size
        mean = self.forward_flops(w.sequences, max(w.contexts, default=0)) / len(w.sequences)
        return self._bound(size * mean / self.ranks, self.config.train.micro_batches)

    def _optimizer(self) -> float:
        """AdamW reads and writes master, m and v, reads the gradient and writes the parameter."""
        share = self.counts.trained / (self.ranks if self.config.deepspeed.zero_stage else 1)
        state = 2 * 2 if optimizer_kind(self.config).endswith("_8bit") else 2 * 8
        return share * (state + 2 * 4 + 2 * self.itemsize) / self.device.bandwidth

    def _link(self, passes: float) -> float:
        """Weights that live on the host cross once a pass, gradients and new parameters once a step, or paged state
        there and back.
        """
        d = self.config.deepspeed
        if self.device.is_cpu:
            return 0.0
        nbytes = passes * self.weights / self.ranks if d.offload_param != "none" else 0.0
        if d.offload_optimizer != "none":
            nbytes += 2 * self.counts.trained / self.ranks * self.itemsize
        share = self.counts.trained // (self.ranks if d.zero_stage else 1)
        nbytes += 2 * paged_bytes(self.config, self.counts, share)
        return nbytes / self.device.link

    def _offloading(self, tokens: float, forward: float, backward: float) -> float:
        """What is left of the copies to the host in forward, and back in backward, where these do not hide them."""
        if self.device.is_cpu:
            return 0.0
        nbytes = offloaded_layers(self.config, self.counts) * tokens * self.counts.hidden * self.itemsize
        return sum(max(0.0, nbytes / self.device.link - computed) for computed in (forward, backward))

    def _crossing(self) -> float:
        """Layers that live on the host cross once for a phase without training, while others compute."""
        if self.device.is_cpu or not self.config.has_host_layers:
            return 0.0
        return self.weights / self.device.link

    def _communication(self, passes: float) -> float:
        """ZeRO-3 receives what the other ranks hold of the weights for each pass; gradients are reduced once a step."""
        others = (self.ranks - 1) / self.ranks
        nbytes = 2 * others * self.counts.trained * self.itemsize
        if self.config.deepspeed.zero_stage == 3:
            nbytes += passes * others * self.weights
        return nbytes / self.device.link
