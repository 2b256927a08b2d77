"""What a plan says: traces against real tensors, ranks, changes, the command line, and the end of a run."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig

from fastft import peft
from fastft.cli import main
from fastft.config import load_config, validate
from fastft.errors import FastftError, ModelError
from fastft.models.attention import PackedSequences
from fastft.models.causal import PackedCausalLM
from fastft.models.loading import load_model
from fastft.models.recompute import checkpoint_activations
from fastft.ops import linear_log_softmax_kl
from fastft.plan import architecture, hardware
from fastft.plan.memory import Phase
from fastft.plan.planner import Planner, apply, planner
from fastft.plan.roofline import Roofline
from fastft.plan.trace import ACTIVATIONS, LIVE, LOGITS, Pass, Tracer
from fastft.plan.workload import Ask
from tests.conftest import ROOT
from tests.plan.examples import LLAMA_8B, TINY, config, workload

MIB = 2**20
OPT_125M = architecture.PUBLISHED["facebook/opt-125m"]
LORA_30B = str(ROOT / "configs/opt30b_distill_lora_24gb.yaml")
BITFIT_30B = str(ROOT / "configs/opt30b_distill_bitfit_24gb.yaml")


@pytest.fixture(autouse=True)
def offline(monkeypatch, tmp_path):
    """No data and nothing cached."""
    monkeypatch.setenv("FASTFT_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("FASTFT_DATA", raising=False)


class Kept:
    """Bytes that autograd keeps between forward and backward, each storage once, parameters apart."""

    def __init__(self, model):
        self.seen = {p.untyped_storage().data_ptr() for p in model.parameters()}
        self.storages = []

    def pack(self, x):
        storage = x.untyped_storage()
        if storage.data_ptr() not in self.seen:
            self.seen.add(storage.data_ptr())
            self.storages.append(storage)
        return x

    @property
    def nbytes(self) -> int:
        return sum(s.nbytes() for s in self.storages)


@pytest.mark.parametrize("checkpointing", ["none", "attention", "full"])
@pytest.mark.parametrize("name", ["opt", "llama"])
@pytest.mark.parametrize("kind", ["lora", "bitfit", "full"])
def test_a_trace_keeps_what_autograd_keeps(tiny, name, kind, checkpointing):
    """The activations of a trace without data, against the tensors that a real forward saves."""
    c = config(peft={"kind": kind, **({"add_biases": True} if kind == "bitfit" and name == "llama" else {})})
    model = load_model(str(tiny(name)), dtype="bfloat16")
    tracer = Tracer(model.config, c.peft, "bfloat16", None)
    lengths = (60, 40, 100)
    traced = tracer.peak(Pass(lengths, 200, trains=True, loss="kl", checkpointing=checkpointing))
    lm = PackedCausalLM(model)
    peft.inject(model, c.peft)
    checkpoint_activations(lm, checkpointing)
    kept = Kept(model)
    with torch.autograd.graph.saved_tensors_hooks(kept.pack, lambda x: x):
        ids = torch.zeros(1, sum(lengths), dtype=torch.long)
        lm(ids, PackedSequences(list(lengths)), lambda h, w: linear_log_softmax_kl(h, h.detach(), w, reduction="sum"))
    # What one layer leaves for the next, and the loss's own, are counted on one side alone.
    hidden = 200 * model.config.hidden_size * 2
    assert sum(traced.values()) >= 0.9 * kept.nbytes
    assert abs(traced[ACTIVATIONS] - kept.nbytes) <= 6 * hidden + 0.02 * kept.nbytes


def test_bitfit_keeps_six_hidden_states_and_a_bit_for_each_relu():
    """OPT-30B at 256 tokens: input, q, k, v, attention's output and residual of each layer, and 4 H bits; 1.1 GB."""
    tracer = Tracer(architecture.PUBLISHED["facebook/opt-30b"], config(peft={"kind": "bitfit"}).peft, "bfloat16", None)
    traced = tracer.peak(Pass((256,), 256, trains=True, loss="kl"))
    assert traced[ACTIVATIONS] == pytest.approx(48 * 256 * (6 * 7168 * 2 + 28672 / 8), rel=0.01)


def test_layers_are_counted_on_from_three():
    """Five layers traced in full are what two and three say of five."""
    deep = LlamaConfig(**{**TINY["llama"].to_dict(), "num_hidden_layers": 5})
    tracer = Tracer(deep, config(peft={"kind": "lora"}).peft, "bfloat16", None)
    training = Pass((30, 50), 80, trains=True, loss="kl")
    for job in (training, Pass((80,), 0, capture=True), Pass((9,) * 4, 36, loss="ce")):
        assert tracer.peak(job) == dict(tracer._run(job, 5))


def test_a_chunk_of_logits_is_bounded():
    """[2,048, 50,272] logits of student and teacher would be 412 MB."""
    tracer = Tracer(OPT_125M, config(peft={"kind": "bitfit"}).peft, "bfloat16", None)
    traced = tracer.peak(Pass((256,) * 8, 2048, trains=True, loss="kl"))
    assert 40 * MIB < traced[LOGITS] <= 60 * MIB
    assert traced[LIVE] < traced[ACTIVATIONS]


def small_planner(ranks: int = 1, **values) -> Planner:
    """OPT-125M behind 512 tokens, 16 sequences of 64."""
    work = workload([512], [64] * 16, [Ask(512, (32,) * 8, new=16)])
    c = config(model={"name_or_path": "facebook/opt-125m"}, **values)
    return Planner(c, OPT_125M, work, device=hardware.GPUS["rtx4090"], ranks=ranks, host_memory=2**36)


def train_phase(prepared: Planner, change: dict) -> Phase:
    plan = prepared.plan(apply(prepared.config, change))
    return next(phase for phase in plan.phases if phase.name == "train")


def test_memory_of_a_rank_falls_with_the_ranks():
    """ZeRO-0 to 3 on four ranks, full fine-tuning: who holds N parameters' weights, gradients, master, m and v."""
    prepared = small_planner(ranks=4, peft={"kind": "full"})
    n = prepared.counts.parameters
    parts = [train_phase(prepared, {"deepspeed.zero_stage": stage}).device for stage in range(4)]
    assert [p["base"] for p in parts[:3]] == [2 * n] * 3
    assert parts[3]["base"] == pytest.approx(2 * n / 4, rel=0.01)
    assert parts[0]["optimizer"] == 12 * n
    assert [p["optimizer"] for p in parts[1:]] == [3 * n] * 3
    assert parts[1]["gradients"] >= 2 * n
    # In 16 bits, as one flat tensor, and that in float32.
    assert parts[3]["gradients"] == pytest.approx((2 + 2 + 4) * n / 4, rel=0.01)


def test_ranks_that_encode_a_context_together_hold_a_part_of_it_each():
    """Four ranks, a context of 65,536 tokens: its keys and values, the layer at work, and how long it takes."""
    asked = workload([65536], [64] * 256, [Ask(65536, (32,) * 16, 24)])
    gpu = dataclasses.replace(hardware.GPUS["h100"], link=1e30)  # the exchange takes no time
    prepared = Planner(config(), LLAMA_8B, asked, device=gpu, ranks=4)
    alone = prepared.plan()
    together = prepared.plan(apply(prepared.config, {"model.sequence_parallel": "ulysses"}))
    parts = [next(p.device for p in plan.phases if p.name == "teach") for plan in (alone, together)]
    assert parts[0]["prefix"] == 65536 * 131072 and parts[1]["prefix"] == parts[0]["prefix"] // 4
    assert parts[1]["live_layer"] == pytest.approx(parts[0]["live_layer"] / 4, rel=1e-3)  # its MLP
    # With a tiled MLP attention is the highest moment, and there the exchange has buffers of its own.
    tiled = [prepared.tracer.peak(Pass((65536,), 0, capture=True, mlp_tile=2048, ranks=n)) for n in (1, 4)]
    live = [sum(trace.values()) - part["prefix"] for trace, part in zip(tiled, parts, strict=True)]
    assert 0.26 < live[1] / live[0] < 0.3
    assert together.run["contexts"] == pytest.approx(alone.run["contexts"] / 4)
    assert together.run["teach"] == pytest.approx(alone.run["teach"])
    assert {"model.sequence_parallel": "ulysses"} in prepared.changes()
    too_many = Planner(config(), LLAMA_8B, asked, device=gpu, ranks=16)
    assert not any("model.sequence_parallel" in change for change in too_many.changes())
    with pytest.raises(ModelError, match="has 8 for 16 processes"):
        too_many.plan(apply(prepared.config, {"model.sequence_parallel": "ulysses"}))


def test_the_exchange_takes_time_and_uneven_heads_do():
    prepared = small_planner(ranks=2)
    config, counts = prepared.config, prepared.counts
    shared = apply(config, {"model.sequence_parallel": "ulysses"})
    gpu = dataclasses.replace(hardware.GPUS["h100"], link=1e30)
    three = dataclasses.replace(counts, kv_width=3 * counts.head_size)
    times = [Roofline(shared, c, workload([4096]), gpu, 2).phases(0.0)["contexts"] for c in (counts, three)]
    assert times[1] > times[0]
    slow = dataclasses.replace(gpu, link=1e9)
    time = Roofline(shared, counts, workload([4096]), slow, 2).phases(0.0)["contexts"]
    rows = 2 * (counts.query_width + counts.kv_width) * counts.layers
    assert time - times[0] == pytest.approx(2048 * rows * 2 / 2 / 1e9)  # half of a rank's tokens' rows, in 16 bits


def test_offloading_moves_bytes_to_the_host():
    prepared = small_planner()
    stay, change = {"deepspeed.zero_stage": 3}, {"deepspeed.offload_optimizer": "cpu", "deepspeed.offload_param": "cpu"}
    before, after = train_phase(prepared, stay), train_phase(prepared, {**stay, **change})
    assert "optimizer" not in after.device
    assert after.host["optimizer"] == before.device["optimizer"]
    assert after.device["base"] + after.host["base"] == before.device["base"]
    assert prepared.plan(apply(prepared.config, {**stay, **change})).step["link"] > 0
    assert "link" not in prepared.plan(apply(prepared.config, stay)).step


def test_activations_that_are_offloaded_are_on_the_host():
    """OPT-30B at 2,048 tokens: 46 of 48 layers' inputs leave the device, and computing hides their copies."""
    prepared = Planner(
        config(model={"name_or_path": "facebook/opt-30b"}, train={"activation_checkpointing": "full", "batch_size": 1}),
        architecture.PUBLISHED["facebook/opt-30b"],
        workload([512], [2048], []),
        device=hardware.GPUS["rtx4090"],
        host_memory=2**36,
    )
    before, after = (train_phase(prepared, {"train.activation_offloading": on}) for on in (False, True))
    hidden = 2048 * 7168 * 2
    assert before.device["activations"] - after.device["activations"] == 46 * hidden
    assert after.host["activations"] == 48 * hidden and "activations" not in before.host
    step = prepared.plan(apply(prepared.config, {"train.activation_offloading": True})).step
    assert "offloading" not in step
    slow = dataclasses.replace(prepared.device, link=1e9)
    prepared.device = slow
    step = prepared.plan(apply(prepared.config, {"train.activation_offloading": True})).step
    computed = step["student_forward"], step["recompute"] + step["backward"]
    assert step["offloading"] == pytest.approx(sum(max(0.0, 48 * hidden / 1e9 - s) for s in computed))
    assert step["offloading"] > 0


def test_tiles_of_an_mlp_are_narrow_and_computed_again():
    """Llama-3-8B, a context of 8,192 tokens, 4,096 in training: gate, up and product [T, I] exist for a tile alone."""
    work, card = workload([8192], [4096], []), hardware.GPUS["a100-80gb"]
    prepared = Planner(config(train={"batch_size": 1}), LLAMA_8B, work, device=card, host_memory=2**36)
    whole, tiled = (prepared.plan(apply(prepared.config, {"model.mlp_tile": tile})) for tile in (None, 1024))
    teach = [next(p for p in plan.phases if p.name == "teach").device["live_layer"] for plan in (whole, tiled)]
    assert teach[0] - teach[1] > (8192 - 1024) * 14336 * 2
    kept = [next(p for p in plan.phases if p.name == "train").device["activations"] for plan in (whole, tiled)]
    # Of each layer gate, up and their product, which down_proj's LoRA reads; the tiles keep the MLP's input.
    assert kept[0] - kept[1] > 32 * 4096 * (3 * 14336 - 4096) * 2
    counts = prepared.counts
    assert counts.again_mlp == 32 * 3 * 4096 * 14336
    expected = whole.step["student_forward"] * counts.again_mlp / counts.linear
    assert tiled.step["recompute"] == pytest.approx(expected, rel=0.1) and "recompute" not in whole.step


def test_a_quantised_base_is_dequantised_in_every_pass():
    prepared = small_planner()
    plans = [prepared.plan(apply(prepared.config, {"model.quantization": kind})) for kind in ("none", "int8", "nf4")]
    assert plans[0].total_bytes > plans[1].total_bytes > plans[2].total_bytes
    assert "dequantise" not in plans[0].step and plans[1].step["dequantise"] > plans[2].step["dequantise"] > 0


def test_an_8_bit_optimizer_saves_nothing_with_bitfit():
    prepared = small_planner(peft={"kind": "bitfit"})
    plain = prepared.plan()
    small = prepared.plan(apply(prepared.config, {"train.optimizer": "bias_adamw_8bit"}))
    assert small.total_bytes > 0.99 * plain.total_bytes
    assert "nothing beside the base" in small.notes[0]
    assert not plain.notes
    assert not any("train.optimizer" in change for change in prepared.changes())


def test_paged_state_is_on_the_host_where_its_tensors_are_large():
    """LoRA on OPT-125M without ZeRO: of its matrices, 16 x 768 and 16 x 3072, none is large enough; flat they are."""
    prepared = small_planner()
    found = {}
    for stage in (0, 2):
        for name in ("adamw", "paged_adamw", "paged_adamw_8bit"):
            change = {"deepspeed.zero_stage": stage, "train.optimizer": name}
            phase, n = train_phase(prepared, change), prepared.counts.trained
            found[stage, name] = phase.device.get("optimizer", 0) / n, phase.host.get("optimizer", 0) / n
    assert found[0, "paged_adamw"] == found[0, "adamw"] == (12, 0)
    assert found[2, "adamw"] == (12, 0) and found[2, "paged_adamw"] == (4, 8)
    assert found[2, "paged_adamw_8bit"] == (pytest.approx(4 + 8 / 256, rel=1e-3), 2)
    change = {"deepspeed.zero_stage": 2, "train.optimizer": "paged_adamw"}
    step = prepared.plan(apply(prepared.config, change)).step
    assert step["link"] == pytest.approx(2 * 8 * prepared.counts.trained / prepared.device.link)


def test_changes_are_values_that_a_config_takes():
    prepared = small_planner()
    for change in prepared.changes():
        changed = apply(prepared.config, change)
        assert validate(changed.plain()).plain() == changed.plain()
        assert changed.plain() != prepared.config.plain()


def json_of(capsys, *arguments: str) -> tuple[int, dict]:
    code = main(["plan", "--json", *arguments])
    return code, json.loads(capsys.readouterr().out)


@pytest.mark.parametrize(("path", "gpu"), [(LORA_30B, "rtx4090"), (LORA_30B, "a10"), (BITFIT_30B, "rtx3090")])
def test_opt_30b_fits_24_gb(capsys, path, gpu):
    code, found = json_of(capsys, "--cfg", path, "--gpu", gpu)
    assert code == 0 and found["fits"]
    assert found["total_bytes"] == sum(found["parts"].values()) <= found["device"]["memory_bytes"]
    assert found["total_bytes"] == max(phase["total_bytes"] for phase in found["phases"].values())
    assert found["step_time_s"] == pytest.approx(sum(found["step_time_parts"].values()))
    assert "table of published shapes" in found["model_config"]
    assert found["longest_context"] == pytest.approx(1784, abs=10)


def test_what_does_not_fit_is_mended(capsys, tmp_path):
    """The base in bfloat16 is refused; the config that is written instead fits, and says what it changed."""
    arguments = ["--cfg", LORA_30B, "--gpu", "rtx4090", "--host-memory", "32GiB"]
    code, found = json_of(capsys, *arguments, "model.quantization=none")
    assert found["phases"]["load"]["total_bytes"] < found["total_bytes"]
    assert code == 1 and not found["fits"]
    assert found["short_bytes"] == found["total_bytes"] - found["device"]["memory_bytes"] > 30e9
    assert found["suggestion"]["change"] == {"model.quantization": "nf4"}
    alone = [row for row in found["changes"] if row["fits"]]
    assert {"model.quantization": "nf4"} in [row["change"] for row in alone]
    assert [row["run_time_s"] for row in found["changes"]] == sorted(row["run_time_s"] for row in found["changes"])

    mended = tmp_path / "mended.yaml"
    assert main(["plan", *arguments, "--out", str(mended), "model.quantization=none"]) == 0
    assert "short of 38" in " ".join(capsys.readouterr().out.split())
    assert load_config(mended).model.quantization == "nf4"
    assert json_of(capsys, "--cfg", str(mended), "--gpu", "rtx4090")[1]["fits"]


def test_nothing_fits(capsys, tmp_path):
    out = tmp_path / "none.yaml"
    arguments = ["--cfg", LORA_30B, "--gpu", "rtx4090", "--memory", "1GiB", "--host-memory", "8GiB"]
    assert main(["plan", *arguments]) == 1
    assert "nothing that the planner knows makes it fit" in " ".join(capsys.readouterr().out.split())
    assert main(["plan", *arguments, "--out", str(out)]) == 1
    assert "not written" in capsys.readouterr().err
    assert not out.exists()


def test_a_plan_for_the_cpu(capsys):
    arguments = ["--cfg", BITFIT_30B, "--gpu", "cpu", "model.name_or_path=facebook/opt-125m", "model.quantization=none"]
    code, found = json_of(capsys, *arguments, "--memory", "4GiB")
    assert code == 0 and found["device"] == {"name": "cpu", "memory_bytes": 2**32, "ranks": 1}
    assert found["parts"]["base"] == 2 * 125_239_296
    assert found["step_time_s"] > 0


def test_mistakes_are_named(capsys):
    for arguments, message in (
        (["--gpu", "rtx9999"], "--gpu rtx9999: not in the table of devices; expected one of rtx3090"),
        (["--gpu", "rtx4090", "--memory", "lots"], "--memory lots: expected a number with a unit, like 64GiB"),
        (["--gpu", "rtx4090", "--gpus", "0"], "--gpus 0: expected 1 or more"),
        (["--gpu", "auto"], "name the file with --out FILE"),
        (["--gpu", "rtx4090", "model.name_or_path=./no/such"], "model.name_or_path=./no/such: no such folder"),
    ):
        assert main(["plan", "--cfg", LORA_30B, *arguments]) == 1
        assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "gib", "found"),
    [
        ("NVIDIA GeForce RTX 4090", 24, "rtx4090"),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", 16, None),
        ("NVIDIA GeForce RTX 3090 Ti", 24, None),
        ("NVIDIA A10", 22.5, "a10"),
        ("NVIDIA A10G", 22.5, None),
        ("NVIDIA A100-SXM4-80GB", 80, "a100-80gb"),
        ("NVIDIA A100-SXM4-40GB", 40, "a100-40gb"),
        ("NVIDIA H100 80GB HBM3", 79.6, "h100"),
        ("NVIDIA H100 PCIe", 79.6, None),
        ("NVIDIA H200", 139.8, "h200"),
    ],
)
def test_this_machines_card_is_found_in_the_table(name, gib, found):
    gpu = hardware.known_gpu(name, int(gib * 2**30))
    assert (gpu and gpu.name) == found


@pytest.mark.parametrize(("text", "nbytes"), [("64GiB", 2**36), ("24 GB", 24e9), ("0.5 TiB", 2**39), ("512mib", 2**29)])
def test_bytes_with_units(text, nbytes):
    assert hardware.parse_bytes(text, "--memory") == nbytes


@pytest.mark.parametrize("text", ["64", "-1GiB", "0GiB", "GiB", "infGiB", "nanGB"])
def test_bytes_without_sense(text):
    with pytest.raises(FastftError, match="expected a number with a unit"):
        hardware.parse_bytes(text, "--memory")


@pytest.mark.parametrize("name", ["quickstart", "distill_rte", "pbft_rte", "ft_rte", "icl_rte", "llmft/cola_ft"])
def test_every_method_can_be_planned(name):
    small = "model.name_or_path=facebook/opt-125m"  # in the table, with nothing to convert
    prepared, _ = planner(load_config(ROOT / f"configs/{name}.yaml", [small]), "rtx4090")
    plan = prepared.plan()
    assert plan.fits and plan.total_bytes == sum(plan.largest.device.values())
    assert plan.run_time_s > 0


def test_a_run_compares_itself_with_its_plan(base_config, launch):
    raw = base_config("opt", evaluate={"answers": False})
    result = launch(raw)
    assert result.returncode == 0, result.stderr[-3000:]
    summary = json.loads((Path(raw["output_dir"]) / "summary.json").read_text())
    plan = summary["plan"]
    assert plan["measured_peak_bytes"] == summary["peak_memory_bytes"]
    assert plan["planned_peak_bytes"] == sum(plan["parts"].values())  # the test's own process is another size
    assert 0 < plan["planned_step_s"] < plan["measured_step_s"] == summary["step_time_s"]
    assert "plan       peak " in result.stdout
