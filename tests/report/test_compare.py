"""The comparison of runs: its statistics on cases whose answer is known, its tables and pictures on made-up runs."""

from __future__ import annotations

import csv
import json
import math
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from fastft.cli import main
from fastft.errors import DataError
from fastft.report.compare import compare
from fastft.report.comparison_tables import accuracy_table, differences
from fastft.report.figures import draw
from fastft.report.formats import BEST, TIED, Table, latex, markdown
from fastft.report.rows import read
from fastft.report.stats import bootstrap, confidence_ellipse, holm, resample_examples
from tests.engine.test_icl_run import ok, write

EXAMPLES = 200


def write_sweep(folder: Path, runs: list[dict], *, predictions: bool = True) -> Path:
    """A sweep's folder: runs are rows with `accuracies`, set -> share of right answers, and what else differs."""
    rng = np.random.default_rng(0)
    rows = []
    for i, run in enumerate(runs):
        own = {
            "run": f"run{i}",
            "folder": f"run{i}-0123456789",
            "task": "rte",
            "model": "tiny",
            "split": "validation",
            "num_shots": 16,
            "data_seed": run["seed"],
            **{key: value for key, value in run.items() if key != "accuracies"},
        }
        lines = []
        for name, accuracy in run["accuracies"].items():
            right = rng.permutation(EXAMPLES) < round(accuracy * EXAMPLES)
            lines += [
                {"set": name, "index": j, "label": j % 2, "predicted": j % 2 if r else 1 - j % 2}
                for j, r in enumerate(right)
            ]
            found = {"set": name, "accuracy": right.mean(), "majority": 0.5, "examples": EXAMPLES}
            cost = {"seconds": 10 * (i + 1), "trained_parameters": 0 if run["method"] == "icl" else 1000}
            rows.append({**own, **found, **cost, "peak_memory_bytes": 2**30, "inference_tokens_per_query": 70.5})
        if predictions:
            path = folder / "runs" / own["folder"] / "predictions.jsonl"
            path.parent.mkdir(parents=True)
            path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    folder.mkdir(exist_ok=True)
    with open(folder / "results.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, list(dict.fromkeys(key for row in rows for key in row)))
        writer.writeheader()
        writer.writerows(rows)
    return folder


def three_methods(*, seeds: int = 5, **more) -> list[dict]:
    """pbft is 20 points better than ft, and icl within one of pbft."""
    levels = {("icl", ""): 0.795, ("pbft", "lora"): 0.80, ("ft", "lora"): 0.60}
    return [
        {
            "method": method,
            "peft": peft,
            "seed": seed,
            "accuracies": {"rte": level + 0.005 * (seed - 2), "hans": level - 0.1 + 0.005 * (seed % 3)},
            **more,
        }
        for (method, peft), level in levels.items()
        for seed in range(seeds)
    ]


def test_over_seeds_alone_the_bootstrap_has_the_unbiased_variance_of_a_mean():
    values = np.random.default_rng(0).normal(0.7, 0.05, 8)
    estimate = bootstrap(values, np.repeat(values[:, None], 200_000, 1))
    error = values.std(ddof=1) / 8**0.5
    assert estimate.mean == pytest.approx(values.mean())
    assert (estimate.high - estimate.low) / 2 == pytest.approx(
        1.96 * error, rel=0.05
    )  # percentiles of 8 are not normal
    assert bootstrap(values[:1], values[:1, None]).low is None


def test_over_examples_alone_the_bootstrap_is_binomial():
    right = np.arange(500) < 350
    resampled = resample_examples(np.array([right, right]))
    assert np.array_equal(resampled[0], resampled[1])  # the same draws for all runs
    estimate = bootstrap(np.array([0.7, 0.7]), resampled)
    half = 1.96 * (2 * 0.7 * 0.3 / 500) ** 0.5  # two seeds widen by the root of 2
    assert (estimate.low, estimate.high) == pytest.approx((0.7 - half, 0.7 + half), abs=0.006)


@pytest.mark.parametrize(("seeds", "examples_error"), [(4, 0.0), (10, 0.0), (3, 1.0), (5, 2.0)])
def test_the_ellipse_covers_the_true_mean(seeds, examples_error):
    """Of correlated normal figures whose common error, of the examples, is known by its resamples."""
    rng = np.random.default_rng(0)
    covered = 0
    for _ in range(trials := 1500):
        common = examples_error * rng.normal(size=2)
        points = rng.normal(size=(seeds, 2)) @ np.array([[1.0, 0.6], [0.0, 0.8]]) + common
        resampled = points[:, :, None] + examples_error * rng.normal(size=(1, 2, 300))
        boundary = confidence_ellipse(points, resampled if examples_error else None)
        angles = np.unwrap(np.arctan2(boundary[:, 1], boundary[:, 0]))  # the origin is inside if it is gone around
        covered += abs(angles[-1] - angles[0]) > math.pi
    assert covered / trials == pytest.approx(0.95, abs=0.02)


def test_no_ellipse_where_it_would_say_nothing():
    points = np.random.default_rng(0).normal(size=(4, 2))
    assert confidence_ellipse(points[:2]) is None and confidence_ellipse(points[:3]) is None
    assert confidence_ellipse(points).shape == (100, 2)


def test_holm():
    assert holm([0.01, None, 0.04, 0.03]) == pytest.approx([0.03, None, 0.06, 0.06])
    assert holm([0.6, 0.9]) == [1.0, 1.0] and holm([None]) == [None]


def test_differences_are_paired_by_seed_and_example(tmp_path):
    found = {
        (d.set, d.better, d.worse): d for d in differences(compare(read([write_sweep(tmp_path, three_methods())])))
    }
    clear = found["rte", "PBFT LoRA", "FT LoRA"]
    assert clear.by.mean == pytest.approx(0.2) and clear.by.low > 0.1 and clear.adjusted < 0.01
    close = found["rte", "PBFT LoRA", "ICL"]
    assert close.by.low < 0 < close.by.high and close.by.p > 0.2
    assert len(found) == 6  # three pairs on two sets


@pytest.mark.parametrize("same", [True, False])
def test_the_same_examples_are_drawn_alike_and_others_apart(tmp_path, same):
    """Two seeds that are right in the same places, of the same examples or of others, whose labels differ."""
    folder = write_sweep(tmp_path, [{"method": "icl", "seed": seed, "accuracies": {"rte": 0.7}} for seed in range(2)])
    one, two = (folder / "runs" / f"run{i}-0123456789" / "predictions.jsonl" for i in range(2))
    rows = [json.loads(line) for line in one.read_text().splitlines()]
    for row in rows if not same else []:
        row |= {"label": 1 - row["label"], "predicted": 1 - row["predicted"]}
    two.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (scores,) = next(iter(compare(read([folder])).scores.values()))["rte"].values()
    correlation = np.corrcoef(*scores.resampled.values())[0, 1]
    assert correlation == pytest.approx(1.0 if same else 0.0, abs=0.06)


def test_one_seed_says_nothing_of_others(tmp_path):
    (pair, *_) = differences(compare(read([write_sweep(tmp_path, three_methods(seeds=1))])))
    assert pair.by.mean > 0 and pair.by.low is None and pair.by.p is None and pair.adjusted is None


def test_without_predictions_intervals_are_over_seeds_alone(tmp_path):
    rows = write_sweep(tmp_path / "a", three_methods()), write_sweep(tmp_path / "b", three_methods(), predictions=False)
    wide, narrow = (next(iter(compare(read([folder])).scores.values()))["rte"]["FT LoRA"].estimate for folder in rows)
    assert wide.mean == pytest.approx(narrow.mean)
    assert (narrow.high - narrow.low) < 0.02 < 0.05 < (wide.high - wide.low)


def test_tables_say_the_same_in_every_language(tmp_path):
    table = accuracy_table(compare(read([write_sweep(tmp_path, three_methods())])))
    lines = [[cell.strip() for cell in line.strip("| ").split("|")] for line in markdown(table).splitlines()[2:]]
    assert lines[0] == ["method", "seeds", "rte", "rte → hans"] == list(table.columns)
    found = {line[0]: line[1:] for line in lines[2:]}
    assert re.fullmatch(r"\*\*80\.0 \[7\d, 8\d\]\*\*", found["PBFT LoRA"][1])
    assert found["ICL"][1].startswith("79.5 [") and found["ICL"][1].endswith(" †")
    assert re.fullmatch(r"60\.0 \[5\d, 6\d\]", found["FT LoRA"][1]) and found["FT LoRA"][0] == "5"
    records = {(r["method"], r["set"]): r for r in table.records}
    assert records["PBFT LoRA", "rte"]["accuracy"] == pytest.approx(0.8)
    assert [records[method, "rte"]["mark"] for method in ("PBFT LoRA", "ICL", "FT LoRA")] == [BEST, TIED, None]
    tex = latex(table)
    assert r"rte $\rightarrow$ hans \\" in tex and r"\textbf{80.0 [" in tex and r"95 \%" in tex
    assert all(line.count(" & ") == 3 for line in tex.splitlines() if line.endswith(r"\\"))


def test_latex_and_markdown_escape_what_they_would_read():
    table = Table("50 % of $x_1$", {"a|b": "l", "c": "r"}, [[r"x\y~{z}^2 & #1", "a | b"]], [])
    tex = latex(table)
    assert r"\caption{50 \% of \$x\_1\$}" in tex
    assert r"x\textbackslash{}y\textasciitilde{}\{z\}\textasciicircum{}2 \& \#1 & a | b \\" in tex
    assert r"a \| b |" in markdown(table)


@pytest.mark.skipif(shutil.which("pdflatex") is None, reason="LaTeX is not installed")
@pytest.mark.parametrize("rows", [3, 200])
def test_latex_compiles(tmp_path, rows):
    cells = [[r"x\y~{z}^2 & #1_$%", f"{i} ± 2 → †"] for i in range(rows)]
    table = Table("50 % of $x_1$ ≥ 2", {"a|b_c": "l", "c & d": "r"}, cells, [])
    packages = re.match(r"% needs (.*)", latex(table))[1]
    text = rf"\documentclass{{article}}{packages}\begin{{document}}{latex(table)}\end{{document}}"
    (tmp_path / "table.tex").write_text(text, encoding="utf-8")
    command = ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "table.tex"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "too large" not in done.stdout, done.stdout[-2000:]
    pages = int(re.search(r"Output written on table.pdf \((\d+) page", done.stdout)[1])
    assert pages == 1 if rows == 3 else pages > 1


def test_what_differs_within_a_method_is_in_its_name(tmp_path):
    runs = [
        {"method": "pbft", "peft": "lora", "seed": 0, "train.lr": lr, "train.steps": 9, "accuracies": {"rte": 0.5}}
        for lr in (0.1, 0.2)
    ] + [{"method": "ft", "peft": "head", "seed": 0, "train.lr": 0.3, "train.steps": 7, "accuracies": {"rte": 0.5}}]
    assert compare(read([write_sweep(tmp_path, runs)])).settings == ["PBFT LoRA lr=0.1", "PBFT LoRA lr=0.2", "FT head"]


def test_pictures_have_a_panel_for_each_pair_and_a_name_for_each_setting(tmp_path):
    runs = [run for shots in (4, 16) for run in three_methods(num_shots=shots)]
    runs += three_methods(task="qqp", num_shots=4)[:5]  # in-context learning alone
    figures = draw(compare(read([write_sweep(tmp_path, runs)])))
    assert list(figures) == ["scatter", "shots", "cost"]
    scatter = figures["scatter"]
    assert [(ax.get_title(), ax.get_xlabel(), ax.get_ylabel()) for ax in scatter.axes[:2]] == [
        ("4 shots", "in domain: rte (%)", "out of domain: hans (%)"),
        ("16 shots", "in domain: rte (%)", "out of domain: hans (%)"),
    ]
    assert [text.get_text() for text in scatter.legends[0].get_texts()] == [
        *("ICL", "PBFT LoRA", "FT LoRA"),
        "majority label",
    ]
    for ax in scatter.axes:
        assert ax.get_xlim() == ax.get_ylim() == scatter.axes[0].get_xlim() and ax.get_aspect() == 1
    shown = [
        line.get_xydata() for line in scatter.axes[0].lines if line.get_markersize() > 4 and len(line.get_xydata()) == 1
    ]
    assert np.concatenate(shown)[:, 0] == pytest.approx([79.5, 80.0, 60.0])
    assert len(scatter.axes[0].patches) == 6  # three ellipses, filled and outlined
    bars = figures["shots"].axes[0]
    assert [text.get_text() for text in bars.get_xticklabels()] == ["4", "16"] and len(bars.collections) == 3
    assert [ax.get_xlabel() for ax in figures["cost"].axes[-4:]] == [
        *("seconds", "peak memory, GiB", "trained parameters", "tokens per query"),
    ]


class Page(HTMLParser):
    """Counts tags and keeps what they would load."""

    def __init__(self, text: str):
        super().__init__()
        self.count, self.loaded = {}, []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.count[tag] = self.count.get(tag, 0) + 1
        self.loaded += [v for k, v in attributes if k in ("src", "href", "xlink:href") and not v.startswith("#")]


def test_the_command_writes_everything_into_one_folder(tmp_path, capsys):
    runs = three_methods()
    del runs[-1]["accuracies"]["hans"], runs[-2]["accuracies"]["hans"]
    runs = [run for run in runs if run["method"] != "ft" or "hans" not in run["accuracies"]]
    folder = write_sweep(tmp_path / "sweep", runs)
    assert main(["report", str(folder)]) == 0
    out = folder / "comparison"
    pictures = [f"{name}.{kind}" for name in ("scatter", "cost") for kind in ("svg", "pdf", "png")]
    tables = [f"{name}.{kind}" for name in ("accuracy", "differences", "cost") for kind in ("md", "tex", "csv")]
    assert sorted(p.name for p in out.iterdir()) == sorted([*pictures, *tables, "report.html"])
    missing = "FT LoRA has no finished run on hans, trained on rte"
    assert missing in capsys.readouterr().out and missing in (out / "report.html").read_text()
    page = Page((out / "report.html").read_text())
    assert page.count["svg"] == 2 and page.count["table"] == 3 and not page.loaded
    with open(out / "accuracy.csv", newline="") as file:
        assert {(row["method"], row["set"]): row["seeds"] for row in csv.DictReader(file)} == {
            **{(method, name): "5" for method in ("ICL", "PBFT LoRA") for name in ("rte", "hans")},
            ("FT LoRA", "rte"): "2",
        }
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    assert main(["report", str(folder), "--out", str(tmp_path / "again")]) == 0
    assert before == {path.name: path.read_bytes() for path in (tmp_path / "again").iterdir()}


def test_several_models_have_panels_and_rows_of_their_own(tmp_path):
    folders = [write_sweep(tmp_path / name, three_methods(model=name, seeds=2)) for name in ("small", "large")]
    comparison = compare(read(folders))
    assert [ax.get_title() for ax in draw(comparison)["scatter"].axes] == ["small", "large"]
    table = accuracy_table(comparison)
    assert list(table.columns)[:2] == ["model", "method"] and len(table.rows) == 6


def test_what_cannot_be_compared_is_refused(tmp_path, capsys):
    empty, folder = tmp_path / "empty", write_sweep(tmp_path / "a", three_methods())
    assert main(["report", str(empty)]) == 1 and "nothing in it is finished" in capsys.readouterr().err
    assert main(["report", str(folder), str(empty)]) == 1 and "--out DIR" in capsys.readouterr().err
    with pytest.raises(DataError, match=r"run0 and run0: are both ICL on rte with seed 0"):
        compare(read([folder, folder]))
    documents = write_sweep(tmp_path / "documents", [{"method": "distill", "seed": 0, "accuracies": {"rte": 0.5}}])
    text = (documents / "results.csv").read_text().replace(",0.5,0.5,", ",,,")
    (documents / "results.csv").write_text(text)
    with pytest.raises(DataError, match="no run here evaluates a classification task"):
        compare(read([documents]))
    path = folder / "runs" / "run3-0123456789" / "predictions.jsonl"
    path.write_text(path.read_text().replace('"label": 1, "predicted": 1', '"label": 0, "predicted": 0', 1))
    with pytest.raises(DataError, match=r"rte: run3 and run8 were asked different examples"):
        compare(read([folder]))
    other = write_sweep(tmp_path / "b", three_methods())
    path = other / "runs" / "run3-0123456789" / "predictions.jsonl"
    path.write_text(path.read_text().replace('"label": 0, "predicted": 0', '"label": 0, "predicted": 1', 1))
    with pytest.raises(DataError, match=r"0\.7950 of rte is right, and the table says 0\.8000"):
        compare(read([other]))
    assert not (folder / "comparison").exists()


def test_runs_by_their_folders_are_compared_as_in_a_sweep(tmp_path, tiny, launch):
    """Real ones; their figures are those of their summaries, and what differs in their configs is in their names."""
    write(tmp_path / "rte", "train", "sentence1", "sentence2", 20)
    write(tmp_path / "rte", "validation", "sentence1", "sentence2", 11)
    write(tmp_path / "hans", "validation", "premise", "hypothesis", 6, heuristic="overlap", subcase="swap")
    raw = {
        "method": "icl",
        "model": {"name_or_path": str(tiny("llama")), "dtype": "float32"},
        "data": {"task": "rte", "ood": ["hans"], "root": str(tmp_path)},
        "deepspeed": {"zero_stage": 0, "threads_per_rank": 1},
    }
    folders = []
    for pattern, seed in (("minimal", 0), ("minimal", 1), ("eval_harness", 0)):
        folders.append(tmp_path / f"{pattern}{seed}")
        own = {"output_dir": str(folders[-1]), "seed": seed, "icl": {"num_shots": 2, "balanced": True}}
        ok(launch({**raw, **own, "data": {**raw["data"], "pattern": pattern}}))
    comparison = compare(read(folders))
    assert comparison.settings == ["ICL pattern=minimal", "ICL pattern=eval_harness"]
    ((group, sets),) = comparison.scores.items()
    assert (group.task, group.num_shots, list(sets)) == ("rte", 2, ["rte", "hans"])
    summaries = [json.loads((folder / "summary.json").read_text()) for folder in folders]
    for name, settings in sets.items():
        found = settings["ICL pattern=minimal"].accuracy
        assert found == pytest.approx([summary["sets"][name]["accuracy"] for summary in summaries[:2]])
    assert main(["report", *map(str, folders), "--out", str(tmp_path / "out")]) == 0
