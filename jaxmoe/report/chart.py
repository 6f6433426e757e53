"""Line charts as SVG: drawn for a phone's width, so that no screen makes their text too small.

A chart stands in a figure with its title, its legend with the last values, and the numbers it
shows as JSON. There is no script: what lies under the pointer is told by `<title>` elements.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from bisect import bisect_left
from collections.abc import Sequence
from typing import Any

from jaxmoe.report.axis_scale import Scale, span
from jaxmoe.report.downsample import Curve
from jaxmoe.report.html import Html, data, join, tag
from jaxmoe.report.number_format import counted, plain, scientific, short

WIDTH, HEIGHT = 360, 224
LEFT, RIGHT, TOP, BOTTOM = 52, 10, 12, 36
FEW = 6  # series that can be told apart by colour alone
STRIPS = 60
LINE = 13  # the height of a line of text


@dataclasses.dataclass(frozen=True)
class Series:
  """A curve: places, values, and where each stands for many the least and largest of them.

  Attributes:
    label: Whose it is; '' for the only one there can be, which the title names.
    last: The last value, where `y` has means; NaN for the last of `y`.
  """

  label: str
  x: Sequence[float]
  y: Sequence[float]
  low: Sequence[float] = ()
  high: Sequence[float] = ()
  color: int | None = None
  last: float = math.nan

  @property
  def end(self) -> float:
    """The last value that is known."""
    known = (y for y in reversed(self.y) if math.isfinite(y))
    return self.last if math.isfinite(self.last) else next(known, math.nan)


@dataclasses.dataclass(frozen=True)
class ReferenceLine:
  """A horizontal line with a name, such as what a compressor reaches."""

  label: str
  y: float


@dataclasses.dataclass(frozen=True)
class Axes:
  """What the axes say.

  Attributes:
    x: The unit.
    y: The unit.
    log: The axes of the logarithmic view that is offered, such as 'xy'.
    log_first: Whether that is shown first.
    from_zero: Whether y begins at 0.
    ends: Where x begins and ends, alike in all charts of a page; None for as far as curves go.
  """

  x: str = "tokens"
  y: str = ""
  log: str = ""
  log_first: bool = False
  from_zero: bool = False
  ends: tuple[float, float] | None = None


def of_curve(label: str, curve: Curve, color: int | None = None) -> Series:
  """Returns a curve of a run as one of a chart."""
  return Series(label, curve.x, curve.y, curve.low, curve.high, color, curve.last)


def chart(
  title: str, series: Sequence[Series], axes: Axes = Axes(), levels: Sequence[ReferenceLine] = (),
  marks: Sequence[tuple[float, str]] = (), note: str = "",
) -> Html:
  """Returns a figure with the curves.

  Args:
    title: What is shown.
    series: The curves; more than `FEW` are coloured by their order.
    axes: Units and views.
    levels: Horizontal lines.
    marks: (x, text) of what happened there.
    note: A line under the chart.
  """
  series = _colored([one for one in series if any(math.isfinite(y) for y in one.y)])
  if not series:
    return tag("figure", _caption(title, axes), tag("p", "no numbers yet"), class_="card")
  views = [tag("div", _svg(title, series, axes, levels, marks, ""), class_="linear")]
  switch = None
  if axes.log:
    logged = _svg(title, series, axes, levels, marks, axes.log)
    views.append(tag("div", logged, class_="logged"))
    box = tag("input", type="checkbox", class_="uselog", checked=axes.log_first)
    switch = tag("label", box, f" log {' and '.join(axes.log)}", class_="switch")
  return tag(
    "figure", _caption(title, axes, switch), _legend(series), *views,
    tag("p", note, class_="note") if note else None,
    data(_numbers(title, series, axes, levels)), class_="card",
  )  # fmt: skip


def _colored(series: Sequence[Series]) -> list[Series]:
  return [
    one if one.color is not None else dataclasses.replace(one, color=i)
    for i, one in enumerate(series)
  ]


def color_of(index: int, of: int) -> str:
  """Returns the colour of a curve: its own among few, by its place between two among many."""
  if of <= FEW:
    return f"var(--s{index % FEW})"
  return f"color-mix(in oklab, var(--ramp0), var(--ramp1) {100 * index // max(of - 1, 1)}%)"


def _caption(title: str, axes: Axes, switch: Html | None = None) -> Html:
  unit = tag("span", f" {axes.y}", class_="unit") if axes.y else None
  return tag("figcaption", tag("span", tag("b", title), unit), switch)


def _legend(series: Sequence[Series]) -> Html:
  if len(series) > 2 * FEW:
    ends = (series[0], series[-1])
    bar = tag("i", class_="ramp")
    return tag("div", tag("span", ends[0].label, bar, ends[1].label), class_="legend")
  items = []
  for one in series:
    value = tag("b", _last(one.end))
    if len(series) == 1 and not one.label:
      return tag("div", tag("span", "last ", value), class_="legend")
    swatch = tag("i", style=f"background:{color_of(one.color or 0, len(series))}")
    items.append(tag("span", swatch, one.label, " ", value, class_="key"))
  return tag("div", *items, class_="legend")


def _last(value: float) -> str:
  return counted(value) if abs(value) >= 1e4 else short(value)


def _numbers(
  title: str, series: Sequence[Series], axes: Axes, levels: Sequence[ReferenceLine]
) -> dict[str, Any]:
  def curve(one: Series) -> dict[str, Any]:
    shown: dict[str, Any] = {"label": one.label, "x": [plain(x, 8) for x in one.x]}
    shown |= {"y": [plain(y) for y in one.y], "last": plain(one.end)}
    if one.low and len(series) <= FEW:
      shown |= {"low": [plain(y) for y in one.low], "high": [plain(y) for y in one.high]}
    return shown

  curves = [curve(one) for one in series]
  if len(series) > 1 and all(list(one.x) == list(series[0].x) for one in series):
    curves = [{k: v for k, v in one.items() if k != "x" or i == 0} for i, one in enumerate(curves)]
  lines = {level.label: plain(level.y) for level in levels}
  shown = {"chart": title, "x": axes.x, "y": axes.y, "series": curves, "levels": lines}
  return shown | ({"ends": [plain(x, 8) for x in axes.ends]} if axes.ends else {})


def _svg(
  title: str, series: Sequence[Series], axes: Axes, levels: Sequence[ReferenceLine],
  marks: Sequence[tuple[float, str]], log: str,
) -> Html:  # fmt: skip
  bands = len(series) <= FEW
  values = [y for one in series for y in one.y] + [level.y for level in levels]
  if bands:
    values += [y for one in series for y in (*one.low, *one.high)]
  low, high = _room(values, axes) if "y" not in log else span(values, log=True)
  y_scale = Scale(low, high, HEIGHT - BOTTOM, TOP, "y" in log)
  x_low, x_high = span((x for one in series for x in (*one.x, *(axes.ends or ()))), "x" in log)
  x_scale = Scale(x_low, x_high, LEFT, WIDTH - RIGHT, "x" in log)
  parts = [_grid(x_scale, y_scale, axes), _levels(levels, y_scale)]
  for one in series:
    color = color_of(one.color or 0, len(series))
    parts.append(_curve(one, (x_scale, y_scale), color, bands, many=len(series) > FEW))
  parts += [_strips(series, x_scale, axes), _marks(marks, x_scale)]
  box = f"0 0 {WIDTH} {HEIGHT}"
  return tag("svg", *parts, viewBox=box, role="img", aria_label=f"{title}: line chart")


def _room(values: Sequence[float], axes: Axes) -> tuple[float, float]:
  """Returns the ends of an axis: a little beyond the values, but not below 0 for what never is."""
  low, high = span(values)
  pad = 0.05 * (high - low)
  least = min((value for value in values if math.isfinite(value)), default=0.0)
  if least >= 0:
    return 0.0 if axes.from_zero else max(low - pad, 0.0), high + pad
  return low - pad, high + pad


def _grid(x_scale: Scale, y_scale: Scale, axes: Axes) -> Html:
  parts = []
  ticks = y_scale.ticks(6)
  small = any(0 < abs(value) < 1e-3 for value in ticks)
  for value in ticks:
    y = round(y_scale(value), 1)
    parts.append(tag("line", x1=LEFT, x2=WIDTH - RIGHT, y1=y, y2=y, class_="grid"))
    text = scientific(value) if small else counted(value)
    parts.append(tag("text", text, x=LEFT - 6, y=y + 4, text_anchor="end"))
  bottom = HEIGHT - BOTTOM
  parts.append(tag("line", x1=LEFT, x2=WIDTH - RIGHT, y1=bottom, y2=bottom, class_="axis"))
  for value in x_scale.ticks(5):
    x = round(x_scale(value), 1)
    parts.append(tag("line", x1=x, x2=x, y1=bottom, y2=bottom + 4, class_="axis"))
    edge = "end" if x > WIDTH - RIGHT - 12 else "middle"
    parts.append(tag("text", counted(value), x=x, y=bottom + 16, text_anchor=edge))
  middle = (LEFT + WIDTH - RIGHT) / 2
  parts.append(tag("text", axes.x, x=middle, y=HEIGHT - 5, text_anchor="middle", class_="unit"))
  return join(*parts)


def _levels(levels: Sequence[ReferenceLine], y_scale: Scale) -> Html:
  """Lines with their names above them, and all names inside of the axes."""
  parts: list[Html] = []
  ordered = sorted(levels, key=lambda level: -level.y)
  lines = [round(y_scale(level.y), 1) for level in ordered]
  for level, y, place in zip(ordered, lines, spread_labels(_beside(lines))):
    parts.append(tag("line", x1=LEFT, x2=WIDTH - RIGHT, y1=y, y2=y, class_="level"))
    text = f"{level.label} {short(level.y)}"
    parts.append(tag("text", text, x=WIDTH - RIGHT - 2, y=place, text_anchor="end", class_="halo"))
  return join(*parts)


def _beside(lines: Sequence[float]) -> list[float]:
  """Returns where names want to be: above their lines, or below where no room is between two."""
  crowded = [below - above < LINE + 4 for above, below in itertools.pairwise(lines)]
  fits = [y + LINE < HEIGHT - BOTTOM - 3 for y in lines]
  below = [near and room for near, room in zip([False, *crowded], fits)]
  return [y + LINE - 2 if under else y - 4 for y, under in zip(lines, below)]


def spread_labels(wanted: Sequence[float]) -> list[float]:
  """Returns where lines of text stand that want to stand at these places, the upper ones first.

  None is nearer to another than a line is high, nor outside of the axes, unless there are too many.
  """
  places: list[float] = []
  for place in wanted:
    places.append(max(place, places[-1] + LINE if places else TOP - 2))
  below = float(HEIGHT - BOTTOM - 3)
  for i in reversed(range(len(places))):
    places[i] = min(places[i], below)
    below = places[i] - LINE
  return places


def _curve(
  one: Series, scales: tuple[Scale, Scale], color: str, bands: bool, many: bool
) -> Html:
  x_scale, y_scale = scales
  parts = []
  if bands and one.low and any(low != high for low, high in zip(one.low, one.high)):
    for run in _runs(one, one.low, one.high, scales):
      upper = [f"{x_scale(x):.1f} {y_scale(high):.1f}" for x, _, high in run]
      lower = [f"{x_scale(x):.1f} {y_scale(low):.1f}" for x, low, _ in reversed(run)]
      path = f"M{'L'.join(upper + lower)}Z"
      parts.append(tag("path", d=path, fill=color, class_="band"))
  path = ""
  for run in _runs(one, one.y, one.y, scales):
    path += "M" + "L".join(f"{x_scale(x):.1f} {y_scale(y):.1f}" for x, y, _ in run)
    if len(run) == 1 or (len(one.x) <= 40 and not many):
      radius = 2.6
      parts += [
        tag("circle", cx=f"{x_scale(x):.1f}", cy=f"{y_scale(y):.1f}", r=radius, fill=color)
        for x, y, _ in run
      ]
  parts.append(tag("path", d=path, stroke=color, class_="thin" if many else "curve"))
  return join(*parts)


def _runs(
  one: Series, low: Sequence[float], high: Sequence[float], scales: tuple[Scale, Scale]
) -> list[list[tuple[float, float, float]]]:
  """Returns the pieces of a curve between values that are missing or that a logarithm lacks."""
  runs: list[list[tuple[float, float, float]]] = [[]]
  for x, bottom, top in zip(one.x, low, high):
    known = math.isfinite(bottom) and math.isfinite(top)
    if known and (x > 0 or not scales[0].log) and (top > 0 or not scales[1].log):
      runs[-1].append((x, bottom, top))
    elif runs[-1]:
      runs.append([])
  return [run for run in runs if run]


def _strips(series: Sequence[Series], x_scale: Scale, axes: Axes) -> Html:
  """What lies under the pointer: upright strips that tell the values of all curves there."""
  longest = max(series, key=lambda one: len(one.x)).x
  if x_scale.log:
    longest = [x for x in longest if x > 0]
  chosen = [longest[round(i * (len(longest) - 1) / max(min(STRIPS, len(longest)) - 1, 1))]
            for i in range(min(STRIPS, len(longest)))]  # fmt: skip
  places = [x_scale(x) for x in chosen]
  edges = [LEFT, *((a + b) / 2 for a, b in itertools.pairwise(places)), WIDTH - RIGHT]
  parts = []
  for x, left, right in zip(chosen, edges, edges[1:]):
    text = tag("title", f"{counted(x)} {axes.x}\n" + "\n".join(_hover_lines(series, x)))
    size = {"x": f"{left:.1f}", "width": f"{max(right - left, 0):.1f}"}
    parts.append(tag("rect", text, y=TOP, height=HEIGHT - TOP - BOTTOM, class_="strip", **size))
  return join(*parts)


def _hover_lines(series: Sequence[Series], x: float) -> list[str]:
  lines = []
  for one in series:
    at = min(bisect_left(one.x, x), len(one.x) - 1)
    if math.isfinite(one.y[at]):
      wide = f" ({short(one.low[at])} to {short(one.high[at])})" if one.low else ""
      lines.append((one.y[at], f"{one.label} {short(one.y[at])}{wide}".strip()))
  if len(lines) > 2 * FEW:
    lines = sorted(lines)
    return [f"from {lines[0][1]}", f"to {lines[-1][1]}"]
  return [text for _, text in lines]


def _marks(marks: Sequence[tuple[float, str]], x_scale: Scale) -> Html:
  parts = []
  for x, text in marks:
    if x_scale.low <= x <= x_scale.high:
      at = x_scale(x)
      path = f"M{at:.1f} {TOP}l-4 -8h8z"
      parts.append(tag("path", tag("title", text), d=path, class_="mark"))
  return join(*parts)
