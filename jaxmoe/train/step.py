"""The train step in halves and whole: `(state, batch) -> (state, metrics)`, with the state donated.

The gradient half makes gradient, metrics and router statistics; the update half makes the next
state of them. Composed they are one program, which is lowered from shapes alone: nothing is
allocated. Run apart, each is a program of its own, and what lies between them may go elsewhere.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding

from jaxmoe.core.kept_programs import Program
from jaxmoe.core.layout import Layout
from jaxmoe.core.parallel_context import ParallelContext
from jaxmoe.core.param_names import LayerAddress, LayerGroupSizes
from jaxmoe.core.rng import Keys
from jaxmoe.data.batches import NAMES
from jaxmoe.models.transformer import Decoder, Params
from jaxmoe.ops.soft_tree import TreeSums
from jaxmoe.optim import Masters, apply_updates, hold, make_schedule
from jaxmoe.parallel import SLOT
from jaxmoe.train.experiment import Experiment
from jaxmoe.train.gradients import Batch, Gradients, Metrics, Statistics, without
from jaxmoe.train.sharded_gradients import context_of, sharded_gradients
from jaxmoe.train.train_state import SpikeWindow, State, StateSpec
from jaxmoe.train.update_underflow import count_unmoved, may_underflow

Step = Callable[[State, Batch], tuple[State, Metrics]]
# Least deviation of loss and gradient norm, as shares of their means. A loss that has stood still
# says nothing of what is normal; a norm has heavy tails: of 1,300 harmless steps of the quickstart
# five lay 6 deviations above the mean (none 1.9 times the median), where no loss lay 2.3.
_LEAST_DEVIATION_2 = (0.01, 0.5)


@dataclasses.dataclass(frozen=True)
class ParamUpdate:
  """How updates reach the parameters.

  Attributes:
    constrain: Lays parameters like gradients and moments, so that each device updates its shards of
      what is whole elsewhere (ZeRO 1 and 2).
    masters: In which dtypes parameters are kept.
    layer_groups: How layers are grouped in memory; None where there is no stack of them.
    counts_unmoved: Whether entries that stay as they were are counted.
  """

  constrain: Callable[[Params], Params] = lambda params: params
  masters: Masters = Masters()
  layer_groups: LayerGroupSizes | None = None
  counts_unmoved: bool = False

  def apply(self, params: Params, updates: Any, seed: int, step: jax.Array) -> Params:
    """Returns the parameters after updates; where these are rounded by chance, by seed and step."""
    if self.masters.dtype == "float32":
      return optax.apply_updates(params, updates)
    keys = (Keys.from_seed(seed) / "rounding").at(step)
    return apply_updates(self.masters, params, updates, keys, self.layer_groups)


@dataclasses.dataclass(frozen=True, eq=False)  # by identity, for programs are kept by function
class TrainStep:
  """The step; jit it with its first argument donated.

  A step whose loss or gradient is not finite, or spikes above the last ones (`Recovery`), moves
  neither parameters nor optimizer; it counts in `state.skipped`. Nor does one in which no token of
  any microbatch and device has a label, whose loss is the mean of nothing: it counts in
  `state.unlabelled`, is neither harmful nor harmless, and leaves the skips in a row as they are.
  The learning rate is a function of the updates made, not of the steps.

  Attributes:
    of_params: Makes gradient, metrics and statistics of parameters, a batch and keys.
    transform: The optimizer, guarded (`ops/guard.py`): it takes `ok`, and `trees`, what domains
      see of gates that are trees.
    schedule: The learning rate by update, for the metrics.
    seed: Of the randomness of forward passes, and of rounding by chance.
    spike_factor: Deviations above which a step does harm.
    update_buffers: `Decoder.update_buffers`: buffers follow a rule of their own, from where they
      stood, whatever the optimizer made of them; None for a model without any.
    param_update: How updates reach the parameters.
  """

  of_params: Gradients
  transform: optax.GradientTransformationExtraArgs
  schedule: Callable[[Any], Any]
  seed: int
  spike_factor: float = 6.0
  update_buffers: Callable[[Any, Any, Any, Any], Any] | None = None
  param_update: ParamUpdate = ParamUpdate()

  def __call__(self, state: State, batch: Batch) -> tuple[State, Metrics]:
    """Returns the next state, and the metrics of the step."""
    return self.apply(state, *self.gradients(state, batch))

  def gradients(self, state: State, batch: Batch) -> tuple[Params, Metrics, Statistics]:
    """Returns the gradient, the metrics, and what buffers of routers are updated from."""
    keys = (Keys.from_seed(self.seed) / "forward").at(state.step)
    return self.of_params(state.params, batch, keys)

  def apply(
    self, state: State, grads: Params, metrics: Metrics, statistics: Statistics
  ) -> tuple[State, Metrics]:
    """Returns the next state, and the metrics of the step; the arguments are those of `gradients`.

    Args:
      state: The state that the gradient was made of, or one that has moved since then.
      grads: The gradient, as `gradients` lays it.
      metrics: Those of the gradient; the rest of a step's are added.
      statistics: Of each token.
    """
    metrics, norm = dict(metrics), optax.tree.norm(grads)
    finite = jnp.isfinite(metrics["total_loss"]) & jnp.isfinite(norm)
    seen_2 = jnp.stack([metrics["loss"].value, norm])
    spike = finite & is_spike(state.recent, seen_2, self.spike_factor)
    labelled = metrics["loss"].weight > 0
    step_ok = labelled & finite & ~spike
    params, optimizer, moved = self._updated(state, grads, metrics["layers"], step_ok)
    if moved is not None:
      metrics["unmoved"] = jax.tree.map(lambda count: jnp.where(step_ok, count, 0), moved)
    if self.update_buffers is not None:
      params = self.update_buffers(state.params, params, metrics["layers"], statistics)
    metrics["layers"] = without(metrics["layers"], "domain_sums")
    keep = functools.partial(jnp.where, step_ok)
    skipped, unlabelled = (what.astype(jnp.int32) for what in (labelled & ~step_ok, ~labelled))
    new = State(
      step=state.step + 1,
      params=jax.tree.map(keep, params, state.params),
      optimizer=optimizer,
      skipped=state.skipped + skipped,
      in_a_row=jnp.where(labelled, (state.in_a_row + 1) * skipped, state.in_a_row),
      recent=jax.tree.map(keep, remember(state.recent, seen_2), state.recent),
      unlabelled=state.unlabelled + unlabelled,
    )
    made = state.step - state.skipped - state.unlabelled
    metrics["learning_rate"] = jnp.asarray(self.schedule(made), jnp.float32)
    counters = {name: getattr(new, name) for name in ("skipped", "unlabelled", "in_a_row")}
    return new, {**metrics, "grad_norm": norm, **counters, "finite": finite}

  @jax.named_scope("optimizer")
  def _updated(
    self, state: State, grads: Params, layers: Any, step_ok: jax.Array
  ) -> tuple[Params, Any, dict[str, jax.Array] | None]:
    """Returns parameters and optimizer state after the update, and how many entries stood still.

    Where the step is not `step_ok`, that state is the last one, and the rest is of no use.
    """
    update = self.param_update
    mine, trees = update.constrain(state.params), sums_of_trees(layers)
    updates, optimizer = self.transform.update(
      grads, state.optimizer, mine, trees=trees, ok=step_ok
    )
    params = update.constrain(update.apply(mine, updates, self.seed, state.step))
    moved = count_unmoved(mine, updates, params) if update.counts_unmoved else None
    return params, optimizer, moved


def build_train_step(
  experiment: Experiment, decoder: Decoder, context: ParallelContext, masters: Masters | None = None
) -> TrainStep:
  """Returns the step of a recipe on one device or over those of a mesh.

  Args:
    experiment: The recipe.
    decoder: Its model.
    context: Where it runs, as `context_of` makes it.
    masters: In which dtypes parameters train; None for those of the recipe.
  """
  train, frozen = experiment.train, experiment.frozen(decoder)

  def constrain(params: Params) -> Params:
    if context.layout is None:
      return params
    lie = context.layout.shardings("grads", decoder.dims, decoder.shapes)
    return jax.lax.with_sharding_constraint(params, lie)

  def held(before: Params, params: Params, layers: Any, statistics: Statistics) -> Params:
    return hold(frozen, before, decoder.update_buffers(before, params, layers, statistics))

  return TrainStep(
    sharded_gradients(decoder, train.num_micro, context, experiment.compare),
    experiment.transform(decoder),
    make_schedule(experiment.optim, train.num_steps),
    train.seed,
    train.recovery.spike_factor,
    held if frozen else decoder.update_buffers,
    ParamUpdate(
      constrain,
      masters or experiment.masters(decoder),
      decoder.layer_groups,
      may_underflow(experiment.optim),
    ),
  )


def step_program(
  experiment: Experiment, decoder: Decoder, spec: StateSpec, layout: Layout
) -> Program:
  """Returns the program `(state, batch) -> (state, metrics)`, with the state donated."""

  def step(state: State, batch: Batch) -> tuple[State, Metrics]:
    context = context_of(decoder, experiment.parallel, layout)
    return build_train_step(experiment, decoder, context, spec.masters)(state, batch)

  return Program("step", step, donate=(0,), out_shardings=(spec.shardings, layout.replicated))


def lower_step(
  experiment: Experiment, decoder: Decoder, spec: StateSpec, layout: Layout, state: Any, batch: Any
) -> jax.stages.Lowered:
  """Returns the step `(state, batch) -> (state, metrics)` for these, with the state donated."""
  return step_program(experiment, decoder, spec, layout).lower(state, batch)


def abstract_state(spec: StateSpec) -> State:
  """Returns the shapes of the state with their shardings."""
  return jax.tree.map(_put, spec.shapes, spec.shardings)


def abstract_batch(experiment: Experiment, layout: Layout) -> dict[str, jax.ShapeDtypeStruct]:
  """Returns the shapes of a batch, (B, L) int32 each, as `Layout.put_batch` shards them."""
  shape = (experiment.train.batch_size, experiment.data.seq_len)
  rows = jax.ShapeDtypeStruct(shape, jnp.int32)
  sharding = NamedSharding(layout.mesh, layout.spec("activations", ("batch", "length")))
  names = NAMES if layout.order_columns is None else (*NAMES, SLOT)
  return {name: _put(rows, sharding) for name in names}


def _put(leaf: Any, sharding: NamedSharding) -> jax.ShapeDtypeStruct:
  return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def sums_of_trees(layers: Any) -> dict[str, TreeSums]:
  """Returns what domains see of each gate that is a tree, by its path; none if nobody asked."""
  return {
    LayerAddress.parse(s, place).gate_path: sums.domain_sums
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
