"""The training step: `(state, batch) -> (state, metrics)`, compiled once, state donated."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxmoe.core.rng import Keys
from jaxmoe.models.transformer import gate_path
from jaxmoe.ops.soft_tree import TreeSums
from jaxmoe.train.gradients import Batch, Gradients, Metrics, without
from jaxmoe.train.param_update import ParamUpdate, count_unmoved
from jaxmoe.train.train_state import SpikeWindow, State

Step = Callable[[State, Batch], tuple[State, Metrics]]
# Least deviation of loss and gradient norm, as shares of their means. A loss that has stood still
# says nothing of what is normal; a norm has heavy tails: of 1,300 harmless steps of the quickstart
# five lay 6 deviations above the mean (none 1.9 times the median), where no loss lay 2.3.
_LEAST_DEVIATION_2 = (0.01, 0.5)


def make_step(
  gradients: Gradients,
  transform: optax.GradientTransformation,
  schedule: Callable[[Any], Any],
  seed: int,
  spike_factor: float = 6.0,
  update_buffers: Callable[[Any, Any, Any], Any] | None = None,
  moves: ParamUpdate | None = None,
) -> Step:
  """Returns the step; jit it with its first argument donated.

  A step whose loss or gradient is not finite, or spikes above the last ones (`Recovery`), moves
  neither parameters nor optimizer; it counts in `state.skipped`. Nor does one in which no token of
  any microbatch and device has a label, whose loss is the mean of nothing: it counts in
  `state.unlabelled`, is neither harmful nor harmless, and leaves the skips in a row as they are.
  The learning rate is a function of the updates made, not of the steps.

  Args:
    gradients: Makes the gradient and the metrics.
    transform: The optimizer; it may take `trees`, what domains see of gates that are trees.
    schedule: The learning rate by update, for the metrics.
    seed: Of the randomness of forward passes, and of rounding by chance.
    spike_factor: Deviations above which a step does harm.
    update_buffers: `Decoder.update_buffers`: buffers follow a rule of their own, from where they
      stood, whatever the optimizer made of them; None for a model without any.
    moves: How updates reach the parameters.
  """

  transform, moves = optax.with_extra_args_support(transform), moves or ParamUpdate()

  def step(state: State, batch: Batch) -> tuple[State, Metrics]:
    keys = (Keys.from_seed(seed) / "forward").at(state.step)
    grads, metrics = gradients(state.params, batch, keys)
    norm = optax.tree.norm(grads)
    finite = jnp.isfinite(metrics["total_loss"]) & jnp.isfinite(norm)
    seen_2 = jnp.stack([metrics["loss"].value, norm])
    spike = finite & is_spike(state.recent, seen_2, spike_factor)
    labelled = metrics["loss"].weight > 0
    step_ok = labelled & finite & ~spike
    with jax.named_scope("optimizer"):
      mine, trees = moves.constrain(state.params), sums_of_trees(metrics["layers"])
      updates, optimizer = transform.update(grads, state.optimizer, mine, trees=trees)
      params = moves.constrain(moves.apply(mine, updates, seed, state.step))
      if moves.counts_unmoved:
        moved = count_unmoved(mine, updates, params)
        metrics["unmoved"] = jax.tree.map(lambda count: jnp.where(step_ok, count, 0), moved)
    if update_buffers is not None:
      params = update_buffers(state.params, params, metrics["layers"])
    metrics["layers"] = without(metrics["layers"], "statistics", "domain_sums")
    keep = functools.partial(jnp.where, step_ok)
    skipped, unlabelled = (what.astype(jnp.int32) for what in (labelled & ~step_ok, ~labelled))
    new = State(
      step=state.step + 1,
      params=jax.tree.map(keep, params, state.params),
      optimizer=jax.tree.map(keep, optimizer, state.optimizer),
      skipped=state.skipped + skipped,
      in_a_row=jnp.where(labelled, (state.in_a_row + 1) * skipped, state.in_a_row),
      recent=jax.tree.map(keep, remember(state.recent, seen_2), state.recent),
      unlabelled=state.unlabelled + unlabelled,
    )
    made = state.step - state.skipped - state.unlabelled
    metrics["learning_rate"] = jnp.asarray(schedule(made), jnp.float32)
    counters = {name: getattr(new, name) for name in ("skipped", "unlabelled", "in_a_row")}
    counters["finite"] = finite
    return new, {**metrics, "grad_norm": norm, **counters}

  return step


def sums_of_trees(layers: Any) -> dict[str, TreeSums]:
  """Returns what domains see of each gate that is a tree, by its path; none if nobody asked."""
  return {
    gate_path(s, place): sums.domain_sums
    for s, places in layers.items()
    for place, sums in places.items()
    if sums is not None and sums.domain_sums is not None
  }


def is_spike(recent: SpikeWindow, seen_2: jax.Array, factor: float) -> jax.Array:
  """Returns whether loss or gradient norm lies too far above the last W; never before there are W.

  Too far is the mean plus `factor` standard deviations, of which one is at least 1% of the mean
  for the loss and half of it for the norm.
  """
  window = recent.values_2W.shape[1]
  if not window:
    return jnp.asarray(False)
  mean_2 = jnp.mean(recent.values_2W, axis=1)
  deviation_2 = jnp.std(recent.values_2W, axis=1)
  least_2 = jnp.asarray(_LEAST_DEVIATION_2) * jnp.abs(mean_2)
  limit_2 = mean_2 + factor * jnp.maximum(deviation_2, least_2)
  return (recent.count >= window) & jnp.any(seen_2 > limit_2)


def remember(recent: SpikeWindow, seen_2: jax.Array) -> SpikeWindow:
  """Returns the ring with loss and gradient norm of one more step in place of the oldest."""
  window = recent.values_2W.shape[1]
  if not window:
    return recent
  values_2W = recent.values_2W.at[:, recent.count % window].set(seen_2)
  return SpikeWindow(values_2W, recent.count + 1)
