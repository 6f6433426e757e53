"""A MoE layer in halves: up to the routing, and from it."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxmoe.core.init import Init
from jaxmoe.core.rng import Keys
from jaxmoe.core.tokens import Tokens
from jaxmoe.moe.dispatch import Capacity, Dropless
from jaxmoe.moe.experts import SwiGLU
from jaxmoe.moe.layer import MoEConfig
from jaxmoe.moe.routers import ROUTERS

D, E, A, B, L = 6, 5, 2, 2, 7
SEGMENT = jnp.asarray([[1, 1, 1, 2, 2, 0, 0], [1] * 7], jnp.int32)
SLOT = jnp.broadcast_to(jnp.arange(L, dtype=jnp.int32)[None], (B, L))
TOKENS = Tokens(SLOT, SLOT, SEGMENT, SLOT)
KEYS = Keys.from_seed(3)
CONFIGS = {
  "dropless, a shared expert": MoEConfig(E, A, experts=SwiGLU(4), shared_mlp_dim=3),
  "capacity, noise": MoEConfig(
    E, A, ROUTERS["noisy"][1], experts=SwiGLU(4), dispatch=Capacity(factor=0.7)
  ),
}


def built(config):
  layer = config.build(Init(Keys.from_seed(0)), D)
  return nnx.graphdef(layer), nnx.to_pure_dict(nnx.state(layer))


def draw():
  return jnp.asarray(np.random.default_rng(0).normal(size=(B, L, D)), jnp.float32)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
def test_the_halves_are_the_layer_in_the_values_and_gradients_bit_for_bit(config):
  graph, state = built(config)

  def whole(state, x):
    return nnx.merge(graph, state)(x, TOKENS, None, KEYS)

  def halves(state, x):
    layer = nnx.merge(graph, state)
    here, routing, carry = layer.route(x, TOKENS, None, KEYS)
    y, sums = layer.apply_experts(here, routing, TOKENS, KEYS)
    return y, carry, sums

  def both(function):
    loss = lambda state, x: jnp.sum(function(state, x)[0] ** 2)  # noqa: E731
    return jax.jit(lambda state, x: (function(state, x), jax.grad(loss, (0, 1))(state, x)))

  jax.tree.map(
    np.testing.assert_array_equal, both(halves)(state, draw()), both(whole)(state, draw())
  )


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
def test_experts_may_run_later_and_elsewhere_from_a_stored_routing(config):
  """Each half is compiled alone and gets only the weights it reads; the routing lies in NumPy."""
  graph, state = built(config)
  router_only = {**state, "experts": jax.tree.map(jnp.zeros_like, state["experts"])}
  here, routing, _ = jax.jit(lambda state, x: nnx.merge(graph, state).route(x, TOKENS, None, KEYS))(
    router_only, draw()
  )
  stored = jax.tree.map(np.asarray, (here, routing))
  experts_only = {**state, "router": jax.tree.map(jnp.zeros_like, state["router"])}
  y, sums = jax.jit(
    lambda state, here, routing: nnx.merge(graph, state).apply_experts(here, routing, TOKENS, KEYS)
  )(experts_only, *stored)
  right, _, known = jax.jit(lambda state, x: nnx.merge(graph, state)(x, TOKENS, None, KEYS))(
    state, draw()
  )
  close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6)
  jax.tree.map(close, (y, sums), (right, known))


def test_only_the_experts_that_the_routing_names_are_needed_after_it():
  config = MoEConfig(E, 1, experts=SwiGLU(4), dispatch=Dropless())
  graph, state = built(config)
  layer = nnx.merge(graph, state)
  x = jnp.broadcast_to(draw()[:1, :1], (B, L, D))  # all tokens are alike, and so their expert
  here, routing, _ = layer.route(x, TOKENS, None, None)
  (needed,) = set(np.asarray(routing.expert_TA)[np.asarray(routing.valid_TA)].tolist())
  right, _ = layer.apply_experts(here, routing, TOKENS, None)
  fetched = jax.tree.map(
    lambda leaf: jnp.zeros_like(leaf).at[needed].set(leaf[needed]), state["experts"]
  )
  y, _ = nnx.merge(graph, {**state, "experts": fetched}).apply_experts(here, routing, TOKENS, None)
  np.testing.assert_array_equal(y, right)
  assert np.asarray(right)[np.asarray(SEGMENT) > 0].any(axis=1).all()


def test_a_routing_may_be_changed_between_the_halves():
  """Where the second choice of each token is taken back, it has the first one's output alone."""
  graph, state = built(MoEConfig(E, A, experts=SwiGLU(4)))
  layer = nnx.merge(graph, state)
  here, routing, _ = layer.route(draw(), TOKENS, None, None)
  first = dataclasses.replace(routing, valid_TA=routing.valid_TA.at[:, 1].set(False))
  y, _ = layer.apply_experts(here, first, TOKENS, None)
  gate_up, down = (np.asarray(state["experts"][name], np.float64) for name in ("gate_up", "down"))
  for token, x in enumerate(np.asarray(draw(), np.float64).reshape(-1, D)):
    expert = int(routing.expert_TA[token, 0])
    gate, up = np.einsum("d,dgf->gf", x, gate_up[expert])
    right = float(routing.weight_TA[token, 0]) * (gate / (1 + np.exp(-gate)) * up) @ down[expert]
    valid = SEGMENT.reshape(-1)[token] > 0
    np.testing.assert_allclose(y.reshape(-1, D)[token], right * valid, rtol=1e-4, atol=1e-6)
