"""What a run leaves for people to read: tables and report.html."""

from fastft.report.html import write_report
from fastft.report.table import before_after

__all__ = ["before_after", "write_report"]
