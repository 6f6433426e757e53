"""Every balance loss with every router: refused in one line, or equal to the float64 oracle.

Values and gradients; the loss is computed from what the oracle of the router decides.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxmoe.core import param_names
from jaxmoe.core.errors import InputError
from jaxmoe.moe.balance import BALANCE, StepTotals
from jaxmoe.moe.experts.null import Null
from jaxmoe.moe.experts.swiglu import SwiGLU
from jaxmoe.moe.layer import MoEConfig
from jaxmoe.moe.routers import ROUTERS
from jaxmoe.moe.routing import sum_routing
from tests.contracts.moe_pairs_test import KEYS, A, E, T, build, decide, draw, tokens_of
from tests.contracts.oracles import balance as oracle

EXPERTS = Null(SwiGLU(3), num_null=1)
SOFTMAX_ONLY = {"mutual_information", "load_concentration"}


def layer_with(router, balance):
  """Returns the record of a layer of both, or the line that refuses it."""
  config, term = ROUTERS[router][1], BALANCE[balance][1]
  try:
    return MoEConfig(E, config.fixed_active or A, config, EXPERTS, balance=(term,))
  except InputError as error:
    return str(error)


@functools.partial(jax.jit, static_argnums=(0, 1))
def losses_of(graph, layers, state, x, tokens):
  """Returns the losses of a step of one microbatch, and their gradients of the leaves and of x."""

  def losses(state, x):
    routing = nnx.merge(graph, state)(x, tokens, None, KEYS / "router")[0]
    sums = sum_routing(routing, tokens.valid.reshape(-1))
    zeros = jax.tree.map(jnp.zeros_like, sums)
    totals = StepTotals(sums.tokens, jnp.float32(1), 1, 1, None, zeros)
    return jnp.stack([layer.balance[0].share(sums, None, totals, layer) for layer in layers])

  return losses(state, x), jax.jacrev(losses, argnums=(0, 1))(state, x)


def right(router, layer, counts_from, valid, leaves):
  """Returns a loss of the oracle's scores, with the choices of another decision."""
  found, fixed = decide(router, valid, leaves), counts_from
  counts = np.zeros((T, E))
  for token, choice in np.argwhere(fixed["valid"]):
    counts[token, fixed["expert"][token, choice]] += 1
  load = found.get("load", counts)
  seen = oracle.RouterInputs(
    found["scores"], found["log_z"], load, fixed["expert"], fixed["valid"], valid
  )
  return oracle.LOSSES[type(layer.balance[0])](layer.balance[0], layer, seen)


@pytest.mark.parametrize("router", ROUTERS)
def test_every_loss_equals_the_oracle_or_is_refused_in_one_line(router):
  layers = {name: layer_with(router, name) for name in BALANCE}
  for name, refused in list(layers.items()):
    if isinstance(refused, str):
      assert "\n" not in refused
      softmax = ROUTERS[router][1].score == "softmax"
      assert (name in SOFTMAX_ONLY and not softmax) or name == "sparsity", refused
      del layers[name]
  assert {"load_balance", "router_z", "null_averaged", "latency_aware"} <= layers.keys()
  graph, state = build(router)
  x, valid = draw("sizes that divide nothing")
  got, (of_state, of_x) = losses_of(graph, tuple(layers.values()), state, x, tokens_of(valid))
  grads = {"x": of_x, **param_names.flatten(of_state)}
  leaves = {"x": x, **param_names.flatten(state)}
  leaves = {key: np.asarray(leaf, np.float64) for key, leaf in leaves.items()}
  decision, rng = decide(router, valid, leaves), np.random.default_rng(2)
  for index, (name, layer) in enumerate(layers.items()):
    loss = functools.partial(right, router, layer, decision, valid)
    np.testing.assert_allclose(got[index], loss(leaves), rtol=1e-5, atol=1e-6, err_msg=name)
    for key, leaf in leaves.items():
      way, ends = rng.normal(size=leaf.shape), []
      for step in (1e-6, -1e-6):
        ends.append(loss({**leaves, key: leaf + step * way}))
      expected = (ends[0] - ends[1]) / 2e-6 if not key.startswith("buffers/") else 0.0
      # A sum over all entries of a leaf, each a float32.
      np.testing.assert_allclose(
        np.sum(way * np.asarray(grads[key])[index]), expected, rtol=1e-4, atol=1e-5,
        err_msg=f"{name}, {key}",
      )
