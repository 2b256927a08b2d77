"""Profiles of runs: they add up, they name what was slowed down on purpose, and they cost nothing while off."""

from __future__ import annotations

import json
import os
import re
import signal
import time
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from torch import nn

from fastft import profiling
from fastft.engine.trainer import Trainer
from fastft.methods import distill
from fastft.report.advice import advise
from fastft.report.trace import IDLE, Trace, analyse
from tests.engine.test_run import ok

SHORT = {"passages": {"tokens": 16, "prompt_tokens": 6, "stride": 4}, "self_study": {"count": 0}}


@pytest.fixture
def profiled_config(base_config):
    """A small run of which one step, or more, is recorded."""

    def make(**sections) -> dict:
        raw = {**base_config(), "queries": SHORT, "profile": {"steps": 1, "wait": 1}}
        raw["train"] |= {"steps": 3}
        raw["evaluate"] |= {"answers": False}
        raw["data"] |= {"control_documents": 0}
        for section, values in sections.items():
            raw[section] = {**raw[section], **values}
        return raw

    return make


def report_of(raw: dict) -> dict:
    return json.loads((Path(raw["output_dir"]) / "report.json").read_text(encoding="utf-8"))


def test_two_ranks_under_zero_3_add_up(profiled_config, launch):
    """Phases make up the step, the timeline reaches the process's own peak, and each rank has its report."""
    raw = profiled_config(
        train={"steps": 7, "activation_checkpointing": "full", "batch_size": 8, "eval_every": 2},
        profile={"steps": 4, "wait": 2},
        deepspeed={"zero_stage": 3},
    )
    result = launch(raw, processes=2)
    ok(result)
    folder, report = Path(raw["output_dir"]), report_of(raw)
    assert report["state"] == "complete" and report["processes"] == 2
    assert [figures["rank"] for figures in report["profile"]] == [0, 1]
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    measured = [row["time_s"] for row in rows if row["step"] > 3 and "time_s" in row]
    for figures in report["profile"]:
        assert sum(figures["phases"].values()) == pytest.approx(figures["step_s"], rel=0.03)
        assert sum(figures["kinds"].values()) == pytest.approx(figures["step_s"], rel=0.03)
        assert {"data", "forward", "loss", "backward", "recompute", "optimizer", "communication"} <= set(
            figures["phases"]
        )
        found = {(b["phase"], b["block"]) for b in figures["blocks"]}
        kinds = ("attention", "mlp", "norm")
        assert {(phase, kind) for phase in ("forward", "backward", "recompute") for kind in kinds} <= found
        assert 0 < figures["communication"]["exposed_s"] <= figures["communication"]["seconds"]
        assert figures["memory"]["peak_bytes"] > 0
    assert report["profile"][0]["steps"] == pytest.approx(measured, rel=0.03)
    highest = max(nbytes for _, nbytes in report["memory"])
    assert highest == pytest.approx(report["peak_memory_bytes"], rel=0.03)
    assert 0 <= report["tracing"]["record_bytes"] < highest
    assert report["tracing"]["is_excluded"] and report["tracing"]["peak_bytes"] > 1.03 * highest
    assert report["plan"]["measured_peak_bytes"] == report["peak_memory_bytes"] >= rows[-1]["peak_memory_bytes"]
    assert "trace" in {name for name, *_ in report["spans"]}
    page = (folder / "report.html").read_text()
    assert "Rank 0 works longest" in page or "Rank 1 works longest" in page
    links = set(re.findall(r'href="([^"#]+)"', page))
    assert "profile/rank_1.html" in links and all((folder / link).is_file() for link in links)
    for rank in (0, 1):
        assert f"rank {rank}" in (folder / "profile" / f"rank_{rank}.html").read_text()
        assert Trace.read(folder / "profile" / f"rank_{rank}.trace.json.gz").steps


def slow_data(monkeypatch):
    rows = distill.TeacherStore.rows
    monkeypatch.setattr(distill.TeacherStore, "rows", lambda self, i: (time.sleep(0.1), rows(self, i))[1])


def slow_synchronisation(monkeypatch):
    whole = distill.hidden_divergence

    def reads_each_value(hidden, *rest):
        for value in torch.ones(20_000):
            value.item()
        return whole(hidden, *rest)

    monkeypatch.setattr(distill, "hidden_divergence", reads_each_value)


def slow_copy(monkeypatch):
    whole = distill.hidden_divergence

    def copies(hidden, *rest):
        torch.ones(()).expand(2**26).clone()
        return whole(hidden, *rest)

    monkeypatch.setattr(distill, "hidden_divergence", copies)


def slow_sleep(monkeypatch):
    backward = torch.Tensor.backward
    monkeypatch.setattr(torch.Tensor, "backward", lambda *a, **k: (time.sleep(0.3), backward(*a, **k))[1])


@pytest.mark.parametrize(
    ("plant", "name", "where"),
    [
        (slow_data, "data", "batch"),
        (slow_synchronisation, "synchronisation", "in loss"),
        (slow_copy, "copies", "in loss"),
        (slow_sleep, "stall", "in backward"),
    ],
)
def test_a_planted_slowdown_is_named_first(profiled_config, launch, monkeypatch, plant, name, where):
    plant(monkeypatch)
    raw = profiled_config()
    ok(launch(raw))
    first = report_of(raw)["advice"][0]
    assert first["name"] == name and where in first["what"] + first["why"], first
    assert first["share"] > 0.1


@pytest.mark.parametrize(("state", "last"), [("failed", 3), ("stopped", 5)])
def test_an_unfinished_run_leaves_a_report_of_what_there_is(profiled_config, launch, monkeypatch, state, last):
    """It fails in the fourth step, within the recorded ones, or is stopped there."""
    step = Trainer.step

    def interrupted(self, number, *rest):
        if number == 4 and state == "failed":
            raise RuntimeError("fastft test: planted\nmore")
        if number == 4:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(self, number, *rest)

    monkeypatch.setattr(Trainer, "step", interrupted)
    raw = profiled_config(train={"steps": 8}, profile={"steps": 4})
    result = launch(raw)
    assert result.returncode == (1 if state == "failed" else 128 + signal.SIGTERM)
    report, page = report_of(raw), (Path(raw["output_dir"]) / "report.html").read_text()
    assert report["state"] == state and report["step"] == last
    assert f"{state.capitalize()} after step {last} of 8" in page and "optimizer steps" in page
    assert len(report["profile"][0]["steps"]) == last - 2 + (state == "failed")  # the broken one is in the trace too
    assert report["memory"]
    if state == "failed":
        assert report["error"] == "RuntimeError: fastft test: planted"
    assert not (Path(raw["output_dir"]) / "summary.json").exists()


def test_a_run_that_is_not_profiled_has_a_report_without_a_profile(profiled_config, launch):
    raw = profiled_config(profile={"steps": 0}, train={"steps": 2})
    ok(launch(raw))
    report = report_of(raw)
    assert report["profile"] == report["memory"] == report["advice"] == []
    assert not (Path(raw["output_dir"]) / "profile").exists()
    assert "Where the time goes" not in (Path(raw["output_dir"]) / "report.html").read_text()


def test_the_profile_command_records_steps_beside_the_run(profiled_config, tmp_path, capsys):
    import yaml

    from fastft.cli import main

    raw = profiled_config(profile={"steps": 0}, train={"steps": 50, "save_every": 5})
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(raw), encoding="utf-8")
    handlers = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)}
    try:
        assert main(["profile", "--cfg", str(tmp_path / "config.yaml"), "profile.steps=2"]) == 0
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    out = capsys.readouterr().out
    assert "forward" in out and "mean of 2" in out and "run-profile/report.html" in out
    assert not Path(raw["output_dir"]).exists()
    report = json.loads((Path(raw["output_dir"] + "-profile") / "report.json").read_text(encoding="utf-8"))
    assert report["steps"] == 4 and len(report["profile"][0]["steps"]) == 2


def test_more_recorded_steps_than_there_are_is_an_error(profiled_config, launch):
    result = launch(profiled_config(profile={"steps": 5}))
    assert result.returncode == 1
    assert "profile.steps=5 needs 7 training steps (profile.wait=1, one of warm-up), got train.steps=3" in result.stderr


def test_nothing_is_left_behind_and_nothing_is_done_while_off(tmp_path):
    """One shared object stands for every range, and modules have hooks only between the first and the last step."""
    model, head = nn.Sequential(), nn.Linear(4, 4)
    model.add_module("self_attn", nn.Linear(4, 4))
    model.add_module("mlp", nn.Linear(4, 4))
    off = profiling.phase("forward")
    assert isinstance(off, nullcontext) and off is profiling.phase("backward")

    finished = []
    recording = profiling.Recording(
        model, head, tmp_path / "t.json.gz", wait=1, steps=2, memory=True, finished=lambda *a: finished.append(a)
    )
    for step in range(5):
        with recording.step():
            with profiling.phase("forward"):
                head(model(torch.ones(2, 4))).sum()
            assert len(model.mlp._forward_hooks) == (1 if step in (1, 2, 3) else 0)
    assert finished == [(tmp_path / "t.json.gz", True)]
    assert profiling.phase("forward") is off
    figures = analyse(Trace.read(tmp_path / "t.json.gz"))
    assert len(figures["steps"]) == 2
    assert {(b["phase"], b["block"]) for b in figures["blocks"]} == {("forward", "attention"), ("forward", "mlp")}
    assert figures["phases"]["loss"] > 0


def test_memory_over_time_keeps_the_highest_moments(monkeypatch):
    monkeypatch.setattr(profiling, "MOST_SAMPLES", 8)
    timeline = profiling.MemoryTimeline(time.monotonic())
    timeline.stop()
    timeline.samples, timeline.every = [], 1
    values = iter([*range(20), 1000, *range(20)])
    monkeypatch.setattr(profiling, "memory_bytes", lambda: next(values))
    for _ in range(40):
        timeline._sample()
    assert len(timeline.samples) < 8 and max(nbytes for _, nbytes in timeline.samples) == 1000
    assert [t for t, _ in timeline.samples] == sorted(t for t, _ in timeline.samples)


def interval(category: str, name: str, begin: float, end: float, tid: int | str = 1, **args) -> dict:
    return {
        "ph": "X",
        "cat": category,
        "name": name,
        "pid": 0,
        "tid": tid,
        "ts": begin,
        "dur": end - begin,
        "args": args,
    }


def test_the_timeline_of_a_gpu_is_dealt_out():
    """A made trace: a step of 100 us; kernels on one stream, a collective and a copy on others, the rest idle."""
    records = [
        interval("user_annotation", "fastft.step", 0, 100),
        interval("user_annotation", "fastft.data", 0, 10),
        interval("user_annotation", "fastft.forward", 10, 40),
        interval("user_annotation", "fastft.block.mlp", 12, 38),
        interval("cpu_op", "aten::mm", 14, 18, **{"External id": 1, "Sequence number": 7}),
        interval("user_annotation", "fastft.backward", 40, 100),
        interval("cpu_op", "autograd::engine::evaluate_function: MmBackward0", 42, 60, 2, **{"Sequence number": 7}),
        interval("cpu_op", "aten::mm", 44, 50, 2, **{"External id": 2}),
        interval("cpu_op", "c10d::allreduce_", 50, 52, 2, **{"External id": 3}),
        interval("cpu_op", "aten::copy_", 52, 54, 2, **{"External id": 4}),
        interval("kernel", "gemm", 20, 40, "stream 7", **{"External id": 1}),
        interval("kernel", "gemm", 45, 75, "stream 7", **{"External id": 2}),
        interval("kernel", "ncclDevKernel_AllReduce", 65, 85, "stream 9", **{"External id": 3}),
        interval("gpu_memcpy", "Memcpy DtoH (Device -> Pinned)", 80, 90, "stream 11", bytes=1024, **{"External id": 4}),
    ]
    figures = analyse(Trace.parse(records))
    us = {name: round(1e6 * seconds) for name, seconds in figures["phases"].items()}
    # Idle: 0-10 in data, 10-20 in forward, 40-45 and 90-100 in backward; the collective alone 75-80, the copy 80-90.
    assert us == {"data": 10, "forward": 30, "backward": 5 + 30 + 10 + 10, "communication": 5}
    assert sum(us.values()) == 100
    blocks = {(b["phase"], b["block"]): round(1e6 * b["seconds"]) for b in figures["blocks"]}
    assert blocks["forward", "mlp"] == 20 and blocks["backward", "mlp"] == 40 and blocks["forward", IDLE] == 10
    assert round(1e6 * figures["communication"]["seconds"]) == 20
    assert round(1e6 * figures["communication"]["exposed_s"]) == 5
    assert figures["host_link"] == {"seconds": pytest.approx(10e-6), "bytes": 1024}


def test_a_gpu_call_takes_the_time_of_all_kernels_within_it():
    """A loss that calls two products, and one product after it; launched here, run later."""
    inputs = {"Input Dims": [[2, 3], [3, 4]], "Input type": ["float", "float"], "Concrete Inputs": ["", ""]}
    records = [
        interval("user_annotation", "fastft.step", 0, 100),
        interval("cpu_op", "fastft::linear_log_softmax_kl", 10, 30, **{"External id": 1, **inputs}),
        interval("cpu_op", "aten::mm", 11, 14, **{"External id": 2, **inputs}),
        interval("cpu_op", "aten::mm", 15, 18, **{"External id": 3, **inputs}),
        interval("cpu_op", "fastft::log_softmax_kl_rows", 19, 20, **{"External id": 4, **inputs}),
        interval("cpu_op", "aten::mm", 30, 34, **{"External id": 5, **inputs}),
        interval("cpu_op", "aten::bmm", 40, 44, **{"External id": 6, **inputs}),  # nothing of it was traced
        *(
            interval("kernel", "k", 40 + 10 * i, 40 + 10 * i + i, "stream 7", **{"External id": i})
            for i in (2, 3, 4, 5)
        ),
    ]
    calls = {call["name"]: call for call in analyse(Trace.parse(records))["calls"]}
    us = {name: round(1e6 * call["calls"] * call["seconds"]) for name, call in calls.items()}
    assert us == {"fastft::linear_log_softmax_kl": 2 + 3 + 4, "aten::mm": 2 + 3 + 5, "fastft::log_softmax_kl_rows": 4}


def test_memory_belongs_to_who_allocated_it():
    def allocation(moment: float, address: int, nbytes: int) -> dict:
        args = {"Addr": address, "Bytes": nbytes, "Device Type": 0, "Device Id": -1}
        return {"ph": "i", "name": "[memory]", "cat": "cpu_instant_event", "ts": moment, "args": args}

    records = [
        interval("user_annotation", "fastft.step", 0, 100),
        interval("user_annotation", "fastft.forward", 10, 40),
        interval("user_annotation", "fastft.block.attention", 12, 20),
        allocation(13, 1, 300),
        allocation(15, 2, 50),
        allocation(16, 2, -50),
        allocation(30, 3, 100),
        allocation(60, 1, -300),
        allocation(70, 9, -5000),  # of before: no part of what the steps hold
        allocation(200, 4, 10**6),  # behind the last step
    ]
    memory = analyse(Trace.parse(records))["memory"]
    assert memory["peak_bytes"] == 400 and memory["peak_s"] == pytest.approx(30e-6)
    assert memory["held"] == [
        {"phase": "forward", "block": "attention", "bytes": 300},
        {"phase": "forward", "block": None, "bytes": 100},
    ]


def test_advice_on_a_copy_has_the_shape_of_what_is_copied(profiled_config):
    """cat takes a list of tensors, zeros takes none."""
    from fastft.config import validate

    def first(name: str, dims: list) -> str:
        records = [
            interval("user_annotation", "fastft.step", 0, 100),
            interval("user_annotation", "fastft.loss", 0, 90),
            interval("cpu_op", name, 10, 80, **{"Input Dims": dims}),
        ]
        figures = analyse(Trace.parse(records)) | {"threads": 1, "cores": 1}
        return advise([figures], None, validate(profiled_config()))[0].what

    assert first("aten::cat", [[[2, 8], [400, 8], [1, 8]], []]).endswith(
        "most time goes to aten::cat of [400, 8] in loss"
    )
    assert first("aten::copy_", [[], [7, 9]]).endswith("aten::copy_ of [7, 9] in loss")
    assert first("aten::zeros", [[], [], []]).endswith("most time goes to aten::zeros in loss")


def test_advice_is_ranked_and_none_without_a_profile(profiled_config):
    from fastft.config import validate

    config = validate(profiled_config(model={"dtype": "float32"}))
    assert advise([], None, config) == []
    figures = {
        "rank": 0,
        "device": "cpu",
        "step_s": 1.0,
        "phases": {"data": 0.1, "recompute": 0.3, "forward": 0.6},
        "kinds": {"matrix products": 0.4},
        "python": {},
        "stalls": [],
        "synchronisations": {"calls": 1, "seconds": 0.0, "name": "aten::item", "phase": "other", "block": None},
        "copies": [],
        "communication": {"seconds": 0.0, "exposed_s": 0.0},
        "host_link": {"seconds": 0.0, "bytes": 0},
        "threads": 1,
        "cores": 2,
    }
    change = {"change": {"train.activation_checkpointing": "none"}, "planned_peak_bytes": 2**30, "planned_step_s": 0.5}
    device = {"flops": 1e12, "flops_bfloat16": 4e12}
    plan = {"planned_step_s": 0.7, "device": device, "changes": [change | {"fits": True}]}
    found = advise([figures], plan, config)
    expected = {"recompute": 0.3, "dtype": 0.3, "threads": 0.2, "data": 0.1}
    assert {a.name: round(a.seconds, 6) for a in found} == expected
    assert [a.seconds for a in found] == sorted((a.seconds for a in found), reverse=True)
    plan["changes"][0]["fits"] = False  # what does not fit is no advice
    assert "recompute" not in {a.name for a in advise([figures], plan, config)}


def test_tensorboard_has_the_figures_of_the_steps(profiled_config, launch):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    raw = profiled_config(train={"tensorboard": True, "steps": 3, "eval_every": 2}, profile={"steps": 0})
    ok(launch(raw))
    events = accumulator.EventAccumulator(str(Path(raw["output_dir"]) / "tensorboard"))
    events.Reload()
    lines = (Path(raw["output_dir"]) / "metrics.jsonl").read_text().splitlines()
    for key in ("loss", "lr", "evaluated_nll"):
        expected = [(m["step"], m[key]) for m in map(json.loads, lines) if key in m]
        found = [(e.step, e.value) for e in events.Scalars(key)]
        assert len(found) > 0 and found == [(step, pytest.approx(value)) for step, value in expected]


def test_tensorboard_that_is_missing_is_an_error_at_once(profiled_config, launch, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *_: None)
    result = launch(profiled_config(train={"tensorboard": True}))
    assert result.returncode == 1
    assert "the package tensorboard is not installed; pip install tensorboard" in result.stderr
