"""Ways to look for the pattern of least loss within a budget of FLOPs.

Whatever a method has tried counts for every budget, so that the loss found never rises with the
budget. A budget is the most that a pattern may cost. To add a method, add one line to METHODS.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from jaxmoe.core.errors import InputError
from jaxmoe.routing_oracle.patterns import Patterns

Score = Callable[[np.ndarray], np.ndarray]
"""(P, L) patterns -> (P,) losses."""


class Tried:
  """Patterns and their losses, each computed once.

  Args:
    losses: (P, L) patterns -> (P, labels) losses.
  """

  def __init__(self, losses: Callable[[np.ndarray], np.ndarray]):
    self._losses = losses
    self._found: dict[tuple[int, ...], np.ndarray] = {}

  def __call__(self, patterns_PL: np.ndarray, label: int = 0) -> np.ndarray:
    """Returns (P,) the losses of some patterns for one of the labels."""
    keys = [tuple(row) for row in np.asarray(patterns_PL).tolist()]
    new = list(dict.fromkeys(key for key in keys if key not in self._found))
    if new:
      self._found.update(zip(new, self._losses(np.array(new))))
    return np.array([self._found[key][label] for key in keys])

  def all(self) -> tuple[np.ndarray, np.ndarray]:
    """Returns (P, L) all patterns tried and (P, labels) their losses."""
    return np.array(list(self._found)), np.array(list(self._found.values()))


@dataclasses.dataclass(frozen=True)
class SearchResult:
  """The best pattern within each budget.

  Attributes:
    patterns: (budgets, L).
    losses: (budgets,) in nats.
    flops: (budgets,) what each costs.
    num_tried: How many patterns were tried in all.
  """

  patterns: np.ndarray
  losses: np.ndarray
  flops: np.ndarray
  num_tried: int


@dataclasses.dataclass(frozen=True)
class Exhaustive:
  """Tries all K^L patterns.

  Attributes:
    most: More than these are refused.
  """

  most: int = 1 << 17

  def run(self, score: Score, patterns: Patterns, budget: float) -> None:
    """Tries them."""
    layers, kinds = patterns.shape
    if kinds**layers > self.most:
      raise InputError(
        f"{kinds} kinds in {layers} layers make {kinds**layers:,} patterns, above {self.most:,}; "
        "search by sampled, beam or coordinate, or with fewer kinds"
      )
    score(patterns.all())


@dataclasses.dataclass(frozen=True)
class Sampled:
  """Tries random patterns, and the cheapest one."""

  num: int = 1000
  seed: int = 0

  def __post_init__(self) -> None:
    if self.num < 1:
      raise InputError(f"at least one pattern must be sampled: num={self.num}")

  def run(self, score: Score, patterns: Patterns, budget: float) -> None:
    """Tries them."""
    score(np.concatenate([patterns.cheapest()[None], patterns.random(self.num, self.seed)]))


@dataclasses.dataclass(frozen=True)
class Beam:
  """Goes layer by layer from the cheapest pattern and keeps the `width` best within the budget."""

  width: int = 8

  def __post_init__(self) -> None:
    if self.width < 1:
      raise InputError(f"a beam keeps at least one pattern: width={self.width}")

  def run(self, score: Score, patterns: Patterns, budget: float) -> None:
    """Tries them."""
    kept_PL = patterns.cheapest()[None]
    for layer in range(patterns.shape[0]):
      kept_PL = _within(patterns, _varied(kept_PL, layer, patterns.shape[1]), budget)
      kept_PL = kept_PL[np.argsort(score(kept_PL), kind="stable")[: self.width]]


@dataclasses.dataclass(frozen=True)
class Coordinate:
  """Takes from the cheapest pattern on the best kind of one layer after the other, again and again.

  Attributes:
    sweeps: How often it goes over the layers, at most.
  """

  sweeps: int = 4

  def __post_init__(self) -> None:
    if self.sweeps < 1:
      raise InputError(f"at least one sweep must be made: sweeps={self.sweeps}")

  def run(self, score: Score, patterns: Patterns, budget: float) -> None:
    """Tries them."""
    best_L = patterns.cheapest()
    for _ in range(self.sweeps):
      before_L = best_L
      for layer in range(patterns.shape[0]):
        some_PL = _within(patterns, _varied(best_L[None], layer, patterns.shape[1]), budget)
        best_L = some_PL[np.argmin(score(some_PL))]
      if (best_L == before_L).all():
        return


METHODS: dict[str, Any] = {
  "exhaustive": Exhaustive,
  "sampled": Sampled,
  "beam": Beam,
  "coordinate": Coordinate,
}


def oracle_search(
  tried: Tried, patterns: Patterns, budgets: Sequence[float], method: Any, label: int = 0
) -> SearchResult:
  """Returns the pattern of least loss within each budget, of equal losses the cheapest.

  Args:
    tried: Gives losses; what it was asked before counts, too.
    patterns: What may be chosen.
    budgets: FLOPs, each at least those of the cheapest pattern.
    method: How to look.
    label: Which of the labels the loss is of.

  Raises:
    InputError: no pattern fits into a budget, or there are too many to try.
  """
  patterns.check(budgets)
  for budget in budgets:
    method.run(lambda some: tried(some, label), patterns, budget)
  return best_within(tried, patterns, budgets, label)


def best_within(
  tried: Tried, patterns: Patterns, budgets: Sequence[float], label: int
) -> SearchResult:
  """Returns the best of what was tried within each budget."""
  all_PL, losses = tried.all()
  flops_P = patterns.flops(all_PL)
  order = np.lexsort((flops_P, losses[:, label]))
  best = [next(at for at in order if flops_P[at] <= budget) for budget in budgets]
  return SearchResult(all_PL[best], losses[best, label], flops_P[best], len(all_PL))


def _varied(patterns_PL: np.ndarray, layer: int, kinds: int) -> np.ndarray:
  """Returns each pattern with each kind in one layer."""
  repeated = np.repeat(patterns_PL, kinds, axis=0)
  repeated[:, layer] = np.tile(np.arange(kinds), len(patterns_PL))
  return np.unique(repeated, axis=0)


def _within(patterns: Patterns, some_PL: np.ndarray, budget: float) -> np.ndarray:
  return some_PL[patterns.flops(some_PL) <= budget]
