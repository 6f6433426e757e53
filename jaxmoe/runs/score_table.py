"""Scores of domains as a table, beside those of compressors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.table import Table


def score_table(result: Mapping[str, Any], bits: str = "held-out bits") -> Table:
  """Returns the scores as a table: a row a domain, the model first."""
  shown = Table(title=f"{bits} per byte at step {result['step']}")
  columns = ["domain", "model", *result["compressors"]]
  for column in columns:
    shown.add_column(column, justify="left" if column == "domain" else "right")
  for domain, of_domain in result["domains"].items():
    scores = [of.get(domain) for of in result["compressors"].values()]
    others = ["-" if score is None else f"{score:.3f}" for score in scores]
    shown.add_row(domain, "-" if of_domain is None else f"{of_domain:.3f}", *others)
  return shown
