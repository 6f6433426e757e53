"""Exponents of curves: how a cost grows with a size, as a power, and where that power bends."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np


@dataclasses.dataclass(frozen=True)
class Fit:
  """A cost as `size ** exponent`.

  Attributes:
    exponent: Of the least squares line through the logarithms.
    first: The exponent between the first two sizes.
    last: That between the last two: what the curve tends to.
    worst: The largest factor by which the line misses a point.
  """

  exponent: float
  first: float
  last: float
  worst: float


def fit(sizes: Sequence[float], costs: Sequence[float]) -> Fit:
  """Returns the power law nearest to a curve of two points or more, all above 0."""
  x, y = np.log(np.asarray(sizes, float)), np.log(np.asarray(costs, float))
  exponent, offset = np.polyfit(x, y, 1)
  steps = np.diff(y) / np.diff(x)
  worst = float(np.exp(np.max(np.abs(y - exponent * x - offset))))
  return Fit(float(exponent), float(steps[0]), float(steps[-1]), worst)
