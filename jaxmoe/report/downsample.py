"""Downsampling of long series while they stream by: means of neighbours, least and largest."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping

import numpy as np

MAX_POINTS = 400
MAX_COLUMNS = 100


@dataclasses.dataclass
class Curve:
  """A quantity over a run: a point is the mean of the known values of `width` lines.

  `x` is the mean of tokens so far over the same lines; a bucket without values is NaN. `last` is
  the last known value by itself.
  """

  x: list[float] = dataclasses.field(default_factory=list)
  y: list[float] = dataclasses.field(default_factory=list)
  low: list[float] = dataclasses.field(default_factory=list)
  high: list[float] = dataclasses.field(default_factory=list)
  last: float = math.nan


class CurveSampler:
  """Curves by name, of values that come line by line.

  Args:
    total: How many lines will come.
  """

  def __init__(self, total: int):
    self.width = max(math.ceil(total / MAX_POINTS), 1)
    self.found: dict[str, Curve] = {}
    self._x: list[float] = []
    self._values: dict[str, list[float]] = {}

  def add(self, x: float, values: Mapping[str, float]) -> None:
    """Takes the values of a line; a name may come and go."""
    self._x.append(x)
    for name, value in values.items():
      self._values.setdefault(name, []).append(value)
    if len(self._x) == self.width:
      self.flush()

  def flush(self) -> None:
    """Makes points of what has come since the last ones."""
    if not self._x:
      return
    x = sum(self._x) / len(self._x)
    for name, values in self._values.items():
      known = [value for value in values if math.isfinite(value)] or [math.nan]
      curve = self.found.setdefault(name, Curve())
      curve.x.append(x)
      curve.y.append(sum(known) / len(known))
      curve.low.append(min(known))
      curve.high.append(max(known))
      curve.last = known[-1] if math.isfinite(known[-1]) else curve.last
    self._x, self._values = [], {}


@dataclasses.dataclass(frozen=True)
class LoadHistory:
  """The load of a layer's experts over a run.

  Attributes:
    mean_CE: By column, the mean share of choices of each expert.
    edges: Tokens so far where columns begin, and where the last one ends.
    last_E: The mean over the last tenth of the lines.
  """

  mean_CE: np.ndarray
  edges: list[float]
  last_E: np.ndarray

  def ratios(self, columns: int) -> tuple[np.ndarray, list[float]]:
    """Returns loads over the even share, experts by at most `columns`, and their edges."""
    every = math.ceil(len(self.mean_CE) / max(columns, 1))
    starts = list(range(0, len(self.mean_CE), every))
    mean_CE = np.stack([self.mean_CE[start : start + every].mean(0) for start in starts])
    edges = [self.edges[start] for start in starts] + [self.edges[-1]]
    return mean_CE.T * mean_CE.shape[1], edges


class LoadSampler:
  """Load histories by layer, of loads that come line by line; `total` lines will come."""

  def __init__(self, total: int):
    self._width = max(math.ceil(total / MAX_COLUMNS), 1)
    self._last_from = total - max(math.ceil(total / 10), 1)
    self._lines = 0
    self._edges = [0.0]
    self._open: dict[int, list[np.ndarray]] = {}
    self._columns: dict[int, list[np.ndarray]] = {}
    self._last: dict[int, list[np.ndarray]] = {}

  def add(self, before: float, x: float, loads: Mapping[int, np.ndarray]) -> None:
    """Takes the loads of a line that went from `before` tokens to `x`."""
    if not self._lines:
      self._edges = [before]
    if self._lines and self._lines % self._width == 0:
      self._close()
    for layer, load_E in loads.items():
      self._open.setdefault(layer, []).append(load_E)
      if self._lines >= self._last_from:
        self._last.setdefault(layer, []).append(load_E)
    self._lines += 1
    self._now = x

  def found(self) -> dict[int, LoadHistory]:
    """Returns the histories of the layers that every column has."""
    if self._lines:
      self._close()
    return {
      layer: LoadHistory(np.stack(columns), self._edges, np.mean(self._last[layer], 0))
      for layer, columns in sorted(self._columns.items())
      if len(columns) == len(self._edges) - 1 and layer in self._last
    }

  def _close(self) -> None:
    if self._open:
      self._edges.append(self._now)
    for layer, loads in self._open.items():
      self._columns.setdefault(layer, []).append(np.asarray(np.mean(loads, 0, np.float64)))
    self._open = {}
