"""Growth of cost: a chart a sweep, the exponents, and what keeps the curve from being straight."""

from __future__ import annotations

from collections.abc import Sequence

from jaxmoe.bench.page.result_files import ResultFile
from jaxmoe.bench.results import Row
from jaxmoe.bench.rows_text import short
from jaxmoe.report.chart import Axes, Series, chart
from jaxmoe.report.html import Html, join, table, tag

WORDS = {
  "flops": "FLOPs",
  "bytes": "bytes moved",
  "temp_bytes": "temporaries",
  "instructions": "instructions",
  "cpu_seconds": "seconds of a step",
  "compile_cpu_seconds": "seconds to compile",
}


def charts(file: ResultFile) -> list[Html]:
  """Returns a chart of each sweep, costs as multiples of the first size's."""
  found = []
  for race, rows in file.races().items():
    fits = _fit_of(rows)
    points = [row for row in rows if "size" in row]
    if fits is None:
      continue
    x = [row["size"] for row in points]
    series = [
      Series(f"{WORDS[cost]} ^{short(one['exponent'])},", x, [row[cost] / points[0][cost]
                                                           for row in points])
      for cost, one in fits["fits"].items() if cost in WORDS
    ]  # fmt: skip
    axes = Axes(race, "times the first", log="xy", log_first=True)
    found.append(chart(f"Cost against {race}", series, axes, note=fits["bends"]))
  return found


def exponents(file: ResultFile) -> Html:
  """Returns the table of exponents: the whole curve's, its two ends', and the last over first."""
  rows = []
  for race, of in file.races().items():
    fits = _fit_of(of)
    for cost, one in (fits or {"fits": {}})["fits"].items():
      numbers = (one[name] for name in ("exponent", "first", "last", "worst", "ends"))
      rows.append([f"{race}: {WORDS.get(cost, cost)}", *map(short, numbers)])
  head = ["cost", "exponent", "at first", "at last", "off by at most", "last over first"]
  note = "A cost is size to the power of the exponent; at first and at last: between two sizes."
  return join(table(head, rows), tag("p", note, class_="note"))


def _fit_of(rows: Sequence[Row]) -> Row | None:
  return next((row for row in rows if "fits" in row), None)
