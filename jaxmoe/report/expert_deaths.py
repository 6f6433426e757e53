"""Experts that died: which, and when they were chosen for the last time."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np

MIN_STEPS, MIN_SHARE = 20, 0.05


class Death(NamedTuple):
  """An expert without a choice from some step on: that of its last one, 0 if it had none."""

  layer: int
  expert: int
  step: int


class DeathTracker:
  """Notes for each expert when it was chosen last."""

  def __init__(self) -> None:
    self._last_step = 0
    self._chosen: dict[int, np.ndarray] = {}

  def add(self, step: int, loads: Mapping[int, np.ndarray]) -> None:
    """Takes the loads of a step: {layer: share of choices by expert}."""
    self._last_step = step
    for layer, load_E in loads.items():
      last_E = self._chosen.setdefault(layer, np.zeros(len(load_E), np.int64))
      last_E[load_E > 0] = step

  def found(self) -> list[Death]:
    """Returns who has not been chosen for at least 20 steps and 5% of the run, up to its end."""
    least = max(MIN_STEPS, MIN_SHARE * self._last_step)
    return [
      Death(layer, expert, int(step))
      for layer, last_E in sorted(self._chosen.items())
      for expert, step in enumerate(last_E)
      if self._last_step - step >= least
    ]


def expert_deaths(lines: Iterable[Mapping[str, Any]]) -> list[Death]:
  """Returns the experts that died, from the lines of metrics.jsonl in order.

  Dead is who got no choice from some step to the last for at least 20 steps and 5% of the run; one
  that was chosen again later is not.
  """
  watch = DeathTracker()
  for line in lines:
    layers = line.get("layers", {})
    watch.add(line["step"], {int(n): np.asarray(layer["load"]) for n, layer in layers.items()})
  return watch.found()


def sentences(deaths: Iterable[Death], tokens_at: Mapping[int, str]) -> list[str]:
  """Returns a sentence for each; `tokens_at` has the tokens of each step of a death as text."""
  return [
    f"layer {death.layer}: expert {death.expert} "
    + (
      f"has had no token since step {death.step} ({tokens_at.get(death.step, '?')} tokens)"
      if death.step
      else "has never had a token (none since step 0)"
    )
    for death in deaths
  ]
