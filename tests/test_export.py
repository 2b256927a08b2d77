"""`fastft export`: PEFT and transformers alone, in a process without fastft, give the run's logits."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from fastft import peft
from fastft.cli import main
from fastft.config import PeftConfig
from fastft.engine.checkpoints import Checkpoints, best_checkpoint, list_checkpoints
from fastft.engine.trainer import Trainer
from tests.conftest import base_config, clean_environment, launch
from tests.engine.test_run import ok

IDS = torch.arange(3, 43).view(2, 20)
RUNS = {
    "lora": ("llama", {"kind": "lora", "r": 4, "lora_alpha": 8.0, "alpha_pattern": {"q_proj": 24.0}}),
    "scaled": ("opt", {"kind": "lora", "r": 2, "target_modules": ["q_proj", "fc1"], "trained_scale": True}),
    "bitfit": ("opt", {"kind": "bitfit"}),
    "added": ("llama", {"kind": "bitfit", "add_biases": True}),
    "full": ("opt", {"kind": "full"}),
    "relu": ("llama", {"kind": "lora", "activation": "relu"}),
}
# Runs in a process that cannot import fastft; prints nothing, saves the logits of each model.
LOAD = """
import sys
sys.modules["fastft"] = None
import torch
from peft import PeftModel
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

ids, jobs = torch.load(sys.argv[1])
found = {}
for name, (kind, base, folder) in jobs.items():
    model = AutoModelForCausalLM.from_pretrained(folder if kind == "merged" else base, dtype=torch.float32)
    if kind == "merged":
        AutoTokenizer.from_pretrained(folder)
    if kind == "peft":
        model = PeftModel.from_pretrained(model, folder)
    if kind == "delta":
        with safe_open(folder + "/delta.safetensors", "pt") as file, torch.no_grad():
            for key in file.keys():
                place, _, what = key.rpartition(".")
                module, delta = model.get_submodule(place), file.get_tensor(key)
                there = getattr(module, what)
                setattr(module, what, torch.nn.Parameter(delta if there is None else there + delta))
    with torch.no_grad():
        found[name] = model.eval()(input_ids=ids).logits
torch.save(found, sys.argv[2])
"""


@pytest.fixture(scope="module")
def runs(tmp_path_factory, documents, tiny):
    """Folder, base and trained tensors (at the end and in the checkpoint of step 2) of a run of each kind."""
    root = tmp_path_factory.mktemp("export")
    make, start = base_config.__wrapped__(root, documents, tiny), launch.__wrapped__(root)
    end, save = Trainer.trained_tensors, Checkpoints.save
    found, now = {}, {}

    def watched_end(self):
        now["end"] = end(self)
        return now["end"]

    def watched_save(self, trainer, step, **figures):
        now[f"step_{step}"] = end(trainer)
        return save(self, trainer, step, **figures)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "trained_tensors", watched_end)
        patch.setattr(Checkpoints, "save", watched_save)
        for name, (kind, section) in RUNS.items():
            train = {"steps": 4, "save_every": 2, "lr": 0.03, "keep_checkpoints": 2, "eval_every": 2, "keep_best": True}
            raw = make(kind, peft=section, train=train, evaluate={"answers": False})
            raw |= {"output_dir": str(root / name), "deepspeed": {"zero_stage": 3, "threads_per_rank": 1}}
            if name == "full":
                raw["distill"] = {"targets": "topk", "top_k": 8}
            if name == "lora":
                raw["peft"] = {k: v for k, v in section.items() if k in ("r", "alpha_pattern", "lora_alpha", "kind")}
            ok(start(raw))
            found[name] = (root / name, tiny(kind), dict(now))
    return found


def logits(base: Path, section: dict, trained: dict[str, torch.Tensor]) -> torch.Tensor:
    """Those of fastft's own modules with these parameters."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).requires_grad_(False)
    parameters = peft.inject(model, PeftConfig.model_validate(section))
    assert parameters.keys() == trained.keys()
    with torch.no_grad():
        for name, value in trained.items():
            parameters[name].copy_(value)
        return model.eval()(input_ids=IDS).logits


EXPORTS = [
    ("lora", None, None),
    ("lora", None, "step_2"),
    ("lora", "merged", "best"),
    ("scaled", "peft", None),
    ("scaled", "merged", "step_2"),
    ("bitfit", None, None),
    ("bitfit", "merged", "last"),
    ("added", "delta", None),
    ("added", "merged", "step_2"),
    ("full", None, None),
    ("full", "merged", "step_2"),
]
DEFAULT = {"lora": "peft", "bitfit": "delta", "full": "merged"}


def test_exports_load_without_fastft_and_give_the_same_logits(runs, tmp_path, capsys):
    jobs, expected = {}, {}
    for i, (name, kind, checkpoint) in enumerate(EXPORTS):
        folder, base, trained = runs[name]
        out = tmp_path / f"{i}"
        arguments = ["export", str(folder), "--out", str(out)]
        arguments += ["--format", kind] if kind else []
        arguments += ["--checkpoint", checkpoint] if checkpoint else []
        assert main(arguments) == 0
        assert f"export     {out}" in capsys.readouterr().out
        label = f"{name} {kind} {checkpoint}"
        jobs[label] = (kind or DEFAULT[name], str(base), str(out))
        newest = list_checkpoints(folder / "checkpoints")[-1].name
        best = best_checkpoint(folder / "checkpoints").name
        state = {None: "end", "last": newest, "best": best}.get(checkpoint, checkpoint)
        expected[label] = logits(base, RUNS[name][1], trained[state])
    torch.save((IDS, jobs), tmp_path / "jobs.pt")
    script = tmp_path / "load.py"
    script.write_text(LOAD)
    command = [sys.executable, str(script), str(tmp_path / "jobs.pt"), str(tmp_path / "logits.pt")]
    done = subprocess.run(command, capture_output=True, text=True, env=clean_environment(), check=False)
    assert done.returncode == 0, done.stderr
    found = torch.load(tmp_path / "logits.pt")
    for label in jobs:
        torch.testing.assert_close(
            found[label], expected[label], rtol=1e-5, atol=1e-5, msg=lambda m, s=label: f"{s}: {m}"
        )
        plain = logits_of_base(jobs[label][1])
        assert (expected[label] - plain).abs().max() > 1e-2, label  # training changed them


def logits_of_base(base: str) -> torch.Tensor:
    with torch.no_grad():
        return AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()(input_ids=IDS).logits


def test_an_adapter_is_what_vllm_documents(runs, tmp_path):
    """Its PEFTHelper refuses modules_to_save, a bias and a rank above the limit, and ignores alpha_pattern."""
    folder, _, trained = runs["lora"]
    assert main(["export", str(folder), "--out", str(tmp_path / "out")]) == 0
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    config = json.loads((tmp_path / "out/adapter_config.json").read_text())
    assert config["peft_type"] == "LORA" and config["r"] == 4 and config["bias"] == "none"
    assert not config["modules_to_save"] and not config["alpha_pattern"] and config["lora_alpha"] == 8
    assert set(config["target_modules"]) == {name.split(".")[-2] for name in trained["end"]}
    tensors = load_file(tmp_path / "out/adapter_model.safetensors")
    name = "model.layers.0.self_attn.q_proj.lora_B"
    torch.testing.assert_close(tensors[f"base_model.model.{name}.weight"], 3 * trained["end"][name])


def test_a_delta_says_how_to_add_it(runs, tmp_path):
    folder, base, trained = runs["bitfit"]
    assert main(["export", str(folder), "--out", str(tmp_path / "out")]) == 0
    with safe_open(tmp_path / "out/delta.safetensors", "pt") as file:
        said = file.metadata()
        assert said["base_model_name_or_path"] == str(base) and len(said["base_fingerprint"]) == 64
        assert said["how"].startswith("Add each tensor, in float32, to the base model's parameter of the same name.")
        assert set(file.keys()) == trained["end"].keys()
        model = AutoModelForCausalLM.from_pretrained(base)
        for name, parameter in model.named_parameters():
            if name in trained["end"]:
                torch.testing.assert_close(parameter + file.get_tensor(name), trained["end"][name])


@pytest.mark.parametrize(
    ("name", "arguments", "said"),
    [
        ("relu", ["--format", "merged"], "peft.activation=relu stands between lora_A and lora_B"),
        ("relu", [], "peft.activation=relu"),
        ("bitfit", ["--format", "peft"], "PEFT and vLLM have no adapters of biases alone"),
        ("lora", ["--format", "delta"], "it holds biases, and peft.kind=lora trains others; use peft"),
        ("full", ["--format", "peft"], "peft.kind=full is no adapter; use merged"),
        ("lora", ["--checkpoint", "step_3"], "--checkpoint step_3: "),
    ],
)
def test_what_cannot_be_exported_is_refused(runs, tmp_path, capsys, name, arguments, said):
    out = tmp_path / "out"
    assert main(["export", str(runs[name][0]), "--out", str(out), *arguments]) == 1
    assert said in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_folders_that_are_no_run_and_files_in_the_way(runs, tmp_path, capsys):
    assert main(["export", str(tmp_path)]) == 1
    assert "is not the folder of a run: it has no config.yaml" in capsys.readouterr().err
    assert main(["export", str(runs["lora"][0]), "--out", str(tmp_path)]) == 1
    assert "this is there already" in capsys.readouterr().err


def test_another_base_under_the_same_name_is_refused(runs, tmp_path, capsys):
    """The base in the run's config has changed since its checkpoint."""
    folder, base, _ = runs["bitfit"]
    weights = base / "model.safetensors"
    before = weights.read_bytes()
    tensors = load_file(weights)
    save_file({**tensors, "model.decoder.final_layer_norm.bias": tensors["model.decoder.final_layer_norm.bias"] + 1},
              weights, metadata={"format": "pt"})  # fmt: skip
    try:
        out = str(tmp_path / "out")
        assert main(["export", str(folder), "--format", "merged", "--checkpoint", "step_2", "--out", out]) == 1
        assert "is not the base that the run was trained on: fingerprint " in capsys.readouterr().err
    finally:
        weights.write_bytes(before)
