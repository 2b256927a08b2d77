"""The schema: every problem at once, the nearest key, and a stored config that loads back."""

from __future__ import annotations

import pytest
import yaml

from fastft.config import describe, load_config, validate
from fastft.errors import ConfigError
from tests.conftest import ROOT


def test_all_problems_are_reported_together(tmp_path):
    path = tmp_path / "bad.yaml"
    path.write_text("metod: distill\ntrain: {steps: 0, lr: fast}\npeft: {kind: lore, lr: 3}\n")
    with pytest.raises(ConfigError) as error:
        load_config(path, ["train.warmup_steps=-1"])
    text = str(error.value)
    for part in (
        "output_dir: missing",
        "metod: unknown key; did you mean method?",
        "train.steps: got 0",
        "train.lr: got 'fast'",
        "peft.kind: got 'lore'",
        "peft.lr: unknown key; did you mean train.lr?",
        "train.warmup_steps: got -1",
    ):
        assert part in text
    assert text.startswith(f"{path}: 7 problems")


def test_overrides_and_round_trip(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("output_dir: out\ntrain:\n  lr: 1e-3\n")
    config = load_config(path, ["train.lr=5e-4", "data.documents=[0, second]", "peft.kind=bitfit"])
    assert config.train.lr == 5e-4
    assert config.data.documents == [0, "second"]
    assert validate(yaml.safe_load(config.dump())) == config


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- 1\n", "expected `key: value`"),
        ("a: [", "not valid YAML"),
        ("output_dir: a\noutput_dir: b\n", "stands twice"),
        ("output_dir: a\n? [train]\n: 3\n", "not valid YAML: .*unhashable key"),
        ("output_dir: a\ndistill: {targets: topk, temperature: 2.0}\n", "set tail=false"),
        ("output_dir: a\ndeepspeed: {zero_stage: 1, offload_param: cpu}\n", "offload_param needs zero_stage=3"),
        ("output_dir: a\ndata: {query_pattern: hello}\n", "must contain {question}"),
        ("output_dir: a\ndata: {query_pattern: '{{question}}'}\n", "must contain {question}"),
        ("output_dir: a\ndata: {context_pattern: '{document} {text}'}\n", "context_pattern has {text}, which nothing"),
        ("output_dir: a\ndata: {answer_pattern: '{answer} {'}\n", "answer_pattern is .*write {{ and }} for braces"),
        ("output_dir: a\nqueries: {self_study: {prompt: '{opening}'}}\n", "no text with the shortest of openings"),
        ("output_dir: a\ntrain: {betas: [1.0, 0.9]}\n", "train.betas.0: got 1.0"),
        ("output_dir: a\nseed: 4294967296\n", "seed: got 4294967296"),
        ("output_dir: a\npeft: {target_modules: q_proj}\n", "got 'q_proj', expected 'all-linear', or a valid list"),
        ("output_dir: a\npeft: {target_modules: []}\n", "peft.target_modules is \\[\\], which adapts nothing"),
        ("output_dir: a\ndata: {documents: []}\n", "data.documents: got \\[\\]"),
        ("output_dir: a\ndistill: {teacher: online, targets: topk}\n", "with teacher=online use targets=hidden"),
        ("output_dir: a\ndistill: {on_policy: 0.5}\n", "on_policy=0.5 needs teacher=online"),
        ("output_dir: a\ndistill: {teacher: online}\npeft: {kind: full}\n", "use distill.teacher=stored"),
        ("output_dir: a\noverwrite: true\nresume: auto\n", "exclude each other"),
        (
            "output_dir: a\ntrain: {optimizer: paged_adamw_8bit}\ndeepspeed: {offload_optimizer: cpu}\n",
            "use one of them: train.optimizer=adamw_8bit, or offload_optimizer=none",
        ),
        (
            "output_dir: a\nmodel: {sequence_parallel: ulysses}\ndistill: {teacher: online}\n",
            "with distill.teacher=online each step has its own; use distill.teacher=stored",
        ),
        (
            "output_dir: a\nmethod: pbft\nmodel: {sequence_parallel: ulysses}\ndata: {task: rte}\n",
            "does not use model.sequence_parallel",
        ),
    ],
)
def test_what_cannot_be_right_is_refused(tmp_path, text, message):
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message.replace("{", r"\{").replace("}", r"\}")):
        load_config(path)


def test_a_folder_in_the_home_folder(monkeypatch):
    monkeypatch.setenv("HOME", "/home/somebody")
    assert validate({"output_dir": "~/runs/a"}).output_dir == "/home/somebody/runs/a"


def test_missing_and_binary_files(tmp_path):
    with pytest.raises(ConfigError, match="no such file"):
        load_config(tmp_path / "none.yaml")
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="not UTF-8"):
        load_config(tmp_path / "binary.yaml")


def test_every_key_is_described():
    assert all(text for _, _, _, text in describe())


RUNS = [path for path in sorted((ROOT / "configs").rglob("*.yaml")) if path.parent.name != "sweeps"]


@pytest.mark.parametrize("path", RUNS, ids=lambda p: p.name)
def test_shipped_configs_are_valid(path):
    load_config(path)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"deepspeed": {"offload_param": "nvme"}}, "needs nvme_path"),
        ({"deepspeed": {"nvme_path": "/tmp"}}, "nvme_path=/tmp is not used"),
        (
            {"deepspeed": {"zero_stage": 2, "offload_optimizer": "nvme", "nvme_path": "/tmp"}},
            "needs zero_stage=3, got 2",
        ),
        (
            {"deepspeed": {"offload_param": "nvme", "nvme_path": "/tmp"}, "model": {"dtype": "float32"}},
            "16 bits alone",
        ),
        (
            {"deepspeed": {"offload_param": "nvme", "nvme_path": "/tmp"}, "model": {"quantization": "nf4"}},
            "mapped from their files",
        ),
        (
            {"deepspeed": {"offload_optimizer": "nvme", "nvme_path": "/tmp"}, "train": {"save_every": 5}},
            "state that checkpoints do not reach",
        ),
        ({"model": {"quantization": "nf4"}, "peft": {"kind": "full"}}, "holds weights that take no gradient"),
        ({"train": {"keep_best": True}}, "keep_best=true needs eval_every"),
    ],
)
def test_memory_settings_that_exclude_each_other(changes, said):
    with pytest.raises(ConfigError, match=said):
        validate({"output_dir": "runs/x", **changes})
