"""Rooflines: what programs reach beside what the machine can (Williams et al. 2009).

Left of the ridge memory is the limit, right of it arithmetic. A program's bytes are those of
`hlo/traffic.py`, which caches of the processor may save: it can lie above its roof. Where loops of
unknown length hide some of it, the least work stands for what is done.
"""

from __future__ import annotations

from collections.abc import Sequence

from jaxmoe.bench.page.result_files import ResultFile
from jaxmoe.bench.results import Row
from jaxmoe.bench.rows_text import at_least
from jaxmoe.report.chart import Axes, ReferenceLine, Series, chart
from jaxmoe.report.html import Html

AXES = Axes("FLOP per byte moved", "GFLOP/s", log="xy", log_first=True)


def rooflines(files: Sequence[ResultFile]) -> list[Html]:
  """Returns a chart for each suite and each operation that has programs both counted and timed."""
  found = []
  for file in files:
    groups: dict[str, list[Row]] = {}
    for row in file.rows:
      known = {"flops", "bytes", "cpu_seconds"} <= row.keys() and "peak_flops_per_s" in file.about
      if known and _work(row)[0] and file.suite != "scaling":
        one = file.suite in ("step", "decode")
        groups.setdefault(file.suite if one else row["race"], []).append(row)
    found += [_chart(file, name, rows) for name, rows in groups.items()]
  return found


def _chart(file: ResultFile, name: str, rows: Sequence[Row]) -> Html:
  cores = float(file.about["cores"])
  peak, rate = file.about["peak_flops_per_s"], file.about["peak_bytes_per_s"]
  points = []
  for row in rows:
    flops, moved = _work(row)
    # As if all cores had been the program's own as long as it worked.
    points.append((_label(row, name), flops / moved, flops / row["cpu_seconds"] * cores))
  ridge = peak / rate
  least = min([ridge, *(x for _, x, _ in points)]) / 2
  most = max([ridge, *(x for _, x, _ in points)]) * 2
  roof_x = [least, ridge, most]
  roof = Series("roof", roof_x, [min(peak, rate * x) / 1e9 for x in roof_x])
  shown = [Series(label, [x], [y / 1e9]) for label, x, y in points]
  level = ReferenceLine("peak of products", peak / 1e9)
  rates = f"{rate / 1e9:.3g} GB/s and {peak / 1e9:.3g} GFLOP/s"
  note = f"{rates}, the best ever seen of {cores:g} cores"
  if least_work := [row["name"] for row in rows if _hidden(row)]:
    note += f"; by the least work: {', '.join(dict.fromkeys(least_work))}"
  return chart(f"Roofline: {name}", [roof, *shown], AXES, [level], note=note)


def _label(row: Row, name: str) -> str:
  return row["name"] if name == row["race"] else row["race"]


def _hidden(row: Row) -> bool:
  return at_least(row, "flops") or at_least(row, "bytes")


def _work(row: Row) -> tuple[float, float]:
  """Returns FLOPs and bytes as counted, or the least where not all of it is."""
  kind = "ideal_" if _hidden(row) else ""
  return row[f"{kind}flops"], row[f"{kind}bytes"]
