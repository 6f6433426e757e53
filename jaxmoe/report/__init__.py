"""report.html, the report of a run, made from its files alone, or of several runs together."""

from jaxmoe.report.report_page import write_comparison, write_report
from jaxmoe.report.run_data import read_run_data

__all__ = ["read_run_data", "write_comparison", "write_report"]
