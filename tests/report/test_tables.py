"""Tables of a run."""

from __future__ import annotations

import pytest

from fastft.report.table import before_after_rows


@pytest.mark.parametrize(("recovery", "shown"), [(0.5, ["0.00", "0.50", "1.00"]), (None, ["-", "-", "-"])])
def test_without_a_gain_there_are_no_shares_of_it(recovery, shown):
    summary = {"nll_no_context": 5.0, "nll_student": 4.0, "nll_teacher": 3.0, "recovery": recovery}
    heads, rows = before_after_rows({**summary, "control_recovery": None})
    assert [row[heads.index("recovery")] for row in rows] == shown
