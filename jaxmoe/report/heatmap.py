"""Heatmaps of expert load as SVG, in ten colours that mean the same everywhere.

A value is a load over the even share, 1 / E: 1 is what a balanced expert gets. Colours go by
doublings, from blue (too little) over neutral to orange (too much); the ink of the page itself is
for an expert without any choice, so that a dead expert is what stands out most. Cells of one colour
are one path, so that a heatmap of many layers, experts and steps stays small.
"""

from __future__ import annotations

import dataclasses
import itertools
from bisect import bisect_right
from collections.abc import Callable, Sequence

import numpy as np

from jaxmoe.report.axis_scale import Scale
from jaxmoe.report.chart import WIDTH
from jaxmoe.report.html import Html, data, join, tag
from jaxmoe.report.number_format import counted, plain, short

BOUNDS = (0.0, 1 / 8, 1 / 4, 1 / 2, 0.8, 1.25, 2.0, 4.0, 8.0)
NAMES = (
  "none", "< 1/8", "< 1/4", "< 1/2", "< 0.8", "even", "> 1.25", "> 2", "> 4", "> 8"
)  # fmt: skip
MAX_LABELLED = 2000  # cells with a text of their own; where there are more, rows have one


@dataclasses.dataclass(frozen=True)
class HeatmapAxes:
  """What stands at the sides of a heatmap.

  Attributes:
    rows: A name for each row.
    columns: What columns are: their numbers, or the unit of `edges`.
    edges: Where columns begin and the last one ends; empty for numbered columns.
    left: The width of row names.
    marks: {row: text} shown at the right end of rows.
  """

  rows: Sequence[str]
  columns: str = "expert"
  edges: Sequence[float] = ()
  left: int = 30
  marks: dict[int, str] = dataclasses.field(default_factory=dict)


def heatmap(
  title: str, ratio_RC: np.ndarray, sides: HeatmapAxes, note: str = "", labelled: bool = True
) -> Html:
  """Returns a figure of loads over the even share; `labelled` gives each of few cells a text."""
  rows, columns = ratio_RC.shape
  right = 16 if sides.marks else 8
  width = WIDTH - sides.left - right
  height = rows * min(max(200 / rows, 1.5), 22)
  box = (sides.left, 8, width, height)
  parts = [_cells(ratio_RC, box)]
  if columns <= 10 and height / rows >= 14 and not sides.edges:
    parts.append(_figures(ratio_RC, box))
  parts += [_row_names(sides, box), _column_names(sides, box, columns)]
  parts += [_death_marks(sides, box), _hover(ratio_RC, sides, box, labelled)]
  cells = [[plain(float(value), 4) for value in row_C] for row_C in ratio_RC]
  edges = [plain(x, 8) for x in sides.edges]
  numbers = {"chart": title, "rows": list(sides.rows), "edges": edges, "cells": cells}
  view = f"0 0 {WIDTH} {height + 44:.0f}"
  return tag(
    "figure", tag("figcaption", tag("b", title)),
    tag("svg", *parts, viewBox=view, role="img", aria_label=f"{title}: heatmap"),
    tag("p", note, class_="note") if note else None, data(numbers), class_="card",
  )  # fmt: skip


def legend() -> Html:
  """Returns what the colours of all heatmaps mean."""
  swatches = [
    tag("span", tag("i", style=f"background:var(--l{i})"), name) for i, name in enumerate(NAMES)
  ]
  what = "Load over the even share (1 / experts): "
  return tag("div", what, *swatches, class_="scale")


def color_class(ratio: float) -> int:
  """Returns the number of the colour of a load over the even share."""
  return 0 if ratio <= 0 else bisect_right(BOUNDS, ratio)


def _cells(ratio_RC: np.ndarray, box: tuple[float, ...]) -> Html:
  left, top, width, height = box
  rows, columns = ratio_RC.shape
  class_RC = np.where(ratio_RC <= 0, 0, np.searchsorted(BOUNDS, ratio_RC, side="right"))
  class_RC = np.where(np.isfinite(ratio_RC), class_RC, -1)
  paths: dict[int, list[str]] = {}
  for i, class_C in enumerate(class_RC):
    starts = [0, *(np.flatnonzero(np.diff(class_C)) + 1).tolist(), columns]
    for start, end in itertools.pairwise(starts):
      paths.setdefault(int(class_C[start]), []).append(f"M{start} {i}h{end - start}v1H{start}z")
  size = f"translate({left} {top}) scale({width / columns:.5g} {height / rows:.5g})"
  drawn = [
    tag("path", d="".join(pieces), fill=f"var(--l{level})")
    for level, pieces in sorted(paths.items()) if level >= 0
  ]  # fmt: skip
  return tag("g", *drawn, transform=size, shape_rendering="crispEdges")


def _figures(ratio_RC: np.ndarray, box: tuple[float, ...]) -> Html:
  left, top, width, height = box
  rows, columns = ratio_RC.shape
  parts = []
  for i, row_C in enumerate(ratio_RC):
    for j, value in enumerate(row_C):
      x, y = left + (j + 0.5) * width / columns, top + (i + 0.5) * height / rows + 4
      strong = "strong" if color_class(value) in (0, 1, 2, 8, 9) else "ink"
      parts.append(tag("text", short(value, 2), x=f"{x:.1f}", y=f"{y:.1f}", class_=strong))
  return tag("g", *parts, text_anchor="middle")


def _row_names(sides: HeatmapAxes, box: tuple[float, ...]) -> Html:
  left, top, _, height = box
  each = height / len(sides.rows)
  step = next(s for s in (1, 2, 4, 8, 16, 32, 64, 128, 1024) if s * each >= 12)
  return join(*(
    tag("text", name, x=left - 5, y=f"{top + (i + 0.5) * each + 4:.1f}", text_anchor="end")
    for i, name in enumerate(sides.rows) if i % step == 0
  ))  # fmt: skip


def _column_names(sides: HeatmapAxes, box: tuple[float, ...], columns: int) -> Html:
  left, top, width, height = box
  parts = []
  if sides.edges:
    scale = Scale(sides.edges[0], sides.edges[-1], left, left + width)
    places = [(scale(value), counted(value)) for value in scale.ticks(5)]
  else:
    each = width / columns
    step = next(s for s in (1, 2, 4, 8, 16, 32, 64, 128, 1024) if s * each >= 20)
    places = [(left + (j + 0.5) * each, str(j)) for j in range(0, columns, step)]
  for x, text in places:
    edge = "end" if x > left + width - 8 and sides.edges else "middle"
    parts.append(tag("text", text, x=f"{x:.1f}", y=f"{top + height + 15:.1f}", text_anchor=edge))
  x, y = left + width / 2, f"{top + height + 31:.1f}"
  parts.append(tag("text", sides.columns, x=x, y=y, text_anchor="middle", class_="unit"))
  return join(*parts)


def _death_marks(sides: HeatmapAxes, box: tuple[float, ...]) -> Html:
  left, top, width, height = box
  each = height / max(len(sides.rows), 1)
  parts = []
  for row, text in sides.marks.items():
    y = top + (row + 0.5) * each
    path = f"M{left + width + 3} {y:.1f}l8 -4v8z"
    parts.append(tag("path", tag("title", text), d=path, class_="mark"))
  return join(*parts)


def _hover(
  ratio_RC: np.ndarray, sides: HeatmapAxes, box: tuple[float, ...], labelled: bool
) -> Html:
  """What lies under the pointer: cells where there are few, else rows."""
  left, top, width, height = box
  rows, columns = ratio_RC.shape
  each = labelled and rows * columns <= MAX_LABELLED
  where: Callable[[int], str] = lambda j: f"{sides.columns} {j}"  # noqa: E731
  if sides.edges:
    where = lambda j: f"{counted(sides.edges[j])} to {counted(sides.edges[j + 1])}"  # noqa: E731
  parts = []
  for i, row_C in enumerate(ratio_RC):
    if not each:
      text = f"{sides.rows[i]}: {short(row_C[0], 3)}x at first, {short(row_C[-1], 3)}x at last"
      parts.append(tag("rect", tag("title", text), x=0, y=i, width=columns, height=1))
      continue
    for j, value in enumerate(row_C):
      text = tag("title", f"{sides.rows[i]}, {where(j)}: {short(value, 3)}x")
      parts.append(tag("rect", text, x=j, y=i, width=1, height=1))
  size = f"translate({left} {top}) scale({width / columns:.5g} {height / rows:.5g})"
  return tag("g", *parts, transform=size, fill="transparent")
