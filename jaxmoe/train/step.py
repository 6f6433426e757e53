"""The training step: `(state, batch) -> (state, metrics)`, compiled once, state donated."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxmoe.core.rng import Keys
from jaxmoe.train.gradients import Batch, Gradients, Metrics
from jaxmoe.train.state import State

Step = Callable[[State, Batch], tuple[State, Metrics]]


def make_step(
  gradients: Gradients,
  transform: optax.GradientTransformation,
  schedule: Callable[[Any], Any],
  seed: int,
) -> Step:
  """Returns the step; jit it with its first argument donated.

  A step whose loss or gradient is not finite moves neither parameters nor optimizer; it counts in
  `state.skipped`. The learning rate is a function of the updates made, not of the steps.
  """

  def step(state: State, batch: Batch) -> tuple[State, Metrics]:
    keys = (Keys.from_seed(seed) / "forward").at(state.step)
    grads, metrics = gradients(state.params, batch, keys)
    norm = optax.tree.norm(grads)
    finite = jnp.isfinite(metrics["total_loss"]) & jnp.isfinite(norm)
    with jax.named_scope("optimizer"):
      updates, optimizer = transform.update(grads, state.optimizer, state.params)
      params = optax.apply_updates(state.params, updates)
    keep = functools.partial(jnp.where, finite)
    skipped = 1 - finite.astype(jnp.int32)
    new = State(
      step=state.step + 1,
      params=jax.tree.map(keep, params, state.params),
      optimizer=jax.tree.map(keep, optimizer, state.optimizer),
      skipped=state.skipped + skipped,
    )
    metrics["learning_rate"] = jnp.asarray(schedule(state.step - state.skipped), jnp.float32)
    return new, {**metrics, "grad_norm": norm, "skipped": new.skipped, "finite": finite}

  return step
