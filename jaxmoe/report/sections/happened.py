"""What happened to a run: its events, but for the checkpoints that went well."""

from __future__ import annotations

import collections
import json
import math
from typing import Any

from jaxmoe.report.html import Html, join, table, tag
from jaxmoe.report.numbers import seconds
from jaxmoe.report.run import Run, unix_s

MAX_ROWS, MAX_CHARACTERS = 200, 400
COUNTED = ("checkpoint",)
LONG = {"start": ("data", "recipe"), "done": ("data",), "stopped": ("data",)}


def happened(run: Run) -> Html | None:
  """Returns how many events of each kind there were, and the first of them in order."""
  if not run.events:
    return None
  counts = collections.Counter(event["event"] for event in run.events)
  shown = [event for event in run.events if event["event"] not in COUNTED]
  times = [unix_s(event) for event in run.events]
  first = min((time for time in times if math.isfinite(time)), default=math.nan)
  rows = [[_when(event, first), event["event"], _details(event)] for event in shown[:MAX_ROWS]]
  told = ", ".join(f"{kind} {count}" for kind, count in counts.most_common())
  left = len(shown) - MAX_ROWS
  return join(
    tag("p", f"Counts: {told}."), table(["after", "event", "details"], rows, text_columns=3),
    tag("p", f"{left} more are in events.jsonl.") if left > 0 else None,
  )  # fmt: skip


def _when(event: dict[str, Any], first: float) -> str:
  after = unix_s(event) - first
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
