import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxmoe.core.parameters import Init
from jaxmoe.core.rng import Keys
from jaxmoe.core.tokens import Tokens
from jaxmoe.moe.routers import ROUTERS, TopK
from jaxmoe.moe.routing import sum_routing

D, E = 6, 5
MEMBERS = {
  **{name: instance for name, (_, instance) in ROUTERS.items()},
  "topk, scores as weights": TopK(normalize=False),
}
member = pytest.mark.parametrize("router", MEMBERS.values(), ids=MEMBERS.keys())
# (A, segments of the (B, L) tokens; 0 is padding)
CASES = {
  "rows with padding": (2, [[1, 1, 1, 2, 2, 0, 0], [1, 1, 1, 1, 1, 1, 0]]),
  "one token": (2, [[1]]),
  "all padding": (2, [[0, 0, 0]]),
  "one choice": (1, [[1, 1, 1, 0]]),
  "every expert": (E, [[1, 1, 1, 0]]),
}
cases = pytest.mark.parametrize("num_active, segment", CASES.values(), ids=CASES.keys())


def topk_oracle(config, num_active, x, params):
  """Softmax over all experts, the A best, lower expert first on ties (float64, token by token)."""
  logits = x @ params["gate"]
  peak = logits.max(-1, keepdims=True)
  log_z = np.log(np.exp(logits - peak).sum(-1)) + peak[:, 0]
  scores = np.exp(logits - log_z[:, None])
  expert = np.argsort(-scores, axis=-1, kind="stable")[:, :num_active]
  weight = np.take_along_axis(scores, expert, -1)
  if config.normalize:
    weight = weight / weight.sum(-1, keepdims=True)
  ranked = np.sort(scores, axis=-1)[:, ::-1]
  # The A best are certain where the gaps between them, and to the next, are clear.
  clear = np.all(-np.diff(ranked)[:, :num_active] > 1e-5, axis=-1)
  return {"expert": expert, "weight": weight, "scores": scores, "log_z": log_z}, clear


ORACLES = {TopK: topk_oracle}


def build(router, num_active, scale=1.0):
  module = router.build(Init(Keys.from_seed(0)), D, E, num_active)
  state = jax.tree.map(lambda leaf: leaf * scale, nnx.to_pure_dict(nnx.state(module)))
  return nnx.graphdef(module), state


def tokens_of(segment):
  segment = jnp.asarray(segment, jnp.int32)
  slot = jnp.broadcast_to(jnp.arange(segment.shape[1], dtype=jnp.int32)[None], segment.shape)
  return Tokens(slot, slot, segment, slot)


@functools.partial(jax.jit, static_argnums=0)
def route(graph, state, x, tokens):
  return nnx.merge(graph, state)(x, tokens, None, None)[0]


def draw(num_tokens, seed=0):
  return np.random.default_rng(seed).normal(size=(num_tokens, D)).astype(np.float32)


def as_float64(state):
  return {name: np.asarray(leaf, np.float64) for name, leaf in state.items()}


def test_every_router_has_an_oracle():
  assert {cls for cls, _ in ROUTERS.values()} == ORACLES.keys()


@member
@cases
def test_the_decision_equals_the_float64_oracle(router, num_active, segment):
  graph, state = build(router, num_active)
  x = draw(np.size(segment))
  routing = route(graph, state, x, tokens_of(segment))
  right, clear = ORACLES[type(router)](router, num_active, x.astype(np.float64), as_float64(state))
  assert clear.all(), "choose another seed"
  np.testing.assert_array_equal(routing.expert_TA, right["expert"])
  for name in ("weight_TA", "scores_TE", "log_z_T"):
    got = getattr(routing, name)
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, right[name.rsplit("_", 1)[0]], rtol=1e-5, atol=1e-6)
  expected = np.repeat(np.reshape(segment, (-1, 1)) > 0, num_active, axis=1)
  np.testing.assert_array_equal(routing.valid_TA, expected)


@member
def test_gradients_equal_finite_differences_of_the_oracle(router):
  num_active, segment = CASES["rows with padding"]
  graph, state = build(router, num_active)
  x, params, tokens = draw(np.size(segment)), as_float64(state), tokens_of(segment)
  rng = np.random.default_rng(1)
  weigh = {
    "weight": rng.normal(size=(len(x), num_active)),
    "scores": rng.normal(size=(len(x), E)),
    "log_z": rng.normal(size=len(x)),
  }

  def right(x, params):
    found = ORACLES[type(router)](router, num_active, x, params)[0]
    return sum(np.sum(weigh[name] * found[name]) for name in weigh)

  def value(x, state):
    routing = route(graph, state, x, tokens)
    names = {"weight": "weight_TA", "scores": "scores_TE", "log_z": "log_z_T"}
    weighed = (jnp.float32(weigh[name]) * getattr(routing, names[name]) for name in weigh)
    return sum(jnp.sum(part) for part in weighed)

  grad_x, grads = jax.jit(jax.grad(value, argnums=(0, 1)))(x, state)
  found = {"x": grad_x, **grads}
  at = {"x": x.astype(np.float64), **params}
  for name in at:
    for index in np.ndindex(at[name].shape):
      moved = []
      for step in (1e-6, -1e-6):
        there = {key: leaf.copy() for key, leaf in at.items()}
        there[name][index] += step
        moved.append(right(there.pop("x"), there))
      expected = (moved[0] - moved[1]) / 2e-6
      np.testing.assert_allclose(found[name][index], expected, rtol=1e-4, atol=2e-5)


@member
@pytest.mark.parametrize("num_active", [1, 3, E])
def test_a_token_goes_to_distinct_experts_best_first(router, num_active):
  graph, state = build(router, num_active, scale=3.0)
  routing = route(graph, state, draw(200, seed=2), tokens_of(np.ones((1, 200))))
  expert = np.asarray(routing.expert_TA)
  assert expert.dtype == np.int32 and expert.min() >= 0 and expert.max() < E
  assert all(len(set(row)) == num_active for row in expert)
  weight = np.asarray(routing.weight_TA)
  assert (weight > 0).all() and (np.diff(weight) <= 0).all()


def test_topk_weights_are_the_scores_or_the_scores_over_their_sum():
  for normalize in (True, False):
    graph, state = build(TopK(normalize), 3)
    routing = route(graph, state, draw(50), tokens_of(np.ones((1, 50))))
    chosen = np.take_along_axis(np.asarray(routing.scores_TE), np.asarray(routing.expert_TA), 1)
    if normalize:
      np.testing.assert_allclose(np.sum(routing.weight_TA, -1), 1, rtol=1e-6)
      chosen = chosen / chosen.sum(-1, keepdims=True)
    np.testing.assert_allclose(routing.weight_TA, chosen, rtol=1e-6)
    np.testing.assert_allclose(np.sum(routing.scores_TE, -1), 1, rtol=1e-6)


@member
def test_equal_scores_go_to_the_lower_expert(router):
  graph, state = build(router, 2, scale=0.0)
  routing = route(graph, state, draw(4), tokens_of(np.ones((1, 4))))
  np.testing.assert_array_equal(routing.expert_TA, [[0, 1]] * 4)


@member
def test_what_padding_holds_changes_no_other_token_and_is_counted_nowhere(router):
  num_active, segment = CASES["rows with padding"]
  graph, state = build(router, num_active)
  valid = np.reshape(segment, -1) > 0
  x = draw(np.size(segment))
  sums, routings = [], []
  for filling in (x, 1e4 * draw(len(x), seed=5), np.full_like(x, np.inf)):
    tokens = tokens_of(segment)
    routing = route(graph, state, np.where(valid[:, None], x, filling), tokens)
    routings.append(jax.tree.map(lambda leaf: np.asarray(leaf)[valid], routing))
    sums.append(sum_routing(routing, tokens.valid.reshape(-1)))
  for other in (1, 2):
    jax.tree.map(np.testing.assert_array_equal, routings[0], routings[other])
    jax.tree.map(np.testing.assert_array_equal, sums[0], sums[other])
  assert np.sum(sums[0].counts_E) == num_active * valid.sum()
  assert sums[0].tokens == valid.sum()


@member
def test_a_later_token_never_changes_an_earlier_decision_and_a_permutation_permutes(router):
  graph, state = build(router, 2)
  x, length = draw(24), 24
  tokens = tokens_of(np.ones((1, length)))
  before = route(graph, state, x, tokens)

  @jax.jit
  def trial(key):
    at = jax.random.randint(key, (), 1, length)
    noise = 3 * jax.random.normal(key, x.shape)
    earlier = jnp.arange(length) < at
    after = route(graph, state, jnp.where(earlier[:, None], x, x + noise), tokens)
    same = jax.tree.map(lambda a, b: jnp.all((a == b) | ~_like(earlier, a)), before, after)
    return jnp.stack(jax.tree.leaves(same))

  assert jax.lax.map(trial, jax.random.split(jax.random.key(0), 100)).all()
  order = np.random.default_rng(3).permutation(length)
  moved = route(graph, state, x[order], tokens)
  jax.tree.map(lambda a, b: np.testing.assert_array_equal(np.asarray(a)[order], b), before, moved)


@member
def test_it_is_the_same_without_jit_and_float32_for_bfloat16_tokens(router):
  graph, state = build(router, 2)
  x, tokens = jnp.asarray(draw(14)).astype(jnp.bfloat16), tokens_of(np.ones((2, 7)))
  compiled = route(graph, state, x, tokens)
  eager = nnx.merge(graph, state)(x, tokens, None, None)[0]
  exact = route(graph, state, x.astype(jnp.float32), tokens)
  for field in dataclasses.fields(compiled):
    got = getattr(compiled, field.name)
    assert got.dtype != jnp.bfloat16
    np.testing.assert_allclose(getattr(eager, field.name), got, rtol=1e-6, atol=1e-7)
    np.testing.assert_array_equal(getattr(exact, field.name), got)


def _like(flags, leaf):
  return flags.reshape(-1, *[1] * (leaf.ndim - 1))
