"""The gradients of the first step of a real run, on its own devices, against one device."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxmoe.core import param_names
from jaxmoe.core.errors import InputError
from jaxmoe.core.layout import Layout
from jaxmoe.core.parallel_context import ParallelContext
from jaxmoe.core.rng import Keys
from jaxmoe.models.block import MLPConfig, MoEConfig
from jaxmoe.models.transformer import Decoder
from jaxmoe.moe.dispatch import Dense
from jaxmoe.parallel.block_order import in_time
from jaxmoe.parity.cell_errors import tree_error
from jaxmoe.parity.exchange_drops import ExchangeBounded, with_exchange_drops
from jaxmoe.train.experiment import Experiment
from jaxmoe.train.gradients import make_gradients
from jaxmoe.train.kernels import references
from jaxmoe.train.sharded_gradients import context_of, sharded_gradients

TOLERANCE = 1e-4
"""Largest |a - b| / (|b| + 0.01 |all b|) of a gradient."""


def selfcheck(experiment: Experiment, layout: Layout, params: Any, batch: Any) -> str:
  """Returns a line that says how equal the gradients of a layout are to those of one device.

  The oracle computes every expert for every token, in place of a dispatcher that drops nothing,
  and holds parameters and activations of the whole batch on one device of each process.

  A recipe of bfloat16 is compared in float32, parameters, products and collectives alike, made as
  exact as the devices can. In bfloat16 no bound tells a wrong layout from rounding: where two
  experts score almost alike, the last bit chooses, and a row's gradient is another's.

  Args:
    experiment: The recipe.
    layout: Where everything lies.
    params: As they lie.
    batch: Of one step, as it lies.

  Raises:
    InputError: they differ by more than rounding.
  """
  with jax.default_matmul_precision("highest"):
    found, true = _gradients(experiment, layout, params, batch)
  error, limit = tree_error(found, true), TOLERANCE
  devices = experiment.parallel.num_devices
  if not error <= limit:
    raise InputError(
      f"selfcheck: gradients on {devices} devices differ from those of one by {error:.1e}, more "
      f"than {limit:.0e}: this layout is wrong on these devices; use another, and report it"
    )
  return f"selfcheck: gradients on {devices} devices equal those of one within {error:.1e}"


def _gradients(experiment: Experiment, layout: Layout, params: Any, batch: Any) -> tuple[Any, Any]:
  """Returns the gradients of the layout, and the oracle's, as NumPy arrays."""
  decoder = _in_float32(experiment.decoder(layout, strict=False))
  train, parallel = experiment.train, experiment.parallel
  keys, compare = Keys.from_seed(train.seed) / "selfcheck", experiment.compare
  context = context_of(decoder, parallel, layout)
  spread = sharded_gradients(decoder, train.num_micro, context, compare)

  def on_all(params: Any, batch: Any, root: jax.Array) -> Any:
    return spread(_exact(params), batch, Keys(root))[0]

  found = jax.jit(on_all, out_shardings=layout.replicated)(params, batch, keys.root)
  whole = jax.jit(lambda tree: tree, out_shardings=layout.replicated)((params, batch))
  device = jax.local_devices()[0]
  params, batch = jax.tree.map(_local, whole)
  depends_on_shard = any(moe.depends_on_shard for moe in decoder.config.moe_records())
  groups = parallel.num_row_groups if depends_on_shard else 1
  dense = _dense(decoder, parallel.expert_degree)
  params = jax.device_put(_in_stacks_of(dense, params, decoder), device)
  batch = in_time(jax.device_put(batch, device))
  oracle = make_gradients(
    dense, train.num_micro * groups, parallel.num_row_groups // groups, compare
  )

  def on_one(params: Any, batch: Any, root: jax.Array) -> Any:
    return oracle(_exact(params), batch, Keys(root))[0]

  true = jax.jit(on_one)(params, batch, jax.device_put(keys.root, device))
  found = _in_stacks_of(dense, jax.tree.map(_local, found), decoder)
  return found, jax.tree.map(_local, true)


def _in_stacks_of(wanted: Decoder, params: Any, decoder: Decoder) -> Any:
  """Returns parameters, whose layers may lie as stages have them, as another decoder has them."""
  if wanted.layer_groups == decoder.layer_groups:
    return params
  flat = param_names.unstack(param_names.flatten(params), decoder.layer_groups)
  stacked = param_names.stack(flat, list(param_names.flatten(wanted.shapes)), wanted.layer_groups)
  return param_names.unflatten(wanted.shapes, stacked)


def _in_float32(decoder: Decoder) -> Decoder:
  """Returns the model with float32 products."""
  config = dataclasses.replace(decoder.config, dtype="float32")
  return Decoder(config, decoder.vocab_size, decoder.parallel, decoder.layer_groups)


def _exact(params: Any) -> Any:
  """Returns parameters whose gradients are not rounded to bfloat16."""
  return jax.tree.map(
    lambda leaf: leaf.astype(jnp.float32) if leaf.dtype == jnp.bfloat16 else leaf, params
  )


def _local(leaf: Any) -> np.ndarray:
  """Returns a replicated array's values from a device of this process."""
  return np.asarray(leaf.addressable_data(0))


def _dense(decoder: Decoder, degree: int) -> Decoder:
  """Returns the model in which dispatchers that drop nothing compute everything, by references."""

  def change(ffn: MLPConfig | MoEConfig) -> MLPConfig | MoEConfig:
    if (
      isinstance(ffn, MLPConfig)
      or ffn.dispatch.depends_on_shard
      or isinstance(ffn.dispatch, ExchangeBounded)
    ):
      return ffn
    return dataclasses.replace(ffn, dispatch=Dense())

  model = with_exchange_drops(decoder.config, degree).map_ffns(change)
  return Decoder(model, decoder.vocab_size, ParallelContext(chooser=references()))
