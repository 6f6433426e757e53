"""The program of one training step, lowered from shapes alone: nothing is allocated."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding

from jaxmoe.core.layout import Layout
from jaxmoe.data.batches import NAMES
from jaxmoe.models.transformer import Decoder, Params
from jaxmoe.optim import hold, make_schedule
from jaxmoe.train.experiment import Experiment
from jaxmoe.train.param_update import ParamUpdate, may_underflow
from jaxmoe.train.spread import spread_gradients
from jaxmoe.train.step import make_step
from jaxmoe.train.train_state import State, StateSpec


def abstract_state(spec: StateSpec) -> State:
  """Returns the shapes of the state with their shardings."""
  return jax.tree.map(_put, spec.shapes, spec.shardings)


def abstract_batch(experiment: Experiment, layout: Layout) -> dict[str, jax.ShapeDtypeStruct]:
  """Returns the shapes of a batch, (B, L) int32 each, as `Layout.put_batch` shards them."""
  shape = (experiment.train.batch_size, experiment.data.seq_len)
  rows = jax.ShapeDtypeStruct(shape, jnp.int32)
  sharding = NamedSharding(layout.mesh, layout.spec("activations", ("batch", "length")))
  return {name: _put(rows, sharding) for name in NAMES}


def lower_step(
  experiment: Experiment, decoder: Decoder, spec: StateSpec, layout: Layout, state: Any, batch: Any
) -> jax.stages.Lowered:
  """Returns the step `(state, batch) -> (state, metrics)` for these, with the state donated."""
  train = experiment.train
  frozen = experiment.frozen(decoder)
  of_grads = layout.shardings("grads", decoder.dims, decoder.shapes)

  def update_buffers(before: Params, params: Params, layers: Any) -> Params:
    return hold(frozen, before, decoder.update_buffers(before, params, layers))

  step = make_step(
    spread_gradients(decoder, train.num_micro, experiment.parallel, layout, experiment.compare),
    experiment.transform(decoder),
    make_schedule(experiment.optim, train.num_steps),
    train.seed,
    train.recovery.spike_factor,
    update_buffers,
    ParamUpdate(
      lambda params: jax.lax.with_sharding_constraint(params, of_grads),
      spec.masters,
      decoder.layer_groups,
      may_underflow(experiment.optim),
    ),
  )
  jitted = jax.jit(step, donate_argnums=0, out_shardings=(spec.shardings, layout.replicated))
  return jitted.lower(state, batch)


def _put(leaf: Any, sharding: NamedSharding) -> jax.ShapeDtypeStruct:
  return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
