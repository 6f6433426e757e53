"""Races as bars, one lane a contestant; who is not timed says why in the place of a bar."""

from __future__ import annotations

from collections.abc import Sequence

from jaxmoe.bench.page.result_files import ResultFile
from jaxmoe.bench.results import Row
from jaxmoe.bench.rows_text import UNTIMED, VISITED, counted, short, visited
from jaxmoe.report.html import Html, join, table, tag

STYLE = """
.race { margin: 10px 0; }
.lane { display: flex; flex-wrap: wrap; justify-content: space-between; gap: 0 12px;
  margin: 0 6px 9px; font-size: 13px; }
.lane b { font-weight: 600; white-space: nowrap; }
td + td::before { flex: none; }
.lane .time { font-variant-numeric: tabular-nums; text-align: right; }
.lane .why { flex: 0 0 100%; color: var(--soft); }
.lane .track { flex: 0 0 100%; height: 10px; background: var(--line); border-radius: 5px;
  overflow: hidden; margin-top: 2px; }
.lane .track i { display: block; height: 100%; background: var(--s5); }
.lane .track i.own { background: var(--s0); }
"""


def races(file: ResultFile) -> list[Html]:
  """Returns a figure for each race that was timed."""
  return [
    _race(f"{file.suite}: {race}", rows)
    for race, rows in file.races().items()
    if any("cpu_seconds" in row for row in rows) and not any("fits" in row for row in rows)
  ]


def counts(files: Sequence[ResultFile]) -> Html | None:
  """Returns the table of what programs do beside the least they need; None where none is known."""
  rows = [
    [f"{file.suite}: {row['race']}, {row['name']}", *counted(row)]
    for file in files if file.suite != "scaling"
    for row in file.rows if "flops" in row
  ]  # fmt: skip
  head = ["program", "MFLOP", "of the least", "MB", "of the least", "temporary MB", "fusions"]
  note = "≥: of a loop whose length is found while it runs one pass is counted."
  return join(table(head, rows), tag("p", note, class_="note")) if rows else None


def strategies(files: Sequence[ResultFile]) -> Html | None:
  """Returns the table of rows over context devices; None where none is counted."""
  rows = [
    [f"{row['race']}, {row['name']}", *visited(row)]
    for file in files for row in file.rows if "hop_bytes" in row
  ]  # fmt: skip
  return table(["attention", *VISITED], rows) if rows else None


def _race(title: str, rows: Sequence[Row]) -> Html:
  longest = max(row.get("cpu_seconds", 0.0) for row in rows)
  lanes = [_lane(row, longest, row.get("ratio") == 1) for row in rows]
  loads = [row["load"] for row in rows if "load" in row]
  rounds = next(row["rounds"] for row in rows if "rounds" in row)
  note = f"{rounds} rounds at load {short(loads[0])}; quartiles in brackets"
  return tag(
    "figure", tag("figcaption", tag("b", title)), tag("div", *lanes, class_="race"),
    tag("p", note, class_="note"), class_="card",
  )  # fmt: skip


def _lane(row: Row, longest: float, base: bool) -> Html:
  for kind in UNTIMED:
    if kind in row:
      return tag("div", tag("b", row["name"]), tag("span", f"{kind}: {row[kind]}", class_="why"),
                 class_="lane")  # fmt: skip
  low, high = (short(1e3 * value) for value in row["cpu_quartiles"])
  words = f"{short(1e3 * row['cpu_seconds'])} ms ({low} to {high}), {short(row['ratio'])}x"
  if "cpu_mfu" in row:
    words += f", {short(100 * row['cpu_mfu'])}% of peak"
  width = f"width:{100 * row['cpu_seconds'] / longest:.1f}%"
  bar = tag("span", tag("i", style=width, class_="own" if base else None), class_="track")
  return tag("div", join(tag("b", row["name"]), tag("span", words, class_="time"), bar),
             class_="lane")  # fmt: skip
