"""A layer and its router, trained by the balance loss alone."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxmoe.core.init import Init
from jaxmoe.core.rng import Keys
from jaxmoe.core.tokens import Tokens
from jaxmoe.moe.routing import RouterSums

D, T = 16, 512


def tokens_of(num_tokens, replayed_experts=None):
  slot = jnp.arange(num_tokens, dtype=jnp.int32)[None]
  return Tokens(slot, slot, jnp.ones_like(slot), slot, replayed_experts=replayed_experts)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def descend(config, graph, steps, state, x, rate):
  """Returns the gate's state after steps of plain gradient descent, and the mean late counts."""
  (term,) = config.balance

  def sums_of(state):
    routing, _ = nnx.merge(graph, state)(x, tokens_of(len(x)), None, None)
    counts_E = jnp.zeros(config.num_experts).at[routing.expert_TA.reshape(-1)].add(1.0)
    zero, scores_E = jnp.float32(0), jnp.sum(routing.scores_TE, axis=0)
    sums = RouterSums(counts_E, scores_E, jnp.float32(len(x)), zero, zero, counts_E)
    return term.loss(sums, config), counts_E

  def step(state, _):
    grads, counts_E = jax.grad(sums_of, has_aux=True)(state)
    return jax.tree.map(lambda leaf, grad: leaf - rate * grad, state, grads), counts_E

  state, counts_SE = jax.lax.scan(step, state, length=steps)
  return state, jnp.mean(counts_SE[-steps // 4 :], axis=0)


@pytest.fixture
def balanced():
  """Trains a router by one balance loss: (record) -> its choices (T, A) and mean late counts."""

  def train(config, steps=800, rate=2.0):
    # Without a direction that all tokens share no linear gate could prefer an expert.
    drawn = np.random.default_rng(0).normal(size=(T, D - 1))
    x = jnp.asarray(np.hstack([np.ones((T, 1)), drawn]), jnp.float32)
    init = Init(Keys.from_seed(0))
    router = config.router.build(init, D, config.num_experts, config.num_active)
    graph, state = nnx.graphdef(router), nnx.to_pure_dict(nnx.state(router))
    state, counts_E = descend(config, graph, steps, state, x, rate)
    routing, _ = nnx.merge(graph, state)(x, tokens_of(T), None, None)
    return np.asarray(routing.expert_TA), np.asarray(counts_E)

  return train
