"""Gradients of weights made later are those that the whole backward pass makes, bit for bit.

Two programs may sum a product in other orders, so bits are compared where each product is a program
of its own; where they are compiled together, up to rounding.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmoe.core import param_names
from jaxmoe.core.deferred_products import weight_gradients
from jaxmoe.core.rng import Keys
from jaxmoe.core.tokens import Tokens
from jaxmoe.models.attention import SoftmaxAttention
from jaxmoe.models.block import ATTENTION, BlockConfig, MLPConfig, MoEConfig
from jaxmoe.models.loss_pieces import LossPieces
from jaxmoe.models.stack import LayerGroup
from jaxmoe.models.transformer import Decoder, TransformerConfig
from jaxmoe.moe.dispatch import DISPATCHERS
from jaxmoe.moe.experts import EXPERTS
from jaxmoe.moe.experts.mlp import PlainMLP
from jaxmoe.moe.routers import ROUTERS
from jaxmoe.train.deferred_weights import FlatSlot, find_deferred

VOCAB, LENGTH = 13, 6
ROWS = ([4, 2], [6], [3, 1], [5])
SOFTMAX = SoftmaxAttention(2, 1, 4)
SLOW = pytest.mark.slow


def model(remat="none", scan=True, attention=SOFTMAX, dtype="float32", **parts):
  moe = MoEConfig(4, 2, **{"experts": EXPERTS["swiglu"][1], "shared_mlp_dim": 4, **parts})
  pattern = (BlockConfig(attention, moe), BlockConfig(attention, MLPConfig(6)))
  return TransformerConfig(
    dim=8, stack=(LayerGroup(pattern, 2),), remat=remat, scan=scan, dtype=dtype
  )


def cases():
  """Yields models and names of weights whose gradients must be put off."""
  every = {"0/moe/experts/gate_up", "0/moe/experts/down", "0/moe/shared/down", "0/attention/q"}
  yield pytest.param(model("full"), every, id="made again")
  for name, config in (
    ("kept", model()), ("unrolled", model(scan=False)), ("dots", model("dots")),
    ("bfloat16", model(dtype="bfloat16")),
  ):  # fmt: skip
    yield pytest.param(config, every, id=name, marks=SLOW)
  for family, field in ((EXPERTS, "experts"), (DISPATCHERS, "dispatch"), (ROUTERS, "router")):
    for name, (_, record) in family.items():
      fixed = getattr(record, "fixed_active", None) if field == "router" else None
      parts = {field: record} | ({"num_active": fixed} if fixed else {})
      try:
        config = model(**parts)
      except TypeError:
        config = None
      if config is not None:
        found = {"0/attention/q"}
        if field == "experts" and isinstance(record, PlainMLP):
          found |= {"0/moe/experts/up", "0/moe/experts/down"}
        yield pytest.param(config, found, id=f"{field} {name}", marks=SLOW)
  for name, (_, record) in ATTENTION.items():
    yield pytest.param(model(attention=record), {"1/mlp/down"}, id=f"attention {name}", marks=SLOW)


def one_by_one(off, weights, left):
  """Returns `off.gradients`, of a loop whose products are programs of their own."""
  flat, stacked = param_names.flatten(weights[0]), []
  for layer in range(2):
    of_layer, taps = jax.tree.map(lambda leaf, at=layer: leaf[at], (flat, left[0]))
    found = weight_gradients(off.products[0], of_layer, taps)
    stacked.append({name: found.get(name, 0 * leaf) for name, leaf in of_layer.items()})
  joined = jax.tree.map(lambda *of: jnp.stack(of), *stacked)
  return [param_names.unflatten(weights[0], joined)]


@pytest.mark.parametrize("config, names", list(cases()))
def test_what_is_put_off_and_made_later_is_the_whole_gradient(config, names, batch_of):
  decoder = Decoder(config, VOCAB)
  pieces = LossPieces(decoder)
  batch = {key: jnp.asarray(of) for key, of in batch_of(ROWS, LENGTH, VOCAB).items()}
  tokens, runs = Tokens.of_batch(batch), pieces.runs()
  params = jax.tree.map(lambda leaf: leaf * 1.5, decoder.init(Keys.from_seed(0)))
  weights = [run.take(params["stack"]) for run in runs]
  rest = {name: of for name, of in params.items() if name != "stack"}

  def loss(weights):
    totals = pieces.totals(tokens.valid, batch["labels"])
    handed = pieces.embed(rest, tokens)
    (handed, losses), _ = pieces.layers(runs, weights, handed, tokens, Keys.from_seed(1), totals)
    return pieces.total(pieces.head(rest, handed[0], batch["labels"]), runs, losses, totals)

  off = find_deferred(loss, weights, [lambda stored: stored])
  found = set(off.names(0))
  assert names <= {"/".join(name.split("/")[: one.count("/") + 1]) for one in names
                   for name in found}, found  # fmt: skip

  def whole(weights):
    return jax.grad(loss)(weights)

  def later(weights):
    def tapped(weights, taps):
      return loss(off.tapped(off.kept_off(weights), taps))

    d_weights, d_taps = jax.grad(tapped, argnums=(0, 1))(weights, off.taps(weights))
    slot = FlatSlot.of([d_taps])
    left = slot.unpack(slot.pack(d_taps), d_taps)
    made = off.gradients if config.scan else functools.partial(one_by_one, off)
    return d_weights, made(weights, left)

  compiled = jax.jit if config.scan else lambda function: function
  true = param_names.flatten(compiled(whole)(weights))
  now, after = map(param_names.flatten, compiled(later)(weights))
  tolerance = 2e-2 if config.dtype == "bfloat16" else 1e-5
  scale = np.sqrt(sum(np.sum(np.square(leaf)) for leaf in true.values()))
  for path, leaf in true.items():
    put_off = path.removeprefix("0/") in found
    assert not np.any(after[path] if not put_off else now[path]), path
    mine = after[path] if put_off else now[path]
    if config.scan:
      limits = {"rtol": tolerance, "atol": tolerance * 0.1 * scale}
      np.testing.assert_allclose(mine, leaf, **limits, err_msg=path)
    else:
      np.testing.assert_array_equal(mine, leaf, err_msg=path)
