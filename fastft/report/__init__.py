"""What a run leaves for people to read: tables and report.html."""

from fastft.report.html import write_report, write_sets_report
from fastft.report.table import before_after, sets_table

__all__ = ["before_after", "sets_table", "write_report", "write_sets_report"]
