"""The events of a run, but for the checkpoints that went well."""

from __future__ import annotations

import collections
import json
import math
from collections.abc import Iterator
from typing import Any

from jaxmoe.report.html import Html, join, table, tag
from jaxmoe.report.number_format import seconds
from jaxmoe.report.run_data import RunData, unix_s

MAX_ROWS, MAX_CHARACTERS = 200, 400
COUNTED = ("checkpoint",)
LONG = {"start": ("data", "recipe"), "done": ("data",), "stopped": ("data",)}


def event_table(run: RunData) -> Html | None:
  """Returns how many events of each kind there were, and the first of them in order."""
  if not run.events:
    return None
  counts = collections.Counter(event["event"] for event in run.events)
  shown = [event for event in run.events if event["event"] not in COUNTED]
  after = {id(event): s for event, s in zip(run.events, _after(run.events))}
  rows = [[_when(after[id(event)]), event["event"], _details(event)] for event in shown[:MAX_ROWS]]
  counted = ", ".join(f"{kind} {count}" for kind, count in counts.most_common())
  left = len(shown) - MAX_ROWS
  return join(
    tag("p", f"Counts: {counted}."), table(["after", "event", "details"], rows, text_columns=3),
    tag("p", f"{left} more are in events.jsonl.") if left > 0 else None,
  )  # fmt: skip


def _after(events: list[dict[str, Any]]) -> Iterator[float]:
  """Yields how long after the first each event was; a clock that is set back adds nothing."""
  passed, before = 0.0, math.nan
  for event in events:
    now = unix_s(event)
    if math.isfinite(now):
      passed += max(now - before, 0.0) if math.isfinite(before) else 0.0
      before = now
    yield passed if math.isfinite(now) else math.nan


def _when(after: float) -> str:
  return seconds(after) if math.isfinite(after) else "?"


def _details(event: dict[str, Any]) -> str:
  hidden = ("event", "time", *LONG.get(event["event"], ()))
  fields = {name: value for name, value in event.items() if name not in hidden}
  clock = event["time"]
  fields |= {name: clock[name] for name in ("lost_s", "waited_s") if name in clock}
  text = ", ".join(f"{name} {_short(value)}" for name, value in fields.items())
  return text[:MAX_CHARACTERS] + (" …" if text[MAX_CHARACTERS:] else "")


def _short(value: Any) -> str:
  return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
