"""The config of a run, how it differs from its recipe, and where it ran."""

from __future__ import annotations

import json
from typing import Any

from jaxmoe.report.html import Html, fold, join, table, tag
from jaxmoe.report.run_data import RunData

ABSENT = "(absent)"


def run_config(run: RunData) -> Html | None:
  """Returns the differences from the recipe, the machine, and the whole config to open."""
  process = run.event("process")
  machine = ", ".join(
    f"{name} {process[name]}" for name in ("devices", "jax", "python", "host") if name in process
  )
  kernels = _kernels(run)
  if run.config is None and not machine and kernels is None:
    return None
  text = json.dumps(run.config, indent=2, ensure_ascii=False)
  return join(
    _changes(run), tag("p", f"Ran on {machine}.") if machine else None, kernels,
    fold("The whole config (config.json)", tag("pre", text)) if run.config is not None else None,
  )  # fmt: skip


def _changes(run: RunData) -> Html:
  origin = run.event("start").get("recipe")
  if not isinstance(origin, dict):
    return tag("p", "The events of this run do not name its recipe.")
  name, changes = tag("code", origin.get("name", "?")), origin.get("changes")
  if not isinstance(changes, dict):
    return tag("p", "From the recipe ", name, "; its differences are not known.")
  if not changes:
    return tag("p", "The recipe ", name, " as it stands.")
  rows = [[path, *(pair if _is_pair(pair) else ("?", pair))] for path, pair in changes.items()]
  return join(tag("p", "The recipe ", name, " with these differences:"),
              table(["field", "recipe", "this run"], rows))  # fmt: skip


def _kernels(run: RunData) -> Html | None:
  chosen = run.event("kernels").get("chosen")
  if not isinstance(chosen, list):
    return None
  fields = ("operation", "backend", "why")
  rows = [[one.get(name, "?") for name in fields] for one in chosen if isinstance(one, dict)]
  return table(list(fields), rows, text_columns=3)


def _is_pair(value: Any) -> bool:
  return isinstance(value, list) and len(value) == 2


def flat(plain: Any, path: str = "") -> dict[str, Any]:
  """Returns {dotted path: value} of nested plain values."""
  if isinstance(plain, list):
    plain = {str(i): value for i, value in enumerate(plain)}
  if not isinstance(plain, dict) or not plain:
    return {path: plain}
  found: dict[str, Any] = {}
  for name, value in plain.items():
    found |= flat(value, f"{path}.{name}" if path else str(name))
  return found
