import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxmoe.core import names
from jaxmoe.core.parameters import Init
from jaxmoe.core.rng import Keys
from jaxmoe.core.tokens import Tokens
from jaxmoe.moe.routers import GATES, ROUTERS, TopK
from jaxmoe.moe.routers.gates import MLP
from jaxmoe.moe.routers.scores import SCORES
from jaxmoe.moe.routing import sum_routing
from tests.contracts.oracles import routing

D, E = 6, 5
MEMBERS = {
  **{name: instance for name, (_, instance) in ROUTERS.items()},
  "topk, scores as weights": TopK(normalize=False),
  "topk, scaled": TopK(scale=2.5),
  "topk, tanh gate": TopK(gate=MLP(hidden=7, activation="tanh")),
  "topk, gelu gate": TopK(gate=MLP(hidden=7)),
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


def build(router, num_active, scale=1.0):
  module = router.build(Init(Keys.from_seed(0)), D, E, num_active)
  state = names.flatten(nnx.to_pure_dict(nnx.state(module)))
  return nnx.graphdef(module), {path: leaf * scale for path, leaf in state.items()}


def tokens_of(segment):
  segment = jnp.asarray(segment, jnp.int32)
  slot = jnp.broadcast_to(jnp.arange(segment.shape[1], dtype=jnp.int32)[None], segment.shape)
  return Tokens(slot, slot, segment, slot)


@functools.partial(jax.jit, static_argnums=0)
def route(graph, state, x, tokens):
  return module_of(graph, state)(x, tokens, None, None)[0]


def module_of(graph, state):
  """Returns the module with the leaves of these paths."""
  tree = {}
  for path, leaf in state.items():
    *parents, name = path.split("/")
    place = tree
    for parent in parents:
      place = place.setdefault(parent, {})
    place[name] = leaf
  return nnx.merge(graph, tree)


def draw(num_tokens, seed=0):
  return np.random.default_rng(seed).normal(size=(num_tokens, D)).astype(np.float32)


def as_float64(state):
  return {name: np.asarray(leaf, np.float64) for name, leaf in state.items()}


def test_every_router_has_an_oracle():
  assert {cls for cls, _ in ROUTERS.values()} == routing.RULES.keys()
  assert {cls for cls, _ in GATES.values()} == routing.GATES.keys()
  assert SCORES.keys() == routing.SCORES.keys()


@member
@cases
def test_the_decision_equals_the_float64_oracle(router, num_active, segment):
  graph, state = build(router, num_active)
  x = draw(np.size(segment))
  got = route(graph, state, x, tokens_of(segment))
  right = routing.route(router, num_active, x.astype(np.float64), as_float64(state), segment)
  assert right["clear"].all(), "choose another seed"
  np.testing.assert_array_equal(got.expert_TA, right["expert"])
  for name in ("weight_TA", "scores_TE", "log_z_T"):
    field = getattr(got, name)
    assert field.dtype == jnp.float32
    np.testing.assert_allclose(field, right[name.rsplit("_", 1)[0]], rtol=1e-5, atol=1e-6)
  expected = right["valid"] & (np.reshape(segment, (-1, 1)) > 0)
  np.testing.assert_array_equal(got.valid_TA, expected)


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
    found = routing.route(router, num_active, x, params, segment)
    return sum(np.sum(weigh[name] * found[name]) for name in weigh)

  def value(x, state):
    got = route(graph, state, x, tokens)
    fields = {"weight": got.weight_TA, "scores": got.scores_TE, "log_z": got.log_z_T}
    weighed = (jnp.float32(weigh[name]) * fields[name] for name in weigh)
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
  got = route(graph, state, draw(200, seed=2), tokens_of(np.ones((1, 200))))
  expert = np.asarray(got.expert_TA)
  assert expert.dtype == np.int32 and expert.min() >= 0 and expert.max() < E
  assert all(len(set(row)) == num_active for row in expert)
  weight = np.asarray(got.weight_TA)
  assert (weight > 0).all() and (np.diff(weight) <= 0).all()


def test_topk_weights_are_the_scores_or_the_scores_over_their_sum():
  for normalize in (True, False):
    graph, state = build(TopK(normalize=normalize), 3)
    got = route(graph, state, draw(50), tokens_of(np.ones((1, 50))))
    chosen = np.take_along_axis(np.asarray(got.scores_TE), np.asarray(got.expert_TA), 1)
    if normalize:
      np.testing.assert_allclose(np.sum(got.weight_TA, -1), 1, rtol=1e-6)
      chosen = chosen / chosen.sum(-1, keepdims=True)
    np.testing.assert_allclose(got.weight_TA, chosen, rtol=1e-6)
    np.testing.assert_allclose(np.sum(got.scores_TE, -1), 1, rtol=1e-6)


@member
def test_equal_scores_go_to_the_lower_expert(router):
  graph, state = build(router, 2, scale=0.0)
  got = route(graph, state, draw(4), tokens_of(np.ones((1, 4))))
  np.testing.assert_array_equal(got.expert_TA, [[0, 1]] * 4)


@member
def test_what_padding_holds_changes_no_other_token_and_is_counted_nowhere(router):
  num_active, segment = CASES["rows with padding"]
  graph, state = build(router, num_active)
  valid = np.reshape(segment, -1) > 0
  x = draw(np.size(segment))
  sums, routings = [], []
  for filling in (x, 1e4 * draw(len(x), seed=5), np.full_like(x, np.inf)):
    tokens = tokens_of(segment)
    got = route(graph, state, np.where(valid[:, None], x, filling), tokens)
    routings.append(jax.tree.map(lambda leaf: np.asarray(leaf)[valid], got))
    sums.append(sum_routing(got, tokens.valid.reshape(-1)))
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
  eager = module_of(graph, state)(x, tokens, None, None)[0]
  exact = route(graph, state, x.astype(jnp.float32), tokens)
  for field in dataclasses.fields(compiled):
    got = getattr(compiled, field.name)
    if got is None:
      continue
    assert got.dtype != jnp.bfloat16
    np.testing.assert_allclose(getattr(eager, field.name), got, rtol=1e-6, atol=1e-7)
    np.testing.assert_array_equal(getattr(exact, field.name), got)


def _like(flags, leaf):
  return flags.reshape(-1, *[1] * (leaf.ndim - 1))
