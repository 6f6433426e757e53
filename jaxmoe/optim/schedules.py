"""Learning rates as functions of the step: warm-up, then constant, cosine or a late decay.

Step s is the update number s, counted from 0, of a run of `num_steps` updates. Warm-up is linear
from 0 at step -1 to the peak at step `warmup_steps`, and a decay reaches its final value at step
`num_steps`: neither the first nor the last update is spent at a rate of zero.

A decay is drawn over the whole run: where a run is made longer, the rate rises again. To go on from
where it had come down to, `earlier_ends` names the lengths that the run had before. Up to the first
of them the schedule is that of a run of this length, and from each on that of a run of the updates
to the next, without a warm-up, whose peak is the rate come down to.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable
from typing import Protocol

import optax

from jaxmoe.core.config_io import added
from jaxmoe.core.errors import InputError


class Schedule(Protocol):
  """A member of SCHEDULES."""

  @property
  def warmup_steps(self) -> int:
    """The first step at the peak rate."""

  def schedule(self, peak: float, num_steps: int) -> optax.Schedule:
    """Returns the rate as a function of the step; InputError if the phases do not fit."""

  def kept_ends(self, num_steps: int) -> tuple[int, ...]:
    """Returns `earlier_ends` for a run of `num_steps` made longer, () where they are of no use."""


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

  def kept_ends(self, num_steps: int) -> tuple[int, ...]:
    """Returns (): the rate is the same however long the run is."""
    return ()


@dataclasses.dataclass(frozen=True)
class Cosine:
  """Warm-up, then half a cosine down to `final_fraction` of the peak (arXiv:1608.03983, eq. 5)."""

  warmup_steps: int = 100
  final_fraction: float = 0.1
  earlier_ends: tuple[int, ...] = added((), before=())

  def __post_init__(self) -> None:
    _check_warmup(self.warmup_steps)
    _check_final(self.final_fraction)
    _check_ends(self.earlier_ends, self.final_fraction)

  def schedule(self, peak: float, num_steps: int) -> optax.Schedule:
    """Returns the rate as a function of the step."""
    return _prolonged(self, self._alone, peak, num_steps)

  def kept_ends(self, num_steps: int) -> tuple[int, ...]:
    """Returns the ends so far and this one; () if nothing is learned at the rate of the end."""
    return (*self.earlier_ends, num_steps) if self.final_fraction else ()

  def _alone(self, peak: float, warmup_steps: int, num_steps: int) -> optax.Schedule:
    _check_fit(warmup_steps, 1, num_steps)
    cosine = optax.cosine_decay_schedule(peak, num_steps - warmup_steps, self.final_fraction)
    return _warm_up(peak, warmup_steps, cosine)


@dataclasses.dataclass(frozen=True)
class Wsd:
  """Warm-up, stable, decay: linear over the last `decay_fraction` of the run (arXiv:2404.06395).

  A stable phase can be prolonged, or decayed from any of its checkpoints. The decay is linear
  (arXiv:2405.18392) where the paper's is exponential, so that it can end at zero.
  """

  warmup_steps: int = 100
  decay_fraction: float = 0.2
  final_fraction: float = 0.0
  earlier_ends: tuple[int, ...] = added((), before=())

  def __post_init__(self) -> None:
    _check_warmup(self.warmup_steps)
    _check_final(self.final_fraction)
    _check_ends(self.earlier_ends, self.final_fraction)
    if not 0 < self.decay_fraction <= 1:
      raise InputError(
        f"the decay is a part of the run: decay_fraction={self.decay_fraction}; "
        "set it above 0 and at most 1"
      )

  def schedule(self, peak: float, num_steps: int) -> optax.Schedule:
    """Returns the rate as a function of the step."""
    return _prolonged(self, self._alone, peak, num_steps)

  def kept_ends(self, num_steps: int) -> tuple[int, ...]:
    """Returns the ends so far and this one; () if nothing is learned at the rate of the end."""
    return (*self.earlier_ends, num_steps) if self.final_fraction else ()

  def _alone(self, peak: float, warmup_steps: int, num_steps: int) -> optax.Schedule:
    decay_steps = max(1, round(self.decay_fraction * num_steps))
    _check_fit(warmup_steps, decay_steps, num_steps)
    stable_steps = num_steps - decay_steps - warmup_steps
    decay = optax.linear_schedule(peak, peak * self.final_fraction, decay_steps)
    stable = optax.join_schedules([optax.constant_schedule(peak), decay], [stable_steps])
    return _warm_up(peak, warmup_steps, stable)


def _prolonged(
  of: Cosine | Wsd,
  alone: Callable[[float, int, int], optax.Schedule],
  peak: float,
  num_steps: int,
) -> optax.Schedule:
  """Returns the schedule of a run with `of.earlier_ends`; `alone` makes that of one without."""
  ends = (*of.earlier_ends, num_steps)
  if len(ends) > 1 and num_steps <= ends[-2]:
    raise InputError(
      f"the run must end after earlier_ends={of.earlier_ends}: {num_steps=}; raise num_steps, or "
      "leave out what is not earlier"
    )
  parts = [alone(peak, of.warmup_steps, ends[0])]
  for start, end in itertools.pairwise(ends):
    peak *= of.final_fraction
    parts.append(alone(peak, 0, end - start))
  return optax.join_schedules(parts, ends[:-1]) if len(parts) > 1 else parts[0]


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


def _check_ends(ends: tuple[int, ...], final_fraction: float) -> None:
  if any(end <= start for start, end in itertools.pairwise((0, *ends))):
    raise InputError(f"earlier_ends must rise, and be above 0: earlier_ends={ends}")
  if ends and not final_fraction:
    raise InputError(
      f"nothing is learned after an end at a rate of zero: earlier_ends={ends}, {final_fraction=}; "
      "leave out earlier_ends, and the decay is drawn anew over the whole run"
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
