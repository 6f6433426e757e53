"""A backward pass of what was kept is the backward pass, and no weight is among what was kept.

Two programs may sum a product in other orders, so bits are compared where each operation is a
program of its own; where all are compiled together, up to rounding.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmoe.core import param_names
from jaxmoe.core.rng import Keys
from jaxmoe.core.tokens import Tokens
from jaxmoe.models.block import ATTENTION, MoEConfig
from jaxmoe.models.loss_pieces import LossPieces
from jaxmoe.models.transformer import Decoder
from jaxmoe.moe.dispatch import DISPATCHERS
from jaxmoe.moe.experts import EXPERTS
from jaxmoe.moe.routers import ROUTERS
from jaxmoe.train.kept_residuals import KeptResiduals
from tests.train.deferred_weights_test import LENGTH, ROWS, VOCAB, model

SLOW = pytest.mark.slow


def cases():
  """Yields models; all but the first are slow."""
  yield pytest.param(model(dtype="bfloat16"), id="bfloat16")
  for name, config in (
    ("made again", model("full")), ("unrolled", model(scan=False)), ("dots", model("dots")),
    ("float32", model()),
  ):  # fmt: skip
    yield pytest.param(config, id=name, marks=SLOW)
  for family, field in ((EXPERTS, "experts"), (DISPATCHERS, "dispatch"), (ROUTERS, "router")):
    for name, (_, record) in family.items():
      parts = {field: record, "num_active": getattr(record, "fixed_active", None) or 2}
      config = model(scan=False).map_ffns(lambda ffn, parts=parts: changed(ffn, parts))
      yield pytest.param(config, id=f"{field} {name}", marks=SLOW)
  for name, (_, record) in ATTENTION.items():
    yield pytest.param(model(scan=False, attention=record), id=f"attention {name}", marks=SLOW)


def changed(ffn, parts):
  return dataclasses.replace(ffn, **parts) if isinstance(ffn, MoEConfig) else ffn


def layers_of(decoder, batch):
  """Returns the layers of a model as a function that may keep residuals, and its arguments."""
  pieces = LossPieces(decoder)
  params = jax.tree.map(lambda leaf: leaf * 1.5, decoder.init(Keys.from_seed(0)))
  rest = {name: of for name, of in params.items() if name != "stack"}
  weights = [run.take(params["stack"]) for run in pieces.runs()]

  def layers(weights, known, handed, running):
    tokens, totals = Tokens.of_batch(known), pieces.totals(known["segment"] > 0, known["labels"])
    keys, runs = Keys.from_seed(1), pieces.runs()
    (handed, losses), _ = pieces.layers(runs, weights, handed, tokens, keys, totals)
    return (handed[0], sum(map(jnp.sum, jax.tree.leaves(losses)), 0.0 * running)), None

  return layers, weights, batch, pieces.embed(rest, Tokens.of_batch(batch)), jnp.zeros(())


@pytest.mark.parametrize("config", list(cases()))
def test_a_gradient_of_what_was_kept_is_the_gradient(config, batch_of):
  decoder = Decoder(config, VOCAB)
  batch = {key: jnp.asarray(of) for key, of in batch_of(ROWS, LENGTH, VOCAB).items()}
  layers, *given = layers_of(decoder, batch)
  passes = KeptResiduals.of(layers, *given)
  ones = jax.tree.map(lambda of: jnp.ones(of.shape, of.dtype), jax.eval_shape(layers, *given)[0])

  def later(weights, known, handed, running):
    _, _, kept = passes.forward(weights, known, handed, running)
    return passes.backward(weights, known, jax.lax.optimization_barrier(kept), ones)

  def whole(weights, known, handed, running):
    def results(weights, handed):
      return layers(weights, known, handed, running)

    return jax.vjp(results, weights, handed, has_aux=True)[1](ones)

  compiled = config.dtype == "bfloat16"
  run = jax.jit if compiled else lambda function: function
  found, true = run(later)(*given), run(whole)(*given)
  for path, leaf in param_names.flatten(true).items():
    mine, limit = param_names.flatten(found)[path], 2e-2 if compiled else 0
    np.testing.assert_allclose(mine, leaf, rtol=limit, atol=limit, err_msg=path)
  shapes = {leaf.shape for leaf in jax.tree.leaves(given[1]) if leaf.ndim > 2}
  assert passes.shapes and not shapes & {of.shape for of in passes.shapes}


def test_what_is_made_of_parameters_or_of_what_is_known_alone_is_not_kept():
  """Of a product by a cast weight, a mask and a table of positions only the input is kept."""

  def masked(weights, known, x, given):
    mask_T1 = (known["position"] % 2 == 0)[:, None]

    def layer(x, weight):
      y = x @ (weight.astype(jnp.bfloat16).astype(jnp.float32).T)
      return y * jnp.where(mask_T1, jnp.cos(known["position"])[:, None], 0.5), None

    return jax.lax.scan(layer, x, weights)[0] + given, None

  shapes = (3, 4, 4), (5, 4)
  weights, x = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes)
  known = {"position": jax.ShapeDtypeStruct((5,), jnp.int32)}
  passes = KeptResiduals.of(masked, weights, known, x, jax.ShapeDtypeStruct((), jnp.float32))
  assert [of.shape for of in passes.shapes] == [(3, 5, 4)]
