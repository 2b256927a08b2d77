"""The tables of a comparison: accuracy, what it costs, and which setting is better by how much."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

from fastft.report.compare import COSTS, Comparison, Group, Scores
from fastft.report.formats import BEST, TIED, Table
from fastft.report.stats import ALPHA, Estimate, holm


@dataclass(frozen=True)
class Difference:
    """`better` is more accurate than `worse` on a set by `by`; adjusted: its p among all pairs of the group and set."""

    group: Group
    set: str
    better: str
    worse: str
    by: Estimate
    adjusted: float | None


def differences(comparison: Comparison) -> list[Difference]:
    """Every pair of settings of a group on a set that have a seed in common."""
    found = []
    for group, sets in comparison.scores.items():
        for name, settings in sets.items():
            pairs = []
            for a, b in itertools.combinations(settings, 2):
                if settings[a].estimate.mean < settings[b].estimate.mean:
                    a, b = b, a
                by = settings[a].minus(settings[b])
                if by:
                    pairs.append((a, b, by))
            adjusted = holm([by.p for *_, by in pairs])
            found += [Difference(group, name, *pair, p) for pair, p in zip(pairs, adjusted, strict=True)]
    return found


def accuracy_table(comparison: Comparison) -> Table:
    """A row for each setting of a model and number of shots, a column for each task and set."""
    places = list(dict.fromkeys((group.task, name) for group, sets in comparison.scores.items() for name in sets))
    heads = [task if task == name else f"{task} → {name}" for task, name in places]
    leading, rows, records, marks = _leading(comparison), [], [], {}
    for (model, num_shots), setting in itertools.product(_blocks(comparison), comparison.settings):
        cells, counts = [], set()
        for column, (task, name) in enumerate(places, len(leading) + 2):
            group = Group(model, task, num_shots)
            settings = comparison.scores.get(group, {}).get(name, {})
            own = settings.get(setting)
            cells.append(_percent(own.estimate) if own else "")
            if own:
                counts.add(len(own.rows))
                mark = _marks(settings).get(setting)
                marks |= {(len(rows), column): mark} if mark else {}
                records.append(
                    {
                        **_about(group, name),
                        "method": setting,
                        "out_of_domain": name != task,
                        "seeds": len(own.rows),
                        "accuracy": own.estimate.mean,
                        "low": own.estimate.low,
                        "high": own.estimate.high,
                        "majority": own.mean("majority"),
                        "mark": mark,
                    }
                )
        if counts:
            seeds = "-".join(map(str, sorted({min(counts), max(counts)})))
            rows.append([*_values(leading, model, num_shots), setting, seeds, *cells])
    columns = {**dict.fromkeys(leading, "l"), "method": "l", "seeds": "r", **dict.fromkeys(heads, "r")}
    caption = (
        "Accuracy in percent: mean over seeds and 95 % interval of a bootstrap over seeds and examples, none of one "
        f"seed. A → B: trained on A, evaluated on B. Bold: the best{_each(leading)}; †: not shown to be worse "
        f"(p ≥ {ALPHA}, paired bootstrap, Holm's correction within the column)."
    )
    return Table(caption, columns, rows, records, marks)


def _marks(settings: dict[str, Scores]) -> dict[str, str]:
    """Which settings are the best on a set, and which are not shown to be worse than the first of those."""
    means = {setting: scores.estimate.mean for setting, scores in settings.items()}
    best = max(means, key=means.__getitem__)
    worse = [setting for setting in means if means[setting] < means[best]]
    by = [settings[best].minus(settings[setting]) for setting in worse]
    adjusted = holm([own.p if own else None for own in by])
    tied = {setting: TIED for setting, p in zip(worse, adjusted, strict=True) if p is not None and p >= ALPHA}
    return {setting: BEST for setting in means if setting not in worse} | tied


def cost_table(comparison: Comparison) -> Table:
    """A row for each task and setting; means over the seeds."""
    leading, rows, records = _leading(comparison), [], []
    for group, sets in comparison.scores.items():
        for setting, own in sets.get(group.task, {}).items():
            means = {key: own.mean(key) for key in COSTS}
            shown = ["" if v is None else _figure(v / COSTS[key].unit) for key, v in means.items()]
            rows.append([*_values(leading, group.model, group.num_shots), group.task, setting, *shown])
            records.append({**_about(group), "method": setting, "seeds": len(own.rows), **means})
    columns = dict.fromkeys([*leading, "task", "method"], "l") | {cost.name: "r" for cost in COSTS.values()}
    caption = "What a run costs, mean over seeds: seconds of the whole run, and tokens that a query is answered with."
    return Table(caption, columns, rows, records)


def difference_table(comparison: Comparison, found: list[Difference]) -> Table:
    """A row for each pair of settings on each set."""
    leading, rows, records = _leading(comparison), [], []
    for d in found:
        ps = ["" if p is None else f"{p:.3f}" for p in (d.by.p, d.adjusted)]
        where = [*_values(leading, d.group.model, d.group.num_shots), d.group.task, d.set]
        rows.append([*where, d.better, d.worse, _percent(d.by), *ps])
        numbers = {"difference": d.by.mean, "low": d.by.low, "high": d.by.high, "p": d.by.p, "p_holm": d.adjusted}
        records.append({**_about(d.group, d.set), "better": d.better, "worse": d.worse, **numbers})
    columns = dict.fromkeys([*leading, "task", "set", "better", "worse"], "l")
    columns |= dict.fromkeys(["points", "p", "p (Holm)"], "r")
    caption = (
        "By how many points of accuracy one method is better than another on the same seeds and examples: mean, 95 % "
        "interval and two-sided p of a paired bootstrap; Holm's p allows for all pairs on a set. Blank: only one seed "
        "in common."
    )
    return Table(caption, columns, rows, records)


def _blocks(comparison: Comparison) -> list[tuple[str, int]]:
    return list(dict.fromkeys((group.model, group.num_shots) for group in comparison.scores))


def _leading(comparison: Comparison) -> list[str]:
    """The columns in front of the method's: what else differs."""
    models, counts = zip(*_blocks(comparison), strict=True)
    return ["model"] * (len(set(models)) > 1) + ["shots"] * (len(set(counts)) > 1)


def _values(leading: list[str], model: str, num_shots: int) -> list[str]:
    return [{"model": model, "shots": str(num_shots)}[head] for head in leading]


def _each(leading: list[str]) -> str:
    return f" for each {' and number of '.join(leading)}" if leading else ""


def _about(group: Group, name: str | None = None) -> dict[str, Any]:
    about = {"model": group.model, "num_shots": group.num_shots, "task": group.task}
    return about | ({"set": name} if name else {})


def _percent(estimate: Estimate) -> str:
    """The ends of an interval in whole points: few seeds do not say more. All digits are in the CSV."""
    mean = f"{100 * estimate.mean:.1f}"
    return mean if estimate.low is None else f"{mean} [{100 * estimate.low:.0f}, {100 * estimate.high:.0f}]"


def _figure(value: float) -> str:
    """Three digits, and all in front of the point."""
    return f"{value:,.0f}" if value == 0 or value >= 100 else f"{value:.3g}"
