"""What a profile costs: a training step's time with and without it, in alternating rounds, and a range while it is off.

    python benchmarks/profile_overhead.py [--rounds 5] [--steps 3] [--memory false]

A LoRA student of SmolLM2-135M on packed sequences, cross entropy through the head. Prints medians over all steps of
each kind, and the time of one `phase` while nothing is recorded; a step opens about ten.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
import timeit
from pathlib import Path

import torch

from fastft import peft
from fastft.config import PeftConfig
from fastft.models.attention import PackedSequences
from fastft.models.causal import PackedCausalLM
from fastft.models.loading import load_model, resolve
from fastft.ops import linear_cross_entropy
from fastft.profiling import WARM_UP, Recording, phase


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--tokens", type=int, default=384, help="of a step, in sequences of 48")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=3, help="of a round with, and of one without")
    parser.add_argument("--memory", choices=["true", "false"], default="true")
    arguments = parser.parse_args()

    cache = Path("~/.cache/fastft").expanduser()
    lm = PackedCausalLM(load_model(resolve(arguments.model, cache), dtype=arguments.dtype))
    trained = peft.inject(lm.model, PeftConfig())
    optimizer = torch.optim.AdamW(trained.values(), lr=1e-5)
    lengths = [48] * (arguments.tokens // 48)
    ids = torch.randint(lm.head.weight.shape[0], (1, sum(lengths)), generator=torch.Generator().manual_seed(0))
    labels = ids[0].roll(-1)

    def step() -> tuple[float, float]:
        """Seconds of the clock, and of the processor, which other processes on the machine do not change."""
        begin = time.perf_counter(), time.process_time()
        with phase("forward"):
            loss = lm(ids, PackedSequences(lengths), lambda x, head: linear_cross_entropy(x, head, labels))
        with phase("backward"):
            loss.backward()
        with phase("optimizer"):
            optimizer.step()
            optimizer.zero_grad()
        return time.perf_counter() - begin[0], time.process_time() - begin[1]

    seconds: dict[str, list[tuple[float, float]]] = {"off": [], "on": []}
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(2):
            step()
        for _ in range(arguments.rounds):
            seconds["off"] += [step() for _ in range(arguments.steps)]
            recording = Recording(
                lm.model,
                lm.head,
                Path(folder) / "trace.json.gz",
                wait=0,
                steps=arguments.steps,
                memory=arguments.memory == "true",
                finished=lambda *_: None,
            )
            for i in range(WARM_UP + arguments.steps):
                with recording.step():
                    taken = step()
                if i >= WARM_UP:
                    seconds["on"].append(taken)
    for which, clock in enumerate(("clock", "processor")):
        off, on = (statistics.median(taken[which] for taken in seconds[name]) for name in ("off", "on"))
        print(f"{clock:<10} {1000 * off:8.1f} ms a step, recorded {1000 * on:8.1f} ms: {100 * (on / off - 1):+.1f} %")
    once = min(timeit.repeat("phase('x')", globals={"phase": phase}, number=10**5)) / 10**5
    print(f"phase, while nothing is recorded: {1e9 * once:.0f} ns")


if __name__ == "__main__":
    main()
