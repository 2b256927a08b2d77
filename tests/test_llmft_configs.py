"""configs/llmft against the settings of uds-lsv/llmft (Mosbach et al. 2023), written out here a second time."""

from __future__ import annotations

import pytest

from fastft.config import load_config
from fastft.tasks import select_pattern, select_tasks
from tests.conftest import ROOT

FOLDER = ROOT / "configs" / "llmft"
TASKS = {  # task, its set of another distribution, label words
    "rte": ("rte", "hans", ("Yes", "No")),
    "mnli": ("mnli_binary", "hans", ("Yes", "No")),
    "qqp": ("qqp", "paws_qqp", ("No", "Yes")),
    "cola": ("cola", "cola_ood", ("No", "Yes")),
}
# kind, examples, epochs, batch, share of the steps that is warm-up, learning rate
TRAINED = {
    "pbft": ("full", 16, 40, 16, 0.1, 1e-5),
    "ft": ("full", 16, 40, 16, 0.1, 1e-5),
    "lora": ("lora", 32, 80, 32, 0.25, 2e-4),
    "bitfit": ("bitfit", 128, 100, 32, 0.25, 1e-4),
}
HEAD_SIZES = {"125m": 64, "350m": 64, "1.3b": 64, "2.7b": 80, "6.7b": 128, "13b": 128, "30b": 128}
HEAD_SIZES = {f"facebook/opt-{name}": size for name, size in HEAD_SIZES.items()}
MODELS = list(HEAD_SIZES)


def test_there_is_one_for_each_task_and_method():
    assert {p.stem for p in FOLDER.iterdir()} == {f"{task}_{method}" for task in TASKS for method in ("icl", *TRAINED)}


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("method", ["icl", *TRAINED])
@pytest.mark.parametrize("name", TASKS)
def test_the_published_settings(name, method, model):
    c = load_config(FOLDER / f"{name}_{method}.yaml", [f"model.name_or_path={model}"])
    task, ood, words = TASKS[name]
    assert [t.name for t in select_tasks(c.data)] == [task, ood]
    pattern_name, pattern = select_pattern(c.data)
    assert (pattern_name, pattern.verbalizer) == ("llmft_minimal" if method == "icl" else "minimal", words)
    assert pattern.query.strip() == ("{text1} ?" if name == "cola" else "{text1} {text2} ?")
    assert pattern.query.endswith(" ") == (method == "icl") and c.icl.sampling == "llmft"
    assert (c.model.name_or_path, c.deepspeed.zero_stage, c.seed) == (model, 3, 0)
    assert c.output_dir == f"runs/llmft/{name}_{method}"
    if method == "icl":
        assert (c.method, c.icl.num_shots, c.icl.balanced, c.icl.calibrate) == ("icl", 16, True, False)
        assert c.data.max_tokens is None  # their in-context runs refuse what is longer than the window
        return
    kind, examples, epochs, batch, warmup, lr = TRAINED[method]
    own = "ft" if method == "ft" else "pbft"
    assert (c.method, c.peft.kind, c.icl.num_shots, c.icl.balanced) == (own, kind, examples, False)
    assert c.data.max_tokens == 256  # --max_seq_length
    assert c.train.batch_size == batch and c.train.steps == epochs * examples // batch
    assert c.train.warmup_steps == warmup * c.train.steps
    assert (c.train.lr, c.train.schedule, c.train.weight_decay) == (lr, "warmup_lr", 0.0)
    assert c.pbft.loss_over == "vocabulary" and c.model.dropout
    assert c.ft.head == ("mlp" if method == "ft" else "linear")
    if kind == "lora":
        assert (c.peft.r, c.peft.lora_alpha, c.peft.target_modules) == (8, 8.0, ["q_proj", "v_proj"])
        assert c.peft.lora_plus_ratio == 1.0
        assert (c.peft.activation, c.peft.adapter_biases, c.peft.trained_scale) == ("relu", True, True)
        assert c.peft.alpha_pattern == {"q_proj": 64.0}  # of OPT-125M to 1.3B
    assert c.peft.train_embeddings == (kind != "full")


@pytest.mark.parametrize(
    ("method", "shots", "settings"),
    [
        ("icl", {2, 16}, 10),
        ("pbft", {2, 16, 32, 64, 128}, 4),
        ("ft", {2, 16, 32, 64, 128}, 4),
        ("lora", {32}, 4),
        ("bitfit", {128}, 4),
    ],
)
def test_the_sweeps(monkeypatch, method, shots, settings):
    """Every model and ten draws of the examples; settings: tasks, of icl each with its patterns."""
    load_sweep = pytest.importorskip("fastft.sweep.grid").load_sweep
    monkeypatch.chdir(ROOT)
    runs = [run.config for run in load_sweep(f"configs/sweeps/llmft_{method}.yaml").runs]
    assert len(runs) == len(MODELS) * 10 * len(shots) * settings
    assert {c.model.name_or_path for c in runs} == set(MODELS)
    assert {c.data.seed for c in runs} == set(range(10)) and {c.seed for c in runs} == {0}
    assert {c.icl.num_shots for c in runs} == shots
    assert {(c.data.task, *c.data.ood) for c in runs} == {(task, ood) for task, ood, _ in TASKS.values()}
    if method != "icl":
        kind, _, epochs, _, warmup, lr = TRAINED[method]
        for c in runs:
            assert c.train.batch_size == min(c.icl.num_shots, 32)
            assert c.train.steps == epochs * c.icl.num_shots // c.train.batch_size
            assert c.train.warmup_steps == warmup * c.train.steps
            assert (c.peft.kind, c.train.lr, c.train.schedule, c.data.max_tokens) == (kind, lr, "warmup_lr", 256)
            if kind == "lora":
                expected = 8 * HEAD_SIZES[c.model.name_or_path] ** 0.5
                assert c.peft.alpha_pattern["q_proj"] == pytest.approx(expected, abs=1e-4)
