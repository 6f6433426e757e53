"""Races: contestants in turn, round by round, in seconds of the clock and of the processor.

On a busy machine seconds of the clock say how busy it was. Seconds of the processor of contestants
that take turns within a round drift alike, and their ratio, a median over rounds, stays.
"""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np


@dataclasses.dataclass(frozen=True)
class Seconds:
  """How long something took: by the clock, and of all processors together."""

  wall: float
  cpu: float

  def __sub__(self, other: Seconds) -> Seconds:
    """Returns what is left without another."""
    return Seconds(self.wall - other.wall, self.cpu - other.cpu)

  def over(self, number: float) -> Seconds:
    """Returns a part of it."""
    return Seconds(self.wall / number, self.cpu / number)


Run = Callable[[], Seconds]


def timed(run: Callable[[], Any]) -> Seconds:
  """Returns how long a call of this process takes, until what it returns is there."""
  wall, cpu = time.perf_counter(), time.process_time()
  jax.block_until_ready(run())
  return Seconds(time.perf_counter() - wall, time.process_time() - cpu)


def race(runs: Mapping[str, Run], base: str, rounds: int) -> list[dict[str, Any]]:
  """Returns a row for each contestant; each round runs all of them, the first one warms up.

  `ratio` is the median over rounds of its seconds of the processor over those of `base`, and
  `wall_ratio` the same by the clock.
  """
  wall, cpu = ({name: np.empty(rounds) for name in runs} for _ in range(2))
  loads = []
  for at in range(-1, rounds):
    for name, run in runs.items():
      seconds = run()
      wall[name][max(at, 0)], cpu[name][max(at, 0)] = seconds.wall, seconds.cpu
    loads.append(os.getloadavg()[0])
  return [
    {
      "name": name,
      "ratio": float(np.median(cpu[name] / cpu[base])),
      "seconds": float(np.median(wall[name])),
      "cpu_seconds": float(np.median(cpu[name])),
      "wall_ratio": float(np.median(wall[name] / wall[base])),
      "seconds_quartiles": _quartiles(wall[name]),
      "cpu_quartiles": _quartiles(cpu[name]),
      "rounds": rounds,
      "load": float(np.median(loads)),
    }
    for name in runs
  ]


def _quartiles(values: np.ndarray) -> list[float]:
  return [float(value) for value in np.quantile(values, (0.25, 0.75))]
