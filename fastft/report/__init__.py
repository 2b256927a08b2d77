"""What runs leave for people to read.

html.py, plot.py, table.py        of one run: report.html, tables in the terminal
trace.py, floors.py, advice.py    of its profile: what a trace says, the least that kernels take, what to change first
profile.py, curves.py, plots.py   the page's sections of time, memory and training
page.py                           HTML that needs nothing from outside
rows.py, compare.py, stats.py     of several: their rows, grouped into settings, with intervals and paired differences
figures.py, paper.py              `fastft report`: pictures, tables and one page
"""

from fastft.report.html import write_report, write_sets_report
from fastft.report.table import before_after, sets_table

__all__ = ["before_after", "sets_table", "write_report", "write_sets_report"]
