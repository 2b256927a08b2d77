"""Runs of pattern-based and vanilla fine-tuning, and of all methods side by side, started as a user starts them."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from fastft.cli import main
from fastft.config import validate
from fastft.engine.demonstrations import Demonstrations
from fastft.engine.labelled import Labelled
from fastft.errors import Interrupted, ModelError
from fastft.peft import load_trained
from tests.conftest import clean_environment, losses
from tests.engine.test_icl_run import figures, ok, write

METHODS = ("icl", "pbft", "ft", "distill")


@pytest.fixture
def labelled_config(tmp_path, tiny):
    write(tmp_path / "rte", "train", "sentence1", "sentence2", 20)
    write(tmp_path / "rte", "validation", "sentence1", "sentence2", 11)
    write(tmp_path / "hans", "validation", "premise", "hypothesis", 6, heuristic="overlap", subcase="swap")

    def make(method: str, kind: str = "llama", **sections) -> dict:
        raw = {
            "method": method,
            "output_dir": str(tmp_path / f"run-{method}"),
            "cache_dir": str(tmp_path / "cache"),
            "model": {"name_or_path": str(tiny(kind)), "dtype": "float32"},
            "data": {"task": "rte", "root": str(tmp_path), "ood": ["hans"]},
            "icl": {"num_shots": 4},
            "peft": {"kind": "lora", "r": 4},
            "train": {"steps": 6, "batch_size": 3, "lr": 1e-2, "warmup_steps": 1, "log_every": 1},
            "evaluate": {"batch_size": 4},
            "deepspeed": {"zero_stage": 0, "threads_per_rank": 1},
        }
        for section, values in sections.items():
            raw[section] = {**raw.get(section, {}), **values}
        if method == "icl":
            del raw["peft"], raw["train"]
        if method == "distill":
            raw["distill"] = {"examples": 8}
        return raw

    return make


def test_all_methods_say_the_same_things(labelled_config, launch):
    """One config shape; the same figures under the same names for each evaluated set, and the same kinds of costs."""
    summaries = {}
    for method in METHODS:
        raw = labelled_config(method)
        done = launch(raw)
        ok(done)
        summary, rows = figures(raw["output_dir"])
        for name, own in summary["sets"].items():
            asked = [row for row in rows if row["set"] == name]
            assert own["examples"] == len(asked)
            assert own["accuracy"] == sum(r["predicted"] == r["label"] for r in asked) / len(asked)
            assert own["nll"] == pytest.approx(-sum(r["log_probs"][r["label"]] for r in asked) / len(asked))
            assert own["non_label_fraction"] == pytest.approx(sum(not r["is_label"] for r in asked) / len(asked))
        assert summary["sets"]["hans"]["groups"]["heuristic"]["overlap"]["examples"] == 6
        assert "heuristic overlap" in (Path(raw["output_dir"]) / "report.html").read_text()
        summaries[method] = summary
    common = set.intersection(*map(set, summaries.values()))
    assert common == set(summaries["pbft"]) - {"steps", "loss", "resumed_from", "step_time_s", "plan"}
    for key in ("mcc", "macro_f1", "ece", "seconds", "peak_memory_bytes", "trained_parameters", "data_seed"):
        assert key in common
    for name in ("rte", "hans"):
        keys = [set(summary["sets"][name]) for summary in summaries.values()]
        assert all(own == keys[0] for own in keys)
    assert set(summaries["distill"]["sets_teacher"]) == set(summaries["distill"]["sets_no_context"]) == {"rte", "hans"}
    # The student's teacher is in-context learning; in-context learning alone pays for its demonstrations at each query.
    assert summaries["distill"]["sets_teacher"]["hans"]["nll"] == pytest.approx(summaries["icl"]["sets"]["hans"]["nll"])
    tokens = {method: summary["inference_tokens_per_query"] for method, summary in summaries.items()}
    assert tokens["icl"] > 2 * max(tokens["pbft"], tokens["ft"], tokens["distill"])
    assert summaries["icl"]["trained_parameters"] == 0
    assert summaries["ft"]["trained_parameters"] == summaries["pbft"]["trained_parameters"] + 2 * 32


def test_all_methods_draw_the_same_examples(labelled_config):
    """By task, data seed, num_shots and balanced; the model's seed does not matter."""

    def draw(method: str, **data):
        config = validate({**labelled_config(method, data=data), "seed": 5})
        source = (Labelled if method in ("pbft", "ft") else Demonstrations).load(config)
        return source.shots, source.asked

    expected = draw("icl")
    assert all(draw(method) == expected for method in METHODS)
    assert all(draw(method, seed=5) == expected for method in METHODS)
    others = [draw(method, seed=1) for method in METHODS]
    assert all(other == others[0] for other in others) and others[0][0] != expected[0]


def test_the_model_is_trained_from_its_own_seed(labelled_config, launch, tmp_path):
    found = []
    for seeds in ({"seed": 0}, {"seed": 1, "data": {"seed": 0}}, {"seed": 1, "data": {"seed": 1}}):
        raw = labelled_config("ft", data=seeds.get("data", {}))
        raw |= {"seed": seeds["seed"], "output_dir": str(tmp_path / f"run-{len(found)}")}
        ok(launch(raw))
        found.append((losses(Path(raw["output_dir"])), figures(raw["output_dir"])[0]))
    assert found[0][0] != found[1][0] != found[2][0]
    assert [(s["seed"], s["data_seed"]) for _, s in found] == [(0, 0), (1, 0), (1, 1)]


@pytest.mark.parametrize(
    ("method", "sections"),
    [
        ("pbft", {}),
        ("pbft", {"pbft": {"loss_over": "labels"}}),
        ("pbft", {"data": {"verbalizer": ["Tessa Bray", "nine"]}, "pbft": {"loss_over": "labels"}}),
        ("pbft", {"data": {"verbalizer": ["built by anchors", "nine"]}, "icl": {"score": "first"}}),
        ("ft", {}),
        ("ft", {"ft": {"head": "mlp"}}),
    ],
    ids=["vocabulary", "labels", "labels of several tokens", "first tokens", "head", "mlp head"],
)
def test_it_learns(labelled_config, launch, method, sections):
    raw = labelled_config(method, **sections, train={"steps": 40, "batch_size": 4, "eval_every": 20})
    done = launch(raw)
    ok(done)
    folder = Path(raw["output_dir"])
    assert "4 labelled examples of rte; 4 labelled sequences" in done.stdout
    found = losses(folder)
    assert sum(found[-4:]) < 0.7 * sum(found[:4])
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert sum("evaluated_accuracy" in row for row in rows) == 1
    assert not (Path(raw["cache_dir"]) / "teacher").exists()


LLMFT = {
    "activation": "relu",
    "adapter_biases": True,
    "trained_scale": True,
    "alpha_pattern": {"q_proj": 8.0},
    "target_modules": ["q_proj", "v_proj"],
    "train_embeddings": True,
}
CASES = [
    ("pbft", "llama", {}),
    ("pbft", "llama", {"peft": {"kind": "full"}, "data": {"verbalizer": ["Tessa Bray", "nine"]}}),
    (
        "pbft",
        "opt",
        {
            "peft": {"kind": "full"},
            "data": {"verbalizer": ["Tessa Bray", "nine"]},
            "pbft": {"loss_over": "labels"},
        },
    ),
    ("pbft", "opt", {"peft": {"kind": "bitfit"}, "pbft": {"loss_over": "labels"}}),
    ("ft", "llama", {}),
    ("ft", "llama", {"peft": {"kind": "full"}}),
    ("pbft", "opt", {"peft": LLMFT}),
    ("pbft", "opt", {"peft": {"kind": "bitfit", "train_embeddings": True}}),
    ("ft", "opt", {"peft": {"kind": "bitfit"}}),
    ("ft", "opt", {"peft": {"kind": "head"}}),
    ("ft", "opt", {"ft": {"head": "mlp"}, "peft": {"kind": "bitfit"}}),
    ("ft", "llama", {"ft": {"head": "mlp"}}),
]


@pytest.mark.parametrize(("method", "kind", "sections"), CASES)
def test_zero_stages_agree(labelled_config, launch, tmp_path, method, kind, sections):
    """Parameters, losses and log-probabilities on one process: ZeRO-0 to 3, the last with parameters on the host."""
    reference = None
    for stage, offload in ((0, "none"), (1, "none"), (2, "none"), (3, "cpu")):
        raw = labelled_config(method, kind, **sections, train={"steps": 4, "micro_batches": 2})
        raw["deepspeed"] |= {"zero_stage": stage, "offload_param": offload}
        raw["output_dir"] = str(tmp_path / f"run-{stage}-{offload}")
        ok(launch(raw))
        found = _numbers(raw["output_dir"])
        reference = reference if reference is not None else found
        torch.testing.assert_close(found, reference, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(("method", "kind", "sections"), [CASES[0], CASES[2], CASES[5], CASES[6], CASES[10]])
def test_two_processes_agree_with_one(labelled_config, launch, tmp_path, method, kind, sections):
    found = []
    for processes, stage in ((1, 0), (2, 3)):
        raw = labelled_config(method, kind, **sections, train={"steps": 4, "batch_size": 3})
        raw["deepspeed"] |= {"zero_stage": stage}
        raw["output_dir"] = str(tmp_path / f"run-{processes}")
        ok(launch(raw, processes=processes))
        found.append(_numbers(raw["output_dir"]))
    torch.testing.assert_close(found[0], found[1], rtol=1e-3, atol=1e-5)


def _numbers(folder: str) -> torch.Tensor:
    rows = figures(folder)[1]
    return torch.tensor([*losses(Path(folder)), *(p for row in rows for p in row["log_probs"])])


@pytest.mark.parametrize(
    ("method", "kind", "sections"),
    [
        ("pbft", "llama", {}),
        ("pbft", "opt", {"peft": LLMFT}),
        ("ft", "llama", {}),
        ("ft", "opt", {"ft": {"head": "mlp"}, "train": {"schedule": "warmup_lr", "warmup_steps": 2}}),
    ],
)
def test_a_stopped_run_goes_on_with_the_same_numbers(
    labelled_config, launch, tmp_path, monkeypatch, method, kind, sections
):
    train = {"save_every": 3, "steps": 6, **sections.get("train", {})}
    raw = labelled_config(method, kind, **{**sections, "train": train})
    straight = {**raw, "output_dir": str(tmp_path / "straight")}
    ok(launch(straight))

    def stop(*_):
        raise Interrupted("stopped", 15)

    with monkeypatch.context() as patch:
        patch.setattr(Labelled, "evaluate", stop)
        assert launch(raw).returncode == 128 + 15
    checkpoints = Path(raw["output_dir"]) / "checkpoints"
    assert [p.name for p in checkpoints.iterdir()] == ["step_3"]
    ok(launch(raw, "resume=auto"))
    assert losses(Path(raw["output_dir"])) == losses(Path(straight["output_dir"]))
    assert figures(raw["output_dir"])[1] == figures(straight["output_dir"])[1]


@pytest.mark.parametrize(
    ("kind", "peft"), [("llama", "lora"), ("opt", "lora"), ("opt", "bitfit"), ("opt", "full"), ("llama", "head")]
)
def test_a_classifier_loads_without_fastft(labelled_config, launch, tmp_path, tiny, kind, peft):
    """transformers' sequence classifier (and PEFT) with the adapter's files gives the run's predictions."""
    raw = labelled_config("ft", kind, peft={"kind": peft}, deepspeed={"zero_stage": 3})
    ok(launch(raw))
    texts = [
        f"{row['sentence1'].strip()} {row['sentence2'].strip()} ?"
        for row in map(json.loads, (tmp_path / "rte" / "validation.jsonl").read_text().splitlines())
    ]
    (tmp_path / "texts.json").write_text(json.dumps(texts))
    base, adapter = str(tiny(kind)), f"{raw['output_dir']}/adapter"
    load = {
        "lora": f"PeftModel.from_pretrained(classifier({base!r}), {adapter!r})",
        "bitfit": f"with_tensors({base!r}, {adapter + '/biases.safetensors'!r})",
        "head": f"with_tensors({base!r}, {adapter + '/head.safetensors'!r})",
        "full": f"classifier({adapter!r})",
    }
    script = f"""
import json, sys, torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer
def classifier(path):
    return AutoModelForSequenceClassification.from_pretrained(path, num_labels=2, dtype=torch.float32)
def with_tensors(path, file):
    model, tensors = classifier(path), load_file(file)
    unknown = model.load_state_dict(tensors, strict=False).unexpected_keys
    assert not unknown and "score.weight" in tensors, unknown
    return model
tokenizer = AutoTokenizer.from_pretrained({base!r})
model = {load[peft]}.eval()
with torch.no_grad():
    found = [model(torch.tensor([tokenizer(text).input_ids])).logits[0].log_softmax(-1).tolist()
             for text in json.load(open({str(tmp_path / "texts.json")!r}))]
assert not any(m.split(".")[0] == "fastft" for m in sys.modules)
print(json.dumps(found))
"""
    done = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        env=clean_environment(),
        cwd=tmp_path,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    expected = [row["log_probs"] for row in figures(raw["output_dir"])[1] if row["set"] == "rte"]
    found = torch.tensor(json.loads(done.stdout.splitlines()[-1]))
    torch.testing.assert_close(found, torch.tensor(expected), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("method", ["pbft", "ft"])
@pytest.mark.parametrize("changes", [LLMFT, {**LLMFT, "target_modules": "all-linear"}, {"kind": "bitfit"}])
def test_what_peft_cannot_hold_loads_back(labelled_config, launch, tmp_path, tiny, tokenizer, method, changes):
    """A run's trained embeddings and adapters of another shape, in a fresh base, give the run's predictions."""
    raw = labelled_config(method, "opt", peft={**changes, "train_embeddings": True}, deepspeed={"zero_stage": 3})
    ok(launch(raw))
    kind = AutoModelForCausalLM if method == "pbft" else AutoModelForSequenceClassification
    base = kind.from_pretrained(tiny("opt"), dtype=torch.float32, num_labels=2).eval()
    model = load_trained(base, Path(raw["output_dir"]) / "adapter")
    words = [tokenizer(word, add_special_tokens=False).input_ids for word in (" Yes", " No")]
    for line, found in zip(
        (tmp_path / "rte" / "validation.jsonl").read_text().splitlines(), figures(raw["output_dir"])[1], strict=False
    ):
        row = json.loads(line)
        query = tokenizer(f"{row['sentence1'].strip()} {row['sentence2'].strip()} ?").input_ids
        if method == "ft":
            scores = model(torch.tensor([query])).logits[0]
        else:
            scores = torch.stack([score(model, query, word) for word in words])
        torch.testing.assert_close(
            scores.log_softmax(-1).double(), torch.tensor(found["log_probs"]).double(), rtol=1e-4, atol=1e-4
        )


class DenseReluOutput(nn.Module):
    """The default head of uds-lsv/llmft in plain PyTorch, its dropout apart."""

    def __init__(self, tensors: dict[str, torch.Tensor]):
        super().__init__()
        self.tensors = tensors

    def forward(self, hidden):
        dense = torch.relu(hidden @ self.tensors["score.dense.weight"].t() + self.tensors["score.dense.bias"])
        return dense @ self.tensors["score.output.weight"].t() + self.tensors["score.output.bias"]


@pytest.mark.parametrize(("kind", "peft"), [("llama", "lora"), ("opt", "bitfit"), ("llama", "full"), ("opt", "head")])
def test_an_mlp_head_loads_back(labelled_config, launch, tmp_path, tiny, tokenizer, capsys, kind, peft):
    """In transformers' sequence classifier it gives the run's predictions, and its tensors are a plain dense head."""
    raw = labelled_config("ft", kind, ft={"head": "mlp"}, peft={"kind": peft}, deepspeed={"zero_stage": 3})
    ok(launch(raw))
    adapter = Path(raw["output_dir"]) / "adapter"
    assert sorted(p.name for p in adapter.iterdir()) == ["trained.safetensors", "trained_config.json"]
    base = AutoModelForSequenceClassification.from_pretrained(tiny(kind), dtype=torch.float32).eval()
    model = load_trained(base, adapter)
    rows = map(json.loads, (tmp_path / "rte" / "validation.jsonl").read_text().splitlines())
    texts = [f"{row['sentence1'].strip()} {row['sentence2'].strip()} ?" for row in rows]
    expected = torch.tensor([row["log_probs"] for row in figures(raw["output_dir"])[1] if row["set"] == "rte"])
    for head in (model.score, DenseReluOutput(load_file(adapter / "trained.safetensors"))):
        model.score = head
        scores = torch.cat([model(torch.tensor([tokenizer(text).input_ids])).logits for text in texts])
        torch.testing.assert_close(scores.log_softmax(-1), expected, rtol=1e-4, atol=1e-4)
    with pytest.raises(ModelError, match=r"has no classification head `score`.*AutoModelForSequenceClassification"):
        load_trained(AutoModelForCausalLM.from_pretrained(tiny(kind)), adapter)
    capsys.readouterr()
    assert main(["export", raw["output_dir"]]) == 1
    assert "ft.head=mlp has no place in transformers' classifiers" in capsys.readouterr().err


def test_a_run_says_what_it_cuts(labelled_config, launch):
    """Of the examples that are trained on and of those that are asked; nothing where nothing is cut."""
    said, tokens = {}, {}
    for max_tokens in (8, 500):
        raw = {**labelled_config("ft", data={"max_tokens": max_tokens}), "overwrite": True}
        done = launch(raw)
        ok(done)
        said[max_tokens] = re.findall("(?m)^cut .*", done.stdout)
        tokens[max_tokens] = {s["inference_tokens_per_query"] for s in figures(raw["output_dir"])[0]["sets"].values()}
    everything = "4 of 4 labelled examples, 11 of 11 examples of rte, 6 of 6 examples of hans"
    assert said == {8: [f"cut        {everything} to data.max_tokens=8"], 500: []}
    assert tokens[8] == {8} and min(tokens[500]) > 8


class QueryAndValueAdapter(nn.Module):
    """A frozen linear layer with the adapter of uds-lsv/llmft beside it, in plain PyTorch."""

    def __init__(self, linear: nn.Linear, r: int, scale: float):
        super().__init__()
        self.linear, self.scale, self.factor = linear, scale, nn.Parameter(torch.ones(1))
        self.down, self.up = nn.Linear(linear.in_features, r), nn.Linear(r, linear.out_features)
        nn.init.zeros_(self.down.bias)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, x):
        return self.linear(x) + self.factor * self.scale * self.up(torch.relu(self.down(x)))


def test_llmft_is_a_plain_loop_over_adapters_and_embeddings(labelled_config, launch, tiny, tokenizer):
    """The losses of a run equal those of transformers' OPT with hand-written adapters, torch's AdamW and clipping."""
    train = {"steps": 5, "batch_size": 4, "lr": 1e-2, "warmup_steps": 0, "schedule": "constant"}
    raw = labelled_config("pbft", "opt", peft=LLMFT, train=train, icl={"sampling": "llmft"}, data={"ood": []})
    ok(launch(raw))

    model = AutoModelForCausalLM.from_pretrained(tiny("opt"), dtype=torch.float32).eval().requires_grad_(False)
    adapters = []
    initial = torch.Generator().manual_seed(0)
    for name, module in list(model.named_modules()):
        if name.endswith(("q_proj", "v_proj")):
            adapters.append(QueryAndValueAdapter(module, r=4, scale=(8.0 if name.endswith("q_proj") else 32.0) / 4))
            nn.init.kaiming_uniform_(adapters[-1].down.weight, a=5**0.5, generator=initial)
            model.set_submodule(name, adapters[-1])
    embeddings = [model.model.decoder.embed_tokens.weight, model.model.decoder.embed_positions.weight]
    trained = [p for a in adapters for p in (*a.down.parameters(), *a.up.parameters(), a.factor)] + embeddings
    for parameter in trained:
        parameter.requires_grad_(True)
    optimizer = torch.optim.AdamW(trained, lr=1e-2, weight_decay=0.0)
    rows = []
    for example in Labelled.load(validate(raw)).shots:
        query = tokenizer(f"{example.fields['text1']} {example.fields['text2']} ?").input_ids
        rows.append((query, tokenizer((" Yes", " No")[example.label], add_special_tokens=False).input_ids))
    expected = []
    for _ in range(5):
        parts = [nll_of(model, query, word) for query, word in rows]
        loss = torch.cat(parts).mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        expected.append(loss.item())
    assert losses(Path(raw["output_dir"])) == pytest.approx(expected, rel=1e-4)
    assert expected[-1] < 0.7 * expected[0]


def nll_of(model, query: list[int], word: list[int]) -> torch.Tensor:
    """-log p of each of the word's tokens behind the query."""
    logits = model(torch.tensor([query + word])).logits[0, len(query) - 1 : -1]
    return nn.functional.cross_entropy(logits, torch.tensor(word), reduction="none")


def score(model, query: list[int], word: list[int]) -> torch.Tensor:
    """Mean log p of the word's tokens behind the query."""
    return -nll_of(model, query, word).mean()


def test_load_biases_takes_the_head_along(labelled_config, launch, tiny):
    from fastft.peft.files import load_biases

    raw = labelled_config("ft", "llama", peft={"kind": "bitfit", "add_biases": True})
    ok(launch(raw))
    model = AutoModelForSequenceClassification.from_pretrained(tiny("llama"), num_labels=2, dtype=torch.float32)
    before = model.score.weight.detach().clone()
    load_biases(model, Path(raw["output_dir"]) / "adapter")
    assert not torch.equal(before, model.score.weight) and model.model.layers[0].mlp.up_proj.bias is not None


@pytest.mark.parametrize(
    ("method", "changes", "message"),
    [
        ("pbft", {"icl": {"num_shots": 0}}, "nothing to train on; use 1 or more"),
        ("pbft", {"peft": {"kind": "full", "activation": "relu"}}, "activation is for kind=lora, got kind=full"),
        ("ft", {"peft": {"kind": "head", "train_embeddings": True}}, "train_embeddings is for kind=lora or bitfit"),
        ("distill", {"peft": {"train_embeddings": True}}, "peft.train_embeddings=true would change the head"),
        ("pbft", {"icl": {"num_shots": 3}}, "cannot be balanced over 2 labels; use 2 or 4"),
        ("pbft", {"peft": {"kind": "head"}}, "peft.kind=head trains the classification head of method=ft"),
        ("ft", {"pbft": {"loss_over": "labels"}}, "method=ft with data.task=rte does not use pbft"),
        ("ft", {"icl": {"score": "sum"}}, "does not use icl.score"),
        ("pbft", {"ft": {"head": "mlp"}}, "method=pbft with data.task=rte does not use ft"),
        ("distill", {"data": {"max_tokens": 256}}, "does not use data.max_tokens"),
        ("pbft", {"distill": {"examples": 3}}, "method=pbft with data.task=rte does not use distill"),
        ("pbft", {"data": {"task": "narrativeqa"}}, "method=pbft needs a classification or summarization task"),
        (
            "pbft",
            {"data": {"verbalizer": ["Yes"]}},
            r"does not cover label 1 of rte, which is 'No' in .*expected 2 words",
        ),
        ("pbft", {"data": {"verbalizer": ["Yes", "No", "So"]}}, "rte has 2 labels; expected 2 words"),
        ("pbft", {"data": {"verbalizer": ["Yes", "Yes"]}}, "cannot be told apart: both are the same"),
        (
            "pbft",
            {"data": {"verbalizer": ["built by anchors", "built nine"]}, "icl": {"score": "first"}},
            r"icl.score=first sees .* of both; score them whole with icl.score=mean",
        ),
        ("pbft", {"data": {"split": "test"}}, "rte/test.jsonl:1: 'label' is -1, expected 0, 1; a split without labels"),
        ("ft", {"data": {"split": "other"}}, "missing 'label'; found 'sentence1', 'sentence2'; a split without labels"),
        ("ft", {"data": {"split": "odd"}}, "'label' is 2, expected 0, 1"),
        (
            "pbft",
            {"data": {"split": "long"}},
            r"the longest example of rte takes \d+ tokens with its answer, but the model has 512 positions; cut them",
        ),
    ],
)
def test_what_cannot_be_right_is_refused(labelled_config, launch, tmp_path, method, changes, message):
    pair = {"sentence1": "A goat.", "sentence2": "A mill."}
    rows = {"test": {**pair, "label": -1}, "other": pair, "odd": {**pair, "label": 2}}
    rows["long"] = {**pair, "sentence1": "goat " * 600, "label": 0}
    for split, row in rows.items():
        (tmp_path / "rte" / f"{split}.jsonl").write_text(json.dumps(row) + "\n")
    changes = {**changes, "data": {"ood": [], **changes.get("data", {})}}
    result = launch(labelled_config(method, **changes))
    assert result.returncode == 1 and "Traceback" not in result.stderr, result.stderr
    assert re.search(message, result.stderr), result.stderr


def test_a_head_needs_labels_of_the_task(labelled_config, launch, tmp_path):
    row = {"question": "Where?", "choices": {"label": list("ABCDE"), "text": list("vwxyz")}, "answerKey": "B"}
    (tmp_path / "commonsense_qa").mkdir()
    for split in ("train", "validation"):
        (tmp_path / "commonsense_qa" / f"{split}.jsonl").write_text(f"{json.dumps(row)}\n" * 3)
    task = {"data": {"task": "commonsense_qa", "ood": []}, "icl": {"num_shots": 2, "balanced": False}}
    refused = launch(labelled_config("ft", **task))
    assert refused.returncode == 1 and "use method=pbft, or data.pattern=letters" in refused.stderr
    ok(launch(labelled_config("pbft", **task)))
    task["data"]["pattern"] = "letters"
    ok(launch(labelled_config("ft", **task)))


@pytest.mark.parametrize("section", [{"kind": "lora", "r": 4}, {"kind": "bitfit"}, {"kind": "head"}])
def test_a_merged_export_is_the_classifier(labelled_config, launch, tmp_path, tiny, section):
    """method=ft: merged, also from a checkpoint, is transformers' sequence classifier."""
    raw = labelled_config("ft", "opt", peft=section, train={"steps": 4, "save_every": 2})
    ok(launch(raw))
    run, base = Path(raw["output_dir"]), str(tiny("opt"))
    for arguments in (["--out", "end"], ["--checkpoint", "step_2", "--out", "step_2"]):
        arguments[-1] = str(tmp_path / arguments[-1])
        assert main(["export", str(run), "--format", "merged", *arguments]) == 0
    classifier = AutoModelForSequenceClassification
    merged, early = (logits(classifier.from_pretrained(tmp_path / name)) for name in ("end", "step_2"))
    expected = classifier.from_pretrained(base, num_labels=2)
    if section["kind"] == "lora":
        expected = PeftModel.from_pretrained(expected, run / "adapter")
    else:
        (file,) = (run / "adapter").glob("*.safetensors")
        expected.load_state_dict(load_file(file), strict=False)
    torch.testing.assert_close(merged, logits(expected), rtol=1e-5, atol=1e-5)
    assert not torch.equal(merged, early)


def logits(model) -> torch.Tensor:
    model.config.pad_token_id = 1
    with torch.no_grad():
        return model.eval()(input_ids=torch.arange(3, 43).view(2, 20)).logits
