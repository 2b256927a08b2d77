"""Whole runs whose processes encode contexts together (model.sequence_parallel): the numbers of one process."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.conftest import losses
from tests.engine.test_icl_run import figures, icl_config  # noqa: F401 (a fixture)
from tests.engine.test_run import ok, summary_of

FIGURES = ("nll_no_context", "nll_teacher", "nll_student", "control_nll_student", "f1_teacher", "f1_student")


@pytest.mark.parametrize(
    ("family", "model", "deepspeed"),
    [
        ("llama", {}, {"zero_stage": 0}),
        ("opt", {"prefix": "int8"}, {"zero_stage": 3}),
        ("llama", {"layers": "host", "quantization": "nf4"}, {"zero_stage": 3}),
    ],
)
def test_losses_and_figures_are_those_of_one_process(base_config, launch, tmp_path, family, model, deepspeed):
    """Two documents, one of them in several windows, questions that the teacher writes, answers, training."""
    raw = base_config(
        family,
        data={"documents": [0, 1], "window": {"tokens": 40, "overlap": 8}},
        train={"steps": 6, "batch_size": 5},
        evaluate={"batch_size": 2},
        deepspeed=deepspeed,
    )
    raw["model"] |= model
    one = {**raw, "output_dir": str(tmp_path / "one")}
    ok(launch(one))
    two = {**raw, "output_dir": str(tmp_path / "two"), "cache_dir": str(tmp_path / "cache-two")}
    two["model"] = {**raw["model"], "sequence_parallel": "ulysses"}
    shared = launch(two, processes=2)
    ok(shared)
    assert ", contexts shared (Ulysses)" in shared.stdout
    assert f"({model.get('prefix', 'device')} on each of 2 processes)" in shared.stdout
    assert "plan       peak" in shared.stdout
    found, expected = (torch.tensor(losses(Path(run["output_dir"]))) for run in (two, one))
    assert len(found) == 6
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=0)
    for name in FIGURES:
        assert summary_of(two)[name] == pytest.approx(summary_of(one)[name], rel=1e-4), name
    # The results are those without it to rounding, so the targets are too, and one process finds them.
    again = launch({**one, "output_dir": str(tmp_path / "again"), "cache_dir": two["cache_dir"]})
    assert "found in" in again.stdout and "targets/s" not in again.stdout


def test_in_context_learning(icl_config, launch, tmp_path):  # noqa: F811
    found = []
    for processes, how in ((1, "none"), (2, "ulysses")):
        raw = icl_config(output_dir=str(tmp_path / how), deepspeed={"zero_stage": 3, "threads_per_rank": 1})
        raw["model"]["sequence_parallel"] = how
        ran = launch(raw, processes=processes)
        ok(ran)
        [prompt] = [line for line in ran.stdout.splitlines() if line.startswith("prompt")]
        found.append((figures(raw["output_dir"]), float(prompt.rsplit(":", 1)[1].split()[0])))
    ((one, one_rows), one_mib), ((two, two_rows), two_mib) = found
    assert two["nll"] == pytest.approx(one["nll"], rel=1e-5)
    for row, expected in zip(two_rows, one_rows, strict=True):
        assert row["log_probs"] == pytest.approx(expected["log_probs"], rel=1e-4)
    assert two_mib == pytest.approx(one_mib / 2, abs=0.1)


def test_one_process_says_that_it_changes_nothing(base_config, launch):
    raw = base_config(model={"sequence_parallel": "ulysses"}, evaluate={"answers": False}, train={"steps": 1})
    alone = launch(raw)
    ok(alone)
    assert "sequence_parallel=ulysses changes nothing: there is one process" in alone.stdout
    assert "contexts shared" not in alone.stdout


def test_more_processes_than_key_value_heads_are_refused(base_config, launch):
    raw = base_config(model={"sequence_parallel": "ulysses"})
    refused = launch(raw, processes=3)
    assert refused.returncode != 0 and "Traceback" not in refused.stderr
    assert "the model has 2 for 3 processes; use up to 2 processes" in refused.stdout + refused.stderr
