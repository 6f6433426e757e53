"""Underflow of updates: those too small to change the weights they are added to, and a warning."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from jaxmoe.models.transformer import Params
from jaxmoe.optim import Optim
from jaxmoe.train.observers import Observers

STEPS = 20
_SAFE_RATE = 1e-6


def may_underflow(optim: Optim) -> bool:
  """Whether updates of a recipe could be too small to change most of what they are added to.

  Bfloat16 masters are 2**-9 apart, float32 ones 2**-25: at a learning rate of 1e-6 and above only
  weights beyond 10 stand still in float32, and nothing is counted.
  """
  return optim.master_dtype != "float32" or optim.learning_rate < _SAFE_RATE


def count_unmoved(before: Params, updates: Any, after: Params) -> dict[str, jax.Array]:
  """Returns how many entries had an update that is not zero, and how many of them did not move."""

  def counted(mask: jax.Array) -> jax.Array:
    # An int32 row by row: neither type holds the number of entries of a large leaf.
    rows = jnp.sum(jnp.atleast_1d(mask), axis=-1, dtype=jnp.int32)
    return jnp.sum(rows.astype(jnp.float32))

  def of_leaf(old: jax.Array, update: jax.Array, new: jax.Array) -> jax.Array:
    updated = update != 0
    return jnp.stack([counted(updated), counted(updated & (new == old))])

  found = jax.tree.leaves(jax.tree.map(of_leaf, before, updates, after))
  updated, unmoved = sum(found, jnp.zeros(2))
  return {"updated": updated, "unmoved": unmoved}


class UpdateUnderflow:
  """Looks at the first steps after warm-up, and tells once if most entries stood still in them.

  Args:
    optim: The recipe.
    num_steps: Of the run.
    observers: Who is told.
  """

  def __init__(self, optim: Optim, num_steps: int, observers: Observers):
    self._optim, self._observers = optim, observers
    self._first = optim.schedule.warmup_steps + 1
    self._last = min(self._first + STEPS - 1, num_steps)
    self._updated = self._unmoved = 0.0

  def __call__(self, step: int, metrics: dict[str, Any]) -> None:
    """Adds the counts of a step; they are zero of one that changed nothing."""
    if not self._first <= step <= self._last:
      return
    found = metrics["unmoved"]
    self._updated += float(found["updated"])
    self._unmoved += float(found["unmoved"])
    if step == self._last and 2 * self._unmoved > self._updated:
      self._report(step)

  def _report(self, step: int) -> None:
    share, optim = self._unmoved / self._updated, self._optim
    why = f"optim.learning_rate={optim.learning_rate:g} is too small for {optim.master_dtype}"
    if optim.master_dtype == "bfloat16":
      why = "bfloat16 masters move by chance, right in the mean; float32 ones each time"
    self._observers.log.event(
      "standstill", step=step, share=round(share, 4), master_dtype=optim.master_dtype,
      learning_rate=optim.learning_rate,
    )  # fmt: skip
    self._observers.display.say(
      f"{share:.0%} of the updates since warm-up left their weight as it was, bit for bit: {why}"
    )
