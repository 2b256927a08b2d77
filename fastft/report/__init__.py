"""What runs leave for people to read.

html.py, table.py                 of one run: report.html, tables in the terminal
trace.py, floors.py, advice.py    of its profile: what a trace says, the least that kernels take, what to change first
profile.py, curves.py, plots.py   the page's sections of time, memory and training
page.py                           HTML that needs nothing from outside
formats.py                        a table in Markdown, LaTeX, CSV and HTML
rows.py, compare.py, stats.py     of several: their rows, grouped into settings, with intervals and paired differences
comparison_tables.py, figures.py  `fastft report`: its tables and pictures
paper.py                          and the folder that it leaves
"""

from fastft.report.html import write_report, write_sets_report
from fastft.report.table import before_after, sets_table

__all__ = ["before_after", "sets_table", "write_report", "write_sets_report"]
