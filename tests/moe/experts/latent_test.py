"""Experts in a smaller space: what moves is small, what decides and what is shared is not."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxmoe.core.errors import InputError
from jaxmoe.core.init import Init
from jaxmoe.core.rng import Keys
from jaxmoe.core.tokens import Tokens
from jaxmoe.moe.dispatch import Capacity, Dropless
from jaxmoe.moe.experts import SwiGLU
from jaxmoe.moe.experts.latent import Latent
from jaxmoe.moe.layer import MoEConfig

D, K, F, E, A, T = 10, 4, 6, 5, 2, 23
LATENT = Latent(SwiGLU(F), dim=K)


def build(config, state=None):
  """Returns a function from x to output and sums, and the parameters."""
  layer = config.build(Init(Keys.from_seed(0)), D)
  graph = nnx.graphdef(layer)
  state = nnx.to_pure_dict(nnx.state(layer)) if state is None else state
  slot = jnp.arange(T, dtype=jnp.int32)[None]
  tokens = Tokens(slot, slot, (slot < T - 3).astype(jnp.int32), slot, return_routing=True)

  def call(x, state=state):
    y, _, sums = nnx.merge(graph, state)(x[None], tokens, None, None)
    return y[0], sums

  return call, state


def draw(seed=0):
  return jnp.asarray(np.random.default_rng(seed).normal(size=(T, D)), jnp.float32)


@pytest.mark.parametrize("dispatch", [Dropless, Capacity])
def test_rows_that_are_dispatched_have_the_width_of_the_latent_space(dispatch):
  seen = []

  @dataclasses.dataclass(frozen=True)
  class Watched(dispatch):
    def __call__(self, x_TD, routing, experts, context):
      y_TD, counts = super().__call__(x_TD, routing, experts, context)
      seen.append((x_TD.shape, y_TD.shape))
      return y_TD, counts

  call, state = build(MoEConfig(E, A, experts=LATENT, dispatch=Watched()))
  y, _ = call(draw())
  assert seen == [((T, K), (T, K))] and y.shape == (T, D)
  shapes = {leaf.shape for leaf in jax.tree.leaves(state["experts"]["network"])}
  assert shapes == {(E, K, 2, F), (E, F, K)}


def test_the_output_is_that_of_a_loop_over_tokens_and_their_choices():
  x = draw()
  call, state = build(MoEConfig(E, A, experts=LATENT))
  y, sums = jax.jit(call)(x)
  w = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), state["experts"])
  routing = jax.device_get(sums.routing)
  right = np.zeros((T, D))
  for t in range(T):
    low, total = np.float64(x[t]) @ w["down"], np.zeros(K)
    for expert, weight, valid in zip(
      routing.expert_TA[t], routing.weight_TA[t], routing.valid_TA[t]
    ):
      gate, up = np.einsum("k,kgf->gf", low, w["network"]["gate_up"][expert])
      total += valid * weight * (gate / (1 + np.exp(-gate)) * up) @ w["network"]["down"][expert]
    right[t] = total @ w["up"]
  assert np.abs(right[: T - 3]).max() > 0.1 and not right[T - 3 :].any()
  np.testing.assert_allclose(y, right, rtol=1e-5, atol=1e-6)


def test_with_projections_that_change_nothing_it_is_the_bare_network():
  x = draw()
  call, state = build(MoEConfig(E, A, experts=Latent(SwiGLU(F), dim=D)))
  eye = jnp.eye(D)
  state = {**state, "experts": {**state["experts"], "down": eye, "up": eye}}
  bare, _ = build(
    MoEConfig(E, A, experts=SwiGLU(F)), {**state, "experts": state["experts"]["network"]}
  )
  np.testing.assert_allclose(call(x, state)[0], bare(x)[0], rtol=1e-6, atol=1e-7)


def test_the_router_and_the_shared_expert_see_what_the_projection_does_not():
  x = draw()
  call, state = build(MoEConfig(E, A, experts=LATENT, shared_mlp_dim=3))
  # A direction that no row of the projection looks at.
  blind = np.linalg.svd(np.asarray(state["experts"]["down"]).T)[2][-1]
  np.testing.assert_allclose(blind @ state["experts"]["down"], 0, atol=1e-6)
  moved = x + jnp.float32(3 * blind)[None]
  (_, sums), (_, more) = call(x), call(moved)
  assert np.abs(sums.routing.scores_TE - more.routing.scores_TE).max() > 0.1
  for shared in (True, False):
    zeros = jax.tree.map(jnp.zeros_like, state["shared"])
    fixed = state if shared else {**state, "shared": zeros}
    fixed = {**fixed, "router": jax.tree.map(jnp.zeros_like, state["router"])}
    gradient = jax.grad(lambda x, fixed=fixed: jnp.sum(call(x, fixed)[0][:, 0]))(x)
    along = np.abs(np.asarray(gradient) @ blind).max()
    assert (along > 1e-3) if shared else (along < 1e-6)


def test_its_parameters_are_counted_where_they_are():
  config = MoEConfig(E, A, experts=LATENT)
  _, state = build(config)
  sizes = jax.tree.map(np.size, state["experts"])
  per_expert = sum(jax.tree.leaves(sizes["network"])) // E
  assert LATENT.expert_params(D, E) == (per_expert,) * E
  assert LATENT.shared_params(D) == sizes["down"] + sizes["up"]
  assert config.active_params(D) == D * E + A * per_expert + 2 * D * K


def test_a_space_without_dims_is_refused():
  with pytest.raises(InputError, match="dim must be at least 1: dim=0"):
    Latent(dim=0)
