"""Learning rates as functions of the step: warm-up, then constant, cosine or a late decay.

Step s is the update number s, counted from 0, of a run of `num_steps` updates. Warm-up is linear
from 0 at step -1 to the peak at step `warmup_steps`, and a decay reaches its final value at step
`num_steps`: neither the first nor the last update is spent at a rate of zero.
"""

from __future__ import annotations

import dataclasses
from typing import Protocol

import optax

from jaxmoe.core.errors import InputError


class Schedule(Protocol):
  """A member of SCHEDULES."""

  @property
  def warmup_steps(self) -> int:
    """The first step at the peak rate."""

  def schedule(self, peak: float, num_steps: int) -> optax.Schedule:
    """Returns the rate as a function of the step; InputError if the phases do not fit."""


@dataclasses.dataclass(frozen=True)
class Constant:
  """Warm-up, then the peak rate to the end."""

  warmup_steps: int = 0

  def __post_init__(self) -> None:
    _check_warmup(self.warmup_steps)

  def schedule(self, peak: float, num_steps: int) -> optax.Schedule:
    """Returns the rate as a function of the step."""
    _check_fit(self.warmup_steps, 0, num_steps)
    return _warm_up(peak, self.warmup_steps, optax.constant_schedule(peak))


@dataclasses.dataclass(frozen=True)
class Cosine:
  """Warm-up, then half a cosine down to `final_fraction` of the peak (arXiv:1608.03983, eq. 5)."""

  warmup_steps: int = 100
  final_fraction: float = 0.1

  def __post_init__(self) -> None:
    _check_warmup(self.warmup_steps)
    _check_final(self.final_fraction)

  def schedule(self, peak: float, num_steps: int) -> optax.Schedule:
    """Returns the rate as a function of the step."""
    _check_fit(self.warmup_steps, 1, num_steps)
    decay_steps = num_steps - self.warmup_steps
    cosine = optax.cosine_decay_schedule(peak, decay_steps, self.final_fraction)
    return _warm_up(peak, self.warmup_steps, cosine)


@dataclasses.dataclass(frozen=True)
class Wsd:
  """Warm-up, stable, decay: linear over the last `decay_fraction` of the run (arXiv:2404.06395).

  A stable phase can be prolonged, or decayed from any of its checkpoints. The decay is linear
  (arXiv:2405.18392) where the paper's is exponential, so that it can end at zero.
  """

  warmup_steps: int = 100
  decay_fraction: float = 0.2
  final_fraction: float = 0.0

  def __post_init__(self) -> None:
    _check_warmup(self.warmup_steps)
    _check_final(self.final_fraction)
    if not 0 < self.decay_fraction <= 1:
      raise InputError(
        f"the decay is a part of the run: decay_fraction={self.decay_fraction}; "
        "set it above 0 and at most 1"
      )

  def schedule(self, peak: float, num_steps: int) -> optax.Schedule:
    """Returns the rate as a function of the step."""
    decay_steps = max(1, round(self.decay_fraction * num_steps))
    _check_fit(self.warmup_steps, decay_steps, num_steps)
    stable_steps = num_steps - decay_steps - self.warmup_steps
    decay = optax.linear_schedule(peak, peak * self.final_fraction, decay_steps)
    stable = optax.join_schedules([optax.constant_schedule(peak), decay], [stable_steps])
    return _warm_up(peak, self.warmup_steps, stable)


def _warm_up(peak: float, warmup_steps: int, rest: optax.Schedule) -> optax.Schedule:
  if warmup_steps == 0:
    return rest
  rise = optax.linear_schedule(peak / (warmup_steps + 1), peak, warmup_steps)
  return optax.join_schedules([rise, rest], [warmup_steps])


def _check_warmup(warmup_steps: int) -> None:
  if warmup_steps < 0:
    raise InputError(f"warm-up has no negative length: {warmup_steps=}; set it to 0 or more")


def _check_final(final_fraction: float) -> None:
  if not 0 <= final_fraction <= 1:
    raise InputError(
      f"the final rate is a part of the peak: {final_fraction=}; set it between 0 and 1"
    )


def _check_fit(warmup_steps: int, decay_steps: int, num_steps: int) -> None:
  if num_steps < 1 or warmup_steps + decay_steps > num_steps:
    raise InputError(
      f"warm-up and decay must fit into the run: {warmup_steps=}, {decay_steps=}, {num_steps=}; "
      "lower warmup_steps or raise num_steps"
    )


SCHEDULES = {
  "constant": (Constant, Constant(warmup_steps=2)),
  "cosine": (Cosine, Cosine(warmup_steps=2)),
  "wsd": (Wsd, Wsd(warmup_steps=2)),
}
