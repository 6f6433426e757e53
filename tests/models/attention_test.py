import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxmoe.core.init import Init
from jaxmoe.core.rng import Keys
from jaxmoe.core.tokens import Tokens
from jaxmoe.models.attention import SoftmaxAttention
from jaxmoe.models.cache import NoCache
from jaxmoe.models.masks import WindowMask

D, L = 6, 7


def build(config, seed=0):
  layer = config.build(Init(Keys.from_seed(seed)), D, 1e-6)
  return nnx.graphdef(layer), nnx.to_pure_dict(nnx.state(layer))


@functools.partial(jax.jit, static_argnums=0)
def attend(graph, state, x, tokens):
  return nnx.merge(graph, state)(x, tokens, NoCache())[0]


def draw(rows=2, seed=1):
  return jnp.asarray(np.random.default_rng(seed).normal(size=(rows, L, D)), jnp.float32)


@pytest.mark.parametrize("num_kv_heads", [1, 2, 4])
@pytest.mark.parametrize("qk_norm", ["none", "head"])
def test_grouped_heads_equal_full_heads_with_keys_and_values_repeated(num_kv_heads, qk_norm):
  graph, state = build(SoftmaxAttention(4, num_kv_heads, 4, qk_norm=qk_norm))
  full_graph, _ = build(SoftmaxAttention(4, 4, 4, qk_norm=qk_norm))
  repeat = lambda leaf: jnp.repeat(leaf, 4 // num_kv_heads, axis=1)  # noqa: E731
  full = state | {"k": repeat(state["k"]), "v": repeat(state["v"])}
  tokens = Tokens.of_ids(jnp.zeros((2, L), jnp.int32))
  np.testing.assert_allclose(
    attend(graph, state, draw(), tokens), attend(full_graph, full, draw(), tokens),
    rtol=1e-5, atol=1e-6,
  )  # fmt: skip


def test_a_norm_over_heads_makes_attention_blind_to_the_scale_of_queries_and_keys():
  tokens, outputs = Tokens.of_ids(jnp.zeros((2, L), jnp.int32)), {}
  for qk_norm in ("none", "head", "all"):
    graph, state = build(SoftmaxAttention(4, 2, 4, qk_norm=qk_norm))
    first = np.arange(4)[None, :, None] == 0
    whole = state | {"q": 9 * state["q"]}
    one = state | {"q": jnp.where(first, 9 * state["q"], state["q"])}
    outputs[qk_norm] = [
      np.asarray(attend(graph, weights, draw(), tokens)) for weights in (state, whole, one)
    ]
  blind = {"none": (False, False), "head": (True, True), "all": (True, False)}
  for qk_norm, (plain, whole, one) in outputs.items():
    # eps = 1e-6 in the norm is what is left of the scale.
    same = tuple(bool(np.abs(plain - other).max() < 1e-4) for other in (whole, one))
    assert same == blind[qk_norm], qk_norm


@pytest.mark.parametrize("size", [1, 3])
def test_a_window_shows_exactly_its_last_tokens(size):
  graph, state = build(SoftmaxAttention(2, 2, 4, mask=WindowMask(size)))
  tokens, x = Tokens.of_ids(jnp.zeros((1, L), jnp.int32)), draw(1)

  @jax.jit
  def slopes(x):
    return jax.jacobian(lambda x: attend(graph, state, x, tokens)[0].sum(axis=-1))(x)[:, 0]

  depends = np.abs(slopes(x)).max(axis=-1) > 0
  query, key = np.indices((L, L))
  np.testing.assert_array_equal(depends, (key <= query) & (query - key < size))


def test_only_distances_between_positions_count():
  graph, state = build(SoftmaxAttention(4, 2, 4))
  tokens = Tokens.of_ids(jnp.zeros((2, L), jnp.int32))
  moved = Tokens(tokens.id, tokens.position + 50, tokens.segment, tokens.slot)
  mixed = Tokens(tokens.id, tokens.position[:, ::-1], tokens.segment, tokens.slot)
  plain = attend(graph, state, draw(), tokens)
  np.testing.assert_allclose(plain, attend(graph, state, draw(), moved), rtol=1e-4, atol=1e-5)
  assert np.abs(plain - attend(graph, state, draw(), mixed)).max() > 1e-2
