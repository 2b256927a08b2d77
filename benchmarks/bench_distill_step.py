"""One optimizer step of context distillation: fastft against transformers + PEFT.

python benchmarks/bench_distill_step.py --device cpu --json step.json
python benchmarks/bench_distill_step.py --hidden 2048 --layers 24 --heads 32 --ffn 8192 --context 1792 --query 256

An OPT of the given shape with random weights, LoRA on all its linear layers; every step has `--batch` queries, each
behind a context of `--context` tokens; KL over all query positions, gradient clipping, AdamW. All rows have the same
weights, and their loss and gradient norm are compared before anything is timed.

peft_eager          the plain form: teacher = the PEFT model with its adapter disabled on [context; query], student on
                    [query], full logits of both, softmaxes in float32, F.kl_div, torch.optim.AdamW
peft_query_logits   the same, with the teacher's logits of the query's positions alone (`logits_to_keep`)
fastft_online       the teacher computed in the step (`distill.teacher=online`), nothing kept between steps: the same
                    work as the plain form
fastft_first_epoch  steps of an epoch in which `--queries` queries share each context, the teach phase included: the
                    context is encoded once, its queries are taught, stored, and trained on
fastft              a step of every later epoch: targets from the store

The plain forms run the context for every query: that is what they do. fastft runs through its own trainer
(`engine.trainer.Trainer`, DeepSpeed with the given `--zero-stage`), as a run does.
"""

from __future__ import annotations

import functools
import os
import shutil
import sys
import tempfile
from contextlib import closing
from pathlib import Path

import torch
import torch.nn.functional as F
from transformers import OPTConfig, OPTForCausalLM

from fastft import peft
from fastft.config import Config
from fastft.data.sequences import Batch, Sequence, Window
from fastft.data.store import Layout, StoreWriter, TeacherStore
from fastft.methods import distill
from fastft.methods.online import OnlineTeacher
from fastft.models.attention import IMPLEMENTATION
from fastft.models.causal import PackedCausalLM

sys.path.insert(0, str(Path(__file__).resolve().parent))
import common

# Nothing is learned: the weights stay what they are, so that every step of every row is the same work.
LEARNING_RATE = 1e-12


class Problem:
    """Weights and tokens that all rows share, and their two models."""

    def __init__(self, args):
        self.args, self.dtype = args, common.DTYPES[args.dtype]
        self.device = torch.device(args.device)
        torch.manual_seed(0)
        self.contexts = torch.randint(4, args.vocab, (args.batch, args.context))
        # A student's sequence starts with a token of its own: position p predicts the query's token p.
        self.queries = torch.randint(4, args.vocab, (max(args.queries, args.batch), args.query))

    def model(self) -> OPTForCausalLM:
        a = self.args
        config = OPTConfig(
            vocab_size=a.vocab,
            hidden_size=a.hidden,
            word_embed_proj_dim=a.hidden,
            ffn_dim=a.ffn,
            num_hidden_layers=a.layers,
            num_attention_heads=a.heads,
            max_position_embeddings=a.context + a.query,
            dropout=0.0,
            use_cache=False,
        )
        torch.manual_seed(1)
        return OPTForCausalLM(config).to(self.device, self.dtype).eval().requires_grad_(False)

    def set_adapter(self, name: str, tensor: torch.Tensor) -> None:
        """The same values in both models: lora_B is not zero, or student and base would be one."""
        generator = torch.Generator().manual_seed(sum(name.encode()))
        values = torch.randn(tensor.shape, generator=generator) * (0.02 if name.endswith("lora_B") else 0.05)
        tensor.data.copy_(values.to(self.dtype))


def plain(problem: Problem, *, query_logits: bool):
    """transformers and PEFT as they come; a step on the first `batch` queries."""
    import peft as hf_peft

    a = problem.args
    lora = hf_peft.LoraConfig(r=a.rank, lora_alpha=2 * a.rank, target_modules="all-linear", task_type="CAUSAL_LM")
    model = hf_peft.get_peft_model(problem.model(), lora)
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    for name, parameter in trained.items():
        ours = name.removeprefix("base_model.model.").removesuffix(".default.weight")
        problem.set_adapter(ours, parameter)
    optimizer = torch.optim.AdamW(trained.values(), lr=LEARNING_RATE)
    queries = problem.queries[: a.batch].to(problem.device)
    whole = torch.cat([problem.contexts.to(problem.device), queries], 1)
    keep = {"logits_to_keep": a.query} if query_logits else {}

    def step() -> tuple[torch.Tensor, ...]:
        with torch.no_grad(), model.disable_adapter():
            teacher = model(whole, **keep).logits[:, -a.query :]
        model.train()
        student = model(queries).logits
        loss = F.kl_div(
            student.float().log_softmax(-1).flatten(0, 1),
            teacher.float().log_softmax(-1).flatten(0, 1),
            log_target=True,
            reduction="batchmean",
        )
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(trained.values(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach().cpu(), norm.cpu()

    return step


class Fastft:
    """The trainer of a run, with its store in a temporary folder."""

    def __init__(self, problem: Problem, folder: Path):
        # DeepSpeed decides at import what it runs on.
        os.environ.setdefault("DS_ACCELERATOR", problem.args.device)
        from fastft.engine.launch import start
        from fastft.engine.quiet import quiet
        from fastft.engine.trainer import Trainer

        quiet()
        a = problem.args
        self.problem, self.folder = problem, folder
        self.config = Config.model_validate(
            {
                "output_dir": str(folder),
                "model": {"dtype": a.dtype},
                "distill": {"context_cache_gib": 0.0},  # what the online teacher keeps
                "peft": {"kind": "lora", "r": a.rank, "lora_alpha": 2.0 * a.rank},
                "train": {"steps": 10**9, "batch_size": a.batch, "lr": LEARNING_RATE, "schedule": "constant"},
                "deepspeed": {"zero_stage": a.zero_stage},
            }
        )
        self.windows = [Window(str(i), "", tuple(ids)) for i, ids in enumerate(problem.contexts.tolist())]
        self.ranks = start(None)
        model = problem.model()
        model.set_attn_implementation(IMPLEMENTATION)
        lm = PackedCausalLM(model)
        trained = peft.inject(model, self.config.peft)
        for name, parameter in trained.items():
            problem.set_adapter(name, parameter)
        self.base = PackedCausalLM(self.base_model())
        self.trainer = Trainer(lm, trained, self.config, self.ranks)
        self.online_teacher = OnlineTeacher(self.trainer.lm, self.windows, self.config.distill)
        self.number = 0

    def base_model(self) -> OPTForCausalLM:
        model = self.problem.model()
        model.set_attn_implementation(IMPLEMENTATION)
        return model

    def sequences(self, window_of: list[int]) -> list[Sequence]:
        queries = self.problem.queries.tolist()
        return [Sequence(w, "passage", (q[0],), tuple(q[1:])) for w, q in zip(window_of, queries, strict=False)]

    def teach(self, sequences: list[Sequence], name: str) -> TeacherStore:
        config, folder = self.config, self.folder / name
        lengths = [len(s.target_positions(config.distill.loss_on)) for s in sequences]
        layout = Layout(name, distill.target_specs(config.distill, self.base), lengths)
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        with closing(StoreWriter(folder, layout)) as writer:
            distill.teach(
                self.base,
                self.windows,
                sequences,
                config.distill,
                writer,
                self.ranks,
                batch_size=config.evaluate.batch_size,
                advance=lambda count: None,
            )
        return TeacherStore.open(folder, layout)

    def step(self, sequences: list[Sequence], examples: list[int], loss_fn) -> tuple[torch.Tensor, ...]:
        targets = sum(len(sequences[i].target_positions(self.config.distill.loss_on)) for i in examples)
        self.number += 1
        result = self.trainer.step(self.number, [Batch(examples, targets)], loss_fn, False)
        return torch.tensor(result.loss), torch.tensor(result.grad_norm)

    def from_store(self, sequences: list[Sequence], store: TeacherStore):
        engine, config = self.trainer.engine, self.config.distill
        return lambda examples: distill.loss_fn(engine, sequences, examples, store, config, [])

    def stored(self):
        """Every query behind a context of its own, as in the plain form."""
        batch = self.problem.args.batch
        sequences = self.sequences(list(range(batch)))
        loss_fn = self.from_store(sequences, self.teach(sequences, "stored"))
        return lambda: self.step(sequences, list(range(batch)), loss_fn)

    def online(self):
        """The same, with nothing stored."""
        batch = self.problem.args.batch
        sequences = self.sequences(list(range(batch)))

        def loss_fn(examples: list[int]) -> torch.Tensor:
            return self.online_teacher.loss_fn(self.trainer.engine, [sequences[i] for i in examples], [])

        return lambda: self.step(sequences, list(range(batch)), loss_fn)

    def first_epoch(self):
        a = self.problem.args
        sequences = self.sequences([0] * a.queries)

        def epoch() -> tuple[torch.Tensor, ...]:
            loss_fn = self.from_store(sequences, self.teach(sequences, "epoch"))
            for first in range(0, a.queries, a.batch):
                result = self.step(sequences, list(range(first, min(first + a.batch, a.queries))), loss_fn)
            return result

        return epoch


def flops(args) -> float:
    """Products of a step from stored targets: linears forward and dgrad, LoRA, attention, and the head three times."""
    tokens = args.batch * args.query
    linears = args.layers * (4 * args.hidden**2 + 2 * args.hidden * args.ffn)
    lora = args.layers * args.rank * (4 * 2 * args.hidden + 2 * (args.hidden + args.ffn))
    attention = 3 * args.layers * 2 * args.hidden * args.query  # per token, forward and twice that backward
    head = 3 * args.hidden * args.vocab
    return 2.0 * tokens * (2 * linears + 3 * lora + attention + head)


def case(args, folder: Path):
    problem = Problem(args)
    ours = Fastft(problem, folder)
    return common.Case(
        name="distill_step",
        shape={k: getattr(args, k) for k in ("hidden", "layers", "context", "query", "batch", "rank", "queries")},
        implementations={
            "peft_eager": plain(problem, query_logits=False),
            "peft_query_logits": plain(problem, query_logits=True),
            "fastft_online": ours.online(),
            "fastft_first_epoch": ours.first_epoch(),
            "fastft": ours.stored(),
        },
        bytes=0.0,
        flops=flops(args),
        tolerance=dict.fromkeys(
            ("peft_query_logits", "fastft_online", "fastft"), 0.05 if args.dtype != "float32" else 1e-3
        ),
        not_peers=("fastft_first_epoch",),  # other queries behind one context: other losses
        units={"fastft_first_epoch": -(-args.queries // args.batch)},
    )


def main() -> int:
    p = common.parser(__doc__.splitlines()[0])
    for name, value in (("hidden", 768), ("layers", 12), ("heads", 12), ("ffn", 3072), ("vocab", 50272)):
        p.add_argument(f"--{name}", type=int, default=value)
    for name, value in (("context", 896), ("query", 64), ("batch", 4), ("rank", 16)):
        p.add_argument(f"--{name}", type=int, default=value)
    p.add_argument("--queries", type=int, default=16, help="queries per context in fastft_first_epoch")
    p.add_argument("--zero-stage", type=int, default=0, choices=range(4), help="0: one process has nothing to shard")
    args = p.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        return common.main(args, [functools.partial(case, args, Path(folder))])


if __name__ == "__main__":
    raise SystemExit(main())
