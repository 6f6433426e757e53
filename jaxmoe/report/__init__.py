"""report.html: what a run did, made from its files alone, or several runs beside each other."""

from jaxmoe.report.page import write_comparison, write_report
from jaxmoe.report.run import read_run

__all__ = ["read_run", "write_comparison", "write_report"]
