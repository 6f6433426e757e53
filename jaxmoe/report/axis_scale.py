"""Scales from values to places of a picture, and round numbers to write at an axis."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable


@dataclasses.dataclass(frozen=True)
class Scale:
  """A map from [low, high] to [start, end], linear or logarithmic."""

  low: float
  high: float
  start: float
  end: float
  log: bool = False

  def __call__(self, value: float) -> float:
    """Returns the place of a value; values outside get the nearest edge."""
    low, high, value = (self._bent(x) for x in (self.low, self.high, value))
    share = min(max((value - low) / (high - low), 0.0), 1.0)
    return self.start + share * (self.end - self.start)

  def ticks(self, most: int = 6) -> list[float]:
    """Returns at most about so many round values inside."""
    if self.log and self.high / self.low >= 8:
      return self._log_ticks(most)
    step = nice_step((self.high - self.low) / max(most, 1))
    first = math.ceil(self.low / step - 1e-9)
    last = math.floor(self.high / step + 1e-9)
    return [round(i * step, 12) for i in range(first, last + 1)]

  def _log_ticks(self, most: int) -> list[float]:
    first, last = math.floor(math.log10(self.low)), math.ceil(math.log10(self.high))
    for factors in ((1, 2, 5), (1, 3), (1,)):
      values = [f * 10.0**p for p in range(first, last + 1) for f in factors]
      inside = [v for v in values if self.low * 0.999 <= v <= self.high * 1.001]
      if len(inside) <= most:
        return inside
    return inside[:: math.ceil(len(inside) / most)]

  def _bent(self, value: float) -> float:
    return math.log10(max(value, 1e-300)) if self.log else value


def nice_step(step: float) -> float:
  """Returns the smallest of 1, 2, 5 times a power of ten that is not below `step`."""
  power = 10.0 ** math.floor(math.log10(step))
  return next(f * power for f in (1, 2, 5, 10) if f * power >= step * (1 - 1e-9))


def span(values: Iterable[float], log: bool = False) -> tuple[float, float]:
  """Returns the least and the largest finite value, apart; with `log`, of those above 0."""
  known = [v for v in values if math.isfinite(v) and (not log or v > 0)]
  if not known:
    return (1.0, 10.0) if log else (0.0, 1.0)
  low, high = min(known), max(known)
  if log:
    return (low, high) if high > low * 1.01 else (low / 1.5, high * 1.5)
  if high - low > 1e-9 * max(abs(low), abs(high)):
    return low, high
  pad = abs(low) * 0.1 or 0.5
  return low - pad, high + pad
