"""The text a run was trained on and scored on, and records that could not be read."""

from __future__ import annotations

from typing import Any

from jaxmoe.report.html import Html, fold, join, table, tag
from jaxmoe.report.number_format import counted, finite
from jaxmoe.report.run_data import RunData

SIDES = ("train", "held_out")
MAX_PLACES = 200


def data_section(run: RunData) -> Html | None:
  """Returns the documents and bytes of each domain, and what was skipped and why."""
  data_fields = _plain(run.event("start").get("data"))
  sizes, skipped = _plain(data_fields.get("domains")), _plain(data_fields.get("skipped"))
  counts, broken = _plain(skipped.get("counts")), _plain(skipped.get("broken"))
  names = list(dict.fromkeys([*sizes, *counts, *broken]))
  if not names:
    return None
  rows = []
  for name in names:
    sides = [_plain(_plain(sizes.get(name)).get(side)) for side in SIDES]
    cells = [_whole(side.get(unit)) for side in sides for unit in ("documents", "bytes")]
    bad = sum(count for count in _plain(counts.get(name)).values() if type(count) is int)
    lost = _plain(broken.get(name)).get("bytes", 0)
    rows.append([name, *cells, _whole(bad), _whole(lost)])
  head = ["domain", "documents", "bytes", "held out: documents", "bytes", "bad records",
          "bytes lost, at least"]  # fmt: skip
  return join(table(head, rows), _why(counts, broken), _places(skipped.get("places")))


def _why(counts: dict[str, Any], broken: dict[str, Any]) -> Html:
  """Returns a sentence for each domain of which something was not read."""
  lines = [
    f"{name}: {why}, {_whole(count)} {_noun(count, 'record')}"
    for name, reasons in counts.items()
    for why, count in _plain(reasons).items()
  ]
  for name, lost in broken.items():
    files = _plain(lost).get("files")
    lines.append(f"{name}: {_whole(files)} {_noun(files, 'file')} could not be read to the end")
  if not lines:
    return tag("p", "Everything could be read.", class_="note")
  return join(tag("p", "Not read:"), tag("ul", *(tag("li", line) for line in lines)))


def _places(places: Any) -> Html | None:
  lines = [str(place) for place in places] if isinstance(places, list) else []
  if not lines:
    return None
  left = len(lines) - MAX_PLACES
  more = f"\n{left} more are in events.jsonl." if left > 0 else ""
  return fold("Where", tag("pre", "\n".join(lines[:MAX_PLACES]) + more))


def _plain(value: Any) -> dict[str, Any]:
  return value if isinstance(value, dict) else {}


def _noun(number: Any, noun: str) -> str:
  return noun if number == 1 else f"{noun}s"


def _whole(value: Any) -> str:
  return f"{value:,}" if type(value) is int else counted(finite(value))
