"""One cell against one device: loss, gradients, an optimizer step, balance, drops."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxmoe.core import param_names
from jaxmoe.core.layout import Layout
from jaxmoe.core.rng import Keys
from jaxmoe.models.transformer import Decoder, Params, TransformerConfig
from jaxmoe.optim import AdamW, Constant, Optim, make_optimizer, state_dims
from jaxmoe.parallel import make_layout
from jaxmoe.parity.cells import Cell
from jaxmoe.parity.exchange_drops import with_exchange_drops
from jaxmoe.parity.fixture import ROWS, VOCAB, batch_of, decoder_of, params_of
from jaxmoe.train.gradients import Batch, Gradients, make_gradients
from jaxmoe.train.pipeline_stages import placed_groups
from jaxmoe.train.sharded_gradients import context_of, sharded_gradients

# An element may differ by 1e-5 of itself and 1e-7 of the norm of all: a leaf whose true gradient
# is zero is rounding alone.
RELATIVE, FLOOR = 1e-5, 1e-2
LIMITS = {"loss": 1e-6, "balance": 1e-6, "drops": 0.0}
"""Largest errors by quantity; RELATIVE for trees."""
# A key bias has no gradient and Adam would make a full step of its rounding: hence this eps.
OPTIM = Optim(AdamW(eps=1e-3), Constant(), learning_rate=1e-2)


def cell_errors(cell: Cell, micro: int | None = None) -> dict[str, float]:
  """Returns the largest error of each quantity of a cell; see LIMITS.

  Args:
    cell: What is tried, on the first devices of this process.
    micro: Microbatches of the spread step; by default one, and of a pipeline four or as many as
      there are rows.
  """
  if micro is None:
    rows = ROWS // cell.parallel.num_row_groups
    micro = 1 if cell.parallel.pipe == 1 else min(rows, max(4, cell.parallel.pipe))
  groups, degree = cell.parallel.num_row_groups, cell.parallel.expert_degree
  decoder = decoder_of(cell)
  in_turn = groups if any(moe.depends_on_shard for moe in decoder.config.moe_records()) else 1
  reference = _reference(
    with_exchange_drops(decoder.config, degree), in_turn * micro, groups // in_turn
  )
  found = _spread(cell, micro)
  return errors(found, reference)


def is_green(error: dict[str, float]) -> bool:
  """Whether all errors of a cell lie within their limits; not a number does not."""
  return all(value <= LIMITS.get(name, RELATIVE) for name, value in error.items())


def errors(found: dict[str, Any], reference: dict[str, Any]) -> dict[str, float]:
  """Returns the largest error of each quantity: of trees by `tree_error`."""
  result = {}
  for name, true in reference.items():
    if name == "drops":
      result[name] = _number_error(found[name], true, absolute=True)
    elif name in ("loss", "balance"):
      result[name] = _number_error(found[name], true)
    elif name == "balance_grads":
      # Of even loads they are zero, up to rounding of terms that are not.
      result[name] = tree_error(found[name], true, norm_of(reference["grads"]))
    else:
      result[name] = tree_error(found[name], true)
  return result


def norm_of(tree: Any) -> float:
  """Returns the norm of all leaves together."""
  leaves = [np.asarray(leaf, np.float64) for leaf in jax.tree.leaves(tree)]
  return float(np.sqrt(sum(np.sum(leaf**2) for leaf in leaves)))


def tree_error(found: Any, true: Any, norm: float | None = None) -> float:
  """Returns the largest |a - b| / (|b| + 0.01 |all b|); infinity where not finite.

  Args:
    found: a, a tree.
    true: b, of the same paths.
    norm: |all b|, where it is not that of `true`.
  """
  flat, expected = param_names.flatten(found), param_names.flatten(true)
  assert flat.keys() == expected.keys(), flat.keys() ^ expected.keys()
  arrays = {path: np.asarray(leaf, np.float64) for path, leaf in expected.items()}
  norm = norm_of(true) if norm is None else norm
  worst = 0.0
  for path, leaf in arrays.items():
    if leaf.size:
      scale = np.abs(leaf) + FLOOR * norm + 1e-30
      error = float(np.max(np.abs(np.asarray(flat[path], np.float64) - leaf) / scale))
      worst = max(worst, error if np.isfinite(error) else np.inf)
  return worst


def _number_error(found: Any, true: Any, absolute: bool = False) -> float:
  flat, expected = param_names.flatten(found), param_names.flatten(true)
  worst = 0.0
  for path, value in expected.items():
    a, b = np.asarray(flat[path], np.float64), np.asarray(value, np.float64)
    # The floor is for losses that are zero up to rounding, as router_z is of a tree.
    error = np.abs(a - b) if absolute else np.abs(a - b) / np.maximum(np.abs(b), 1e-3)
    worst = max(worst, float(np.max(error)) if np.isfinite(error).all() else np.inf)
  return worst


@functools.lru_cache(maxsize=64)
def _reference(model: TransformerConfig, micro: int, groups: int) -> dict[str, Any]:
  """Returns the quantities of a model on one device, in so many microbatches.

  Where what a token gets depends on the others of its device, each token group is a microbatch.

  Balance losses of scope `micro` take a microbatch as lying on `groups` devices.
  """
  decoder = Decoder(model, VOCAB)
  gradients = make_gradients(decoder, micro, groups)
  return _run(decoder, gradients, params_of(decoder), batch_of(), None)


def _spread(cell: Cell, micro: int) -> dict[str, Any]:
  plain = decoder_of(cell)
  groups = placed_groups(cell.parallel, plain.config, VOCAB)
  decoder = Decoder(plain.config, VOCAB, plain.parallel, groups)
  layout = make_layout(cell.parallel, jax.devices())
  gradients = sharded_gradients(decoder, micro, context_of(decoder, cell.parallel, layout))
  shardings = layout.shardings("params", decoder.dims, decoder.shapes)
  params = jax.device_put(_placed(params_of(plain), plain, decoder), shardings)
  return _run(decoder, gradients, params, layout.put_batch(batch_of()), layout)


def _run(
  decoder: Decoder, gradients: Gradients, params: Params, batch: Any, layout: Layout | None
) -> dict[str, Any]:
  """Returns the quantities of one step, compiled once: with labels, then for balance alone."""
  transform = make_optimizer(OPTIM, 10, decoder.parameter_names, decoder.dims)
  keys = Keys.from_seed(7)

  def step(params: Params, batch: Batch, root: jax.Array) -> Any:
    grads, metrics, statistics = gradients(params, batch, Keys(root))
    moments = transform.init(params)
    mine = params
    if layout is not None:
      mine = jax.lax.with_sharding_constraint(params, _shardings(decoder, layout, "grads"))
      dims = state_dims(moments, decoder.shapes, decoder.dims)
      moments = jax.lax.with_sharding_constraint(
        moments, layout.shardings("optimizer", dims, jax.eval_shape(lambda: moments))
      )
    updates, moments = transform.update(grads, moments, mine)
    moved = optax.apply_updates(mine, updates)
    moved = decoder.update_buffers(params, moved, metrics["layers"], statistics)
    if layout is not None:
      moved = jax.lax.with_sharding_constraint(moved, _shardings(decoder, layout, "params"))
    return grads, metrics, moved, moments

  run = jax.jit(step)
  grads, metrics, moved, moments = jax.device_get(run(params, batch, keys.root))
  silent = {**batch, "labels": jnp.full_like(batch["labels"], -1)}
  balance_grads, *_ = jax.device_get(run(params, silent, keys.root))
  drops = {
    part: {
      depth: of.dropped
      for depth, of in param_names.by_layer(metrics["layers"], decoder.layer_groups, part).items()
    }
    for part in (param_names.MOE, param_names.ATTENTION)
  }

  def named(tree: Any) -> dict[str, Any]:
    return param_names.unstack(param_names.flatten(tree), decoder.layer_groups)

  return {
    "loss": {"total": metrics["total_loss"], "nll": metrics["loss"].value},
    "balance": metrics["balance"],
    "drops": drops,
    "grads": named(grads),
    "balance_grads": named(balance_grads),
    "params": named(moved),
    "moments": named(moments),
  }


def _placed(params: Params, plain: Decoder, placed: Decoder) -> Params:
  """Returns parameters as they lie in the memory of another decoder of the same model."""
  named = param_names.unstack(param_names.flatten(params), plain.layer_groups)
  flat = param_names.stack(named, list(param_names.flatten(placed.shapes)), placed.layer_groups)
  return param_names.unflatten(placed.shapes, flat)


def _shardings(decoder: Decoder, layout: Layout, role: Any) -> Any:
  return layout.shardings(role, decoder.dims, decoder.shapes)
