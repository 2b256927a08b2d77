"""What pages are made of: names stay text, numbers have three digits, links lead to headings."""

from __future__ import annotations

import pytest

from fastft.report.advice import ms, three_digits
from fastft.report.page import Bar, Tile, bars, contents, legend, mark, stacked, table, tiles


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [(0, "0 ms"), (1.5e-5, "15.0 µs"), (2.774e-3, "2.77 ms"), (0.594, "594 ms"), (1.891, "1.89 s"), (321.4, "321 s")],
)
def test_seconds_are_read_at_a_glance(seconds, shown):
    assert ms(seconds) == shown


@pytest.mark.parametrize(("value", "shown"), [(0.0984, "0.098"), (0.1912, "0.191"), (21.83, "21.8"), (2250, "2,250")])
def test_numbers_have_three_digits(value, shown):
    assert three_digits(value) == shown


def test_names_are_text():
    rows, name = [Bar("<x>", 1.0, ("<x>",))], "<x>"
    parts = {
        table([name], [[name]]): 2,
        bars([name, name], rows, 1.0, ms): 4,
        stacked(rows, ms): 1,
        tiles([Tile(name, name, name)]): 3,
        legend([("red", name)]): 1,
    }
    for part, count in parts.items():
        assert part.count("&lt;x&gt;") == count and name not in part
    assert "&lt;" not in table(["mark"], [[mark("●", "red")]])


def test_a_bar_is_as_long_as_its_share_of_the_longest():
    drawn = bars(["name"], [Bar("a", 3.0, mark=6.0), Bar("b", 1.5, color="red")], 4.5, ms)
    assert "width:50.0%;background:var(--bar)" in drawn and "left:100.0%" in drawn  # the mark is longest
    assert "width:25.0%;background:red" in drawn and "33.3 %" in drawn


def test_a_narrow_screen_may_leave_a_column_out():
    assert table(["a", "b"], [["1", "2"]], extra=("b",)).count("class=extra") == 2


def test_contents_link_to_headings():
    assert contents(["<h2 id=time>Time</h2>", "<h2>None</h2>"]) == '<nav><a href="#time">Time</a></nav>'
