"""Prompts, log-likelihoods and predictions against lm-evaluation-harness, an independent implementation.

    pip install lm_eval
    FASTFT_DATA=... python benchmarks/compare_lm_eval.py --json docs/benchmarks/lm_eval.json

lm-evaluation-harness loads its own task definitions, writes its own prompts, cuts them into tokens and scores them with
transformers' model, each choice behind its whole prompt; only the rows and the demonstrations are given to it. fastft
asks the same rows with its patterns: choices branch off from their query, queries stand behind one copy of the
demonstrations. Compared are, in float32:

    prompts       every (context, continuation) pair, character by character
    log p         of each choice, summed over its tokens (`icl.choice_nll`): the largest difference
    normalised    log p among the choices (`icl.classify` with icl.score=sum): the largest difference
    predictions   the most likely choice
    accuracy      the harness's `acc`; and its `acc_norm`, which divides by characters, beside icl.score=mean, by tokens

CommonsenseQA is asked twice: as the harness does, by letters, and with the words of its choices, several tokens each,
which is how the harness defines ARC.
Exits with 1 where a prompt differs, a difference is above --tolerance, or a prediction differs that is no tie.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from dataclasses import asdict, dataclass
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import lm_eval
import torch
from datasets import Dataset
from lm_eval.api.model import LM
from lm_eval.api.task import ConfigurableTask
from lm_eval.evaluator import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from lm_eval.tasks._yaml_loader import load_yaml
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM

from fastft.config import Config
from fastft.distributed import Ranks
from fastft.methods import icl
from fastft.models import loading
from fastft.models.causal import PackedCausalLM
from fastft.models.text import Text
from fastft.tasks import CLASSIFICATION_TASKS, Example, Pattern, sample_demonstrations
from fastft.tasks.base import read_rows


@dataclass(frozen=True)
class Definition:
    """A task of fastft with one of its patterns, and the harness's definition of it."""

    task: str
    pattern: str
    file: str  # in lm_eval/tasks
    changes: dict[str, str]  # to the harness's definition


DEFINITIONS = [
    Definition("rte", "lm_eval", "glue/rte/default.yaml", {}),
    Definition("cola", "lm_eval", "glue/cola/default.yaml", {}),
    Definition("mnli", "lm_eval", "glue/mnli/default.yaml", {}),
    Definition("commonsense_qa", "letters", "commonsense_qa/default.yaml", {}),
    Definition(
        "commonsense_qa",
        "question",
        "commonsense_qa/default.yaml",
        {
            "doc_to_text": "Question: {{question}}\nAnswer:",
            "doc_to_choice": "{{choices.text}}",
            "doc_to_target": "{{choices.label.index(answerKey)}}",
        },
    ),
    Definition("qqp", "lm_eval", "glue/qqp/default.yaml", {}),
]


@dataclass(frozen=True)
class Sample:
    """Rows of a dataset, and the same as fastft's examples."""

    rows: list[dict[str, Any]]
    examples: list[Example]

    def take(self, places: list[int]) -> Sample:
        return Sample([self.rows[i] for i in places], [self.examples[i] for i in places])


def load(task: str, split: str) -> Sample:
    t = CLASSIFICATION_TASKS[task]
    pairs = [
        (row, t.read(row, place))
        for place, row in read_rows(None, t.folder, split, hub=t.hub, hub_split=t.hub_splits.get(split))
    ]
    return Sample([row for row, _ in pairs], [example for _, example in pairs])


def stripped(value: Any) -> Any:
    """A row whose strings have no blanks at their ends, as fastft reads them."""
    if isinstance(value, str):
        return value.strip()
    if isinstance(value, list):
        return [stripped(v) for v in value]
    return {key: stripped(v) for key, v in value.items()} if isinstance(value, dict) else value


@dataclass
class Scores:
    prompts: list[list[tuple[str, str]]]  # of each example: (context, continuation) of each choice
    log_likelihood: torch.Tensor  # float64 [N, C], -inf past an example's own choices
    accuracy: dict[str, float]  # by convention


def pad(rows: list[list[float]]) -> torch.Tensor:
    tensors = [torch.tensor(row, dtype=torch.float64) for row in rows]
    return pad_sequence(tensors, batch_first=True, padding_value=-torch.inf)


def harness(lm: LM, definition: Definition, shots: Sample, asked: Sample) -> Scores:
    config = load_yaml(Path(lm_eval.__file__).parent / "tasks" / definition.file, resolve_func=True)
    splits = {config["training_split"]: shots.rows, config["validation_split"]: asked.rows}
    # Without demonstrations the train split still has to be there.
    splits = {name: Dataset.from_list(stripped(rows or asked.rows)) for name, rows in splits.items()}
    config |= {
        "custom_dataset": lambda **_: splits,
        "fewshot_split": config["training_split"],
        "fewshot_config": {"sampler": "first_n"},
        "metric_list": [{"metric": name, "aggregation": "mean", "higher_is_better": True} for name in CONVENTIONS],
        **definition.changes,
    }
    found = simple_evaluate(
        model=lm,
        tasks=[ConfigurableTask(config=config)],
        num_fewshot=len(shots.rows),
        bootstrap_iters=0,
        task_manager=TaskManager(include_defaults=False),
        verbosity="ERROR",
    )
    samples = sorted(found["samples"][config["task"]], key=lambda sample: sample["doc_id"])
    results = found["results"][config["task"]]
    return Scores(
        [[tuple(pair) for pair in sample["arguments"]] for sample in samples],
        pad([[log_likelihood for log_likelihood, _ in sample["filtered_resps"]] for sample in samples]),
        {name: results[f"{name},none"] for name in CONVENTIONS},
    )


CONVENTIONS = {"acc": "sum", "acc_norm": "mean"}  # the harness's metric: what comes closest in icl.score


def write(pattern: Pattern, shots: list[Example], asked: list[Example]) -> list[list[tuple[str, str]]]:
    """Of each example that is asked, (context, continuation) of each choice."""
    front = "".join(pattern.demonstrate(shot) + pattern.separator for shot in shots)
    return [[(front + pattern.ask(example), words) for words in pattern.choices(example)] for example in asked]


def ours(
    lm: PackedCausalLM, text: Text, pattern: Pattern, shots: Sample, asked: Sample, batch: int
) -> tuple[Scores, torch.Tensor]:
    """Scores, and log p among the choices by icl.classify with icl.score=sum."""
    shared = icl.encode_demonstrations(pattern, shots.examples, text)
    prefix = lm.encode_prefix(shared) if shared else None
    queries = icl.encode_queries(pattern, asked.examples, text, behind_demonstrations=bool(shots.examples))
    questions = list(zip(queries.prompts, queries.choices, strict=True))
    rows: list[list[float]] = []
    for start in range(0, len(questions), batch):
        members = questions[start : start + batch]
        [(_, (nll, _))] = lm.each([icl.choice_job(lm, members, prefix)])
        rows += [(-own).tolist() for own in nll.split([len(choices) for _, choices in members])]
    gold = torch.tensor([e.label for e in asked.examples])
    accuracy, normalised = {}, {}
    for name, score in CONVENTIONS.items():
        predictions = icl.classify(lm, queries, Ranks(), prefix=prefix, batch_size=batch, score=score)
        accuracy[name] = (predictions.labels == gold).double().mean().item()
        normalised[name] = predictions.log_probs
    return Scores(write(pattern, shots.examples, asked.examples), pad(rows), accuracy), normalised["acc"]


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    task: str
    pattern: str
    shots: int
    examples: int
    stripped: int  # rows of which fastft's reader cuts blanks off; the harness is given them without
    different_prompts: int
    difference: float
    difference_normalised: float
    different_predictions: int
    margin: float  # largest gap of the harness's two best choices among those
    acc: float
    accuracy_sum: float
    acc_norm: float
    accuracy_mean: float

    def agrees(self, tolerance: float) -> bool:
        """Two scores that are each off by the tolerance may swap choices that are twice as far apart."""
        within = max(self.difference, self.difference_normalised) <= tolerance
        return within and not self.different_prompts and self.margin <= 2 * tolerance


def difference(a: torch.Tensor, b: torch.Tensor) -> float:
    return (a - b)[a.isfinite() | b.isfinite()].abs().max().item()


def compare(definition: Definition, theirs: Scores, own: Scores, normalised: torch.Tensor, **about: int) -> Row:
    expected = theirs.log_likelihood.argmax(-1)
    differs = own.log_likelihood.argmax(-1) != expected
    differs |= normalised.argmax(-1) != expected
    best = theirs.log_likelihood.topk(2).values
    return Row(
        definition.task,
        definition.pattern,
        **about,
        examples=len(expected),
        different_prompts=sum(a != b for a, b in zip(theirs.prompts, own.prompts, strict=True)),
        difference=difference(theirs.log_likelihood, own.log_likelihood),
        difference_normalised=difference(theirs.log_likelihood.log_softmax(-1), normalised),
        different_predictions=int(differs.sum()),
        margin=max((best[:, 0] - best[:, 1])[differs].tolist(), default=0.0),
        acc=theirs.accuracy["acc"],
        accuracy_sum=own.accuracy["acc"],
        acc_norm=theirs.accuracy["acc_norm"],
        accuracy_mean=own.accuracy["acc_norm"],
    )


def main() -> int:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--model", default="smollm2-135m", help="hub name, folder, or smollm2-135m")
    p.add_argument("--examples", type=int, default=64, help="of each validation split, drawn with the seed")
    p.add_argument("--shots", type=int, nargs="+", default=[0, 4])
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--batch", type=int, default=4, help="sequences per forward of the harness; 8 times that of ours")
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    p.add_argument(
        "--dtype", default="float32", choices=["float32", "float64"], help="float64 tells rounding from error"
    )
    p.add_argument("--tolerance", type=float, default=1e-4)
    p.add_argument("--json", type=Path)
    a = p.parse_args()

    path = loading.resolve(a.model, Config(output_dir="unused").cache_path)
    tokenizer, dtype = loading.load_tokenizer(path), getattr(torch, a.dtype)
    plain = AutoModelForCausalLM.from_pretrained(path, dtype=dtype).to(a.device).eval()
    reference = HFLM(pretrained=plain, tokenizer=tokenizer, batch_size=a.batch)
    lm = PackedCausalLM(loading.load_model(path, dtype="float32").to(a.device, dtype))
    text = Text(tokenizer)

    about = {
        "date": date.today().isoformat(),
        "versions": {name: version(name) for name in ("lm_eval", "torch", "transformers")},
        "settings": {name: str(v) if isinstance(v, Path) else v for name, v in vars(a).items() if name != "json"},
    }
    print(f"| task | pattern | shots | n | prompts | log p | normalised | predictions | {' | '.join(HEADINGS)} |")
    print("|" + " --- |" * (8 + len(HEADINGS)))
    rows = []
    for definition in DEFINITIONS:
        train, validation = load(definition.task, "train"), load(definition.task, "validation")
        places = random.Random(a.seed).sample(range(len(validation.rows)), min(a.examples, len(validation.rows)))
        asked = validation.take(places)
        pattern = CLASSIFICATION_TASKS[definition.task].patterns[definition.pattern]
        number = {id(example): i for i, example in enumerate(train.examples)}
        for num_shots in a.shots:
            drawn = sample_demonstrations(train.examples, num_shots, 0, balanced=False, seed=a.seed)
            shots = train.take([number[id(example)] for example in drawn])
            theirs = harness(reference, definition, shots, asked)
            own, normalised = ours(lm, text, pattern, shots, asked, 8 * a.batch)
            cut = sum(row != stripped(row) for row in asked.rows)
            rows.append(compare(definition, theirs, own, normalised, shots=num_shots, stripped=cut))
            show(rows[-1])
            if a.json:
                a.json.write_text(json.dumps(about | {"rows": [asdict(row) for row in rows]}, indent=1) + "\n")
    failed = [row for row in rows if not row.agrees(a.tolerance)]
    for row in failed:
        print(f"compare_lm_eval: {row.task}, {row.pattern}, {row.shots} shots: {row}", file=sys.stderr)
    return int(bool(failed))


HEADINGS = ("`acc`", "`sum`", "`acc_norm`", "`mean`")


def show(row: Row) -> None:
    accuracies = (row.acc, row.accuracy_sum, row.acc_norm, row.accuracy_mean)
    print(
        f"| {row.task} | {row.pattern} | {row.shots} | {row.examples} | {row.different_prompts} | {row.difference:.1e} "
        f"| {row.difference_normalised:.1e} | {row.different_predictions} | "
        + " | ".join(f"{100 * value:.1f} %" for value in accuracies)
        + " |",
        flush=True,
    )


if __name__ == "__main__":
    sys.exit(main())
