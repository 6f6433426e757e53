"""Findings as lines of a terminal, and as the text of a bug report that names no person."""

from __future__ import annotations

import pathlib
import platform
import textwrap
from collections.abc import Iterable

from jaxmoe.doctor.diagnosis import Finding
from jaxmoe.doctor.facts import Facts
from jaxmoe.status.text_columns import WIDTH, fit

_HEAD = 20  # cells of a line before its text


def finding_lines(findings: Iterable[Finding]) -> list[str]:
  """Returns the findings as lines of at most 80 cells, and a last line that counts them."""
  findings, lines = list(findings), []
  for finding in findings:
    text = f"{finding.level:<8} {finding.name:<10} {finding.text}"
    lines += _wrapped(text)
    if finding.cure and finding.level != "ok":
      lines += _wrapped(f"{'':<{_HEAD - 1}} fix: {finding.cure}")
  counts = {level: sum(f.level == level for f in findings) for level in ("problem", "warning")}
  ends = [f"{count} {level}{'s' * (count != 1)}" for level, count in counts.items() if count]
  return [*lines, ", ".join(ends) or "all is well"]


def bug_report(lines: Iterable[str], facts: Facts) -> str:
  """Returns the text of a bug report: the lines, the system, and how the trial run failed."""
  parts = ["jaxmoe doctor", f"system: {platform.platform()}", "", *lines]
  if facts.trial.errors:
    parts += ["", "The trial run's last words:", "", *facts.trial.errors.splitlines()[-60:]]
  return without_home("\n".join(parts)) + "\n"


def without_home(text: str) -> str:
  """Returns text with `~` for the home directory, which may name a person."""
  home = str(pathlib.Path.home()).rstrip("/")
  return text.replace(home, "~") if home else text


def _wrapped(text: str) -> list[str]:
  indent = " " * _HEAD
  lines = textwrap.wrap(text, WIDTH, subsequent_indent=indent, break_on_hyphens=False)
  return [fit(line) for line in lines]
