import dataclasses
import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxmoe.core import param_names
from jaxmoe.core.errors import InputError
from jaxmoe.core.init import Init
from jaxmoe.core.rng import Keys
from jaxmoe.core.tokens import Tokens
from jaxmoe.models.attention import SoftmaxAttention
from jaxmoe.models.block import BlockConfig
from jaxmoe.models.stack import LayerGroup
from jaxmoe.models.transformer import TransformerConfig
from jaxmoe.moe.layer import MoEConfig
from jaxmoe.moe.routers import GATES, ROUTERS, TopK
from jaxmoe.moe.routers.assignment import Auction
from jaxmoe.moe.routers.bias import AuxFree
from jaxmoe.moe.routers.expert_choice import CausalExpertChoice, ExpertChoice
from jaxmoe.moe.routers.forced import Forced, Skewed
from jaxmoe.moe.routers.gates import CosineGateConfig, LinearGateConfig, MLPGateConfig
from jaxmoe.moe.routers.scores import SCORES
from jaxmoe.moe.routers.sparse_mixer import SparseMixer
from jaxmoe.moe.routers.token_hash import Hash
from jaxmoe.moe.routers.topk import Switch
from jaxmoe.moe.routing import sum_routing
from jaxmoe.train.evaluate import scored_alone
from tests.contracts.oracles import routing

D, E = 6, 8
MEMBERS = {
  **{name: instance for name, (_, instance) in ROUTERS.items()},
  "topk, scores as weights": TopK(normalize=False),
  "topk, scaled": TopK(scale=2.5),
  "topk, a gate with a bias": TopK(gate=LinearGateConfig(bias=True)),
  "group_limited softmax, as in V2": AuxFree(
    score="softmax",
    normalize=False,
    scale=16.0,
    bias_rate=0.0,
    num_groups=4,
    groups_active=2,
    group_best=1,
  ),
  "topk, tanh gate": TopK(gate=MLPGateConfig(mlp_dim=7, activation="tanh", bias=False)),
  "topk, gelu gate": TopK(gate=MLPGateConfig(mlp_dim=7)),
  "topk, cold cosine gate": TopK(gate=CosineGateConfig(width=4, temperature=0.2, least=0.2)),
  "switch, jitter": Switch(jitter=0.5),
  "group_limited, as in V2": AuxFree(num_groups=4, groups_active=2, group_best=1),
  "base, to the end": Auction(slack=1e-4, allow_future=True),
  "sparse_mixer, wide": SparseMixer(band=0.5),
  "hash, by score": Hash(seed=3, by_score=True),
  "expert choice, always": ExpertChoice(always=True, factor=1.5, most=4, allow_future=True),
  "causal expert choice, shares": CausalExpertChoice(normalize=True, most=3),
  "skewed, hot": Skewed(exponent=3.0),
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
modes = pytest.mark.parametrize("training", [False, True], ids=["evaluation", "training"])
KEYS = Keys.from_seed(7)


def serves(router, num_active):
  """Returns whether a rule takes these numbers of experts."""
  try:
    router.check(E, num_active)
  except InputError:
    return False
  return True


def active(router, num_active=2):
  """Returns the number, or the only one that the rule knows."""
  return router.fixed_active or num_active


PAIRS = {
  f"{name}, {case}": (router, active(router, num_active), segment)
  for name, router in MEMBERS.items()
  for case, (num_active, segment) in CASES.items()
  if serves(router, active(router, num_active))
}


def build(router, num_active, scale=1.0):
  """Returns a module of which no parameter and no buffer is zero, or all are times a scale."""
  module = router.build(Init(Keys.from_seed(0)), D, E, num_active)
  state = param_names.flatten(nnx.to_pure_dict(nnx.state(module)))
  for path in state.keys() - {"gate/up", "gate/down", "gate/weight"}:
    rng = np.random.default_rng(list(path.encode()))
    state[path] += jnp.asarray(rng.normal(0.1, 0.3, state[path].shape), jnp.float32)
  return nnx.graphdef(module), {path: leaf * scale for path, leaf in state.items()}


def tokens_of(segment):
  segment = jnp.asarray(segment, jnp.int32)
  slot = jnp.broadcast_to(jnp.arange(segment.shape[1], dtype=jnp.int32)[None], segment.shape)
  return Tokens(slot, slot, segment, slot)


@functools.partial(jax.jit, static_argnums=(0, 4))
def route(graph, state, x, tokens, training=False):
  return module_of(graph, state)(x, tokens, None, KEYS if training else None)[0]


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


@modes
@pytest.mark.parametrize("router, num_active, segment", PAIRS.values(), ids=PAIRS.keys())
def test_the_decision_equals_the_float64_oracle(router, num_active, segment, training):
  graph, state = build(router, num_active)
  x, valid = draw(np.size(segment)), np.reshape(segment, -1) > 0
  got = route(graph, state, x, tokens_of(segment), training)
  right = routing.route(
    router, num_active, x.astype(np.float64), as_float64(state), segment, KEYS if training else None
  )
  if router.depends_on == "batch" and not right["clear"].all():
    assert len(x) == 1, "choose another seed"
    return  # One token alone may be shared out evenly, and then any expert is right.
  assert right["clear"].all(), "choose another seed"
  np.testing.assert_array_equal(got.expert_TA[valid], right["expert"][valid])
  for name in (
    "weight_TA",
    "scores_TE",
    "log_z_T",
    "load_TE",
    "margins_TE",
    "adaptive_coefficient_T",
  ):
    field, expected = getattr(got, name), right.get(name.rsplit("_", 1)[0])
    assert (field is None) == (expected is None), name
    if field is not None:
      assert field.dtype == jnp.float32 and np.isfinite(field).all()
      np.testing.assert_allclose(field[valid], expected[valid], rtol=1e-5, atol=2e-6)
  np.testing.assert_array_equal(got.valid_TA, right["valid"] & valid[:, None])
  assert right["valid"][valid].all() or router.varies


@member
@modes
def test_gradients_equal_finite_differences_of_the_oracle(router, training):
  num_active, segment = CASES["rows with padding"]
  num_active, keys = active(router, num_active), KEYS if training else None
  graph, state = build(router, num_active)
  x, params, tokens = draw(np.size(segment)), as_float64(state), tokens_of(segment)
  rng, valid = np.random.default_rng(1), np.reshape(segment, -1) > 0
  shape = jax.eval_shape(lambda: route(graph, state, x, tokens, training)).weight_TA.shape
  weigh = {
    "weight_TA": rng.normal(size=shape) * valid[:, None],
    "scores_TE": rng.normal(size=(len(x), E)),
    "log_z_T": rng.normal(size=len(x)),
    "load_TE": rng.normal(size=(len(x), E)),
  }

  def right(x, params):
    found = routing.route(router, num_active, x, params, segment, keys)
    fields = {name: found.get(name.rsplit("_", 1)[0], 0.0) for name in weigh}
    # An estimator's gradient is that of another function than the one computed.
    fields["weight_TA"] = found.get("estimated", fields["weight_TA"])
    return sum(np.sum(weigh[name] * fields[name]) for name in weigh)

  def value(x, state):
    got = route(graph, state, x, tokens, training)
    fields = {name: getattr(got, name) for name in weigh if getattr(got, name) is not None}
    return sum(jnp.sum(jnp.float32(weigh[name]) * field) for name, field in fields.items())

  grad_x, grads = jax.jit(jax.grad(value, argnums=(0, 1)))(x, state)
  found = {"x": grad_x, **grads}
  at = {"x": x.astype(np.float64), **params}
  for name, leaf in at.items():
    for _ in range(3):  # Ways of length 1, so that an entry's error is not drowned by a sum.
      way, moved = rng.normal(size=leaf.shape), []
      way /= np.linalg.norm(way)
      for step in (1e-6, -1e-6):
        there = {**at, name: leaf + step * way}
        moved.append(right(there.pop("x"), there))
      expected = (moved[0] - moved[1]) / 2e-6
      np.testing.assert_allclose(np.sum(way * found[name]), expected, rtol=1e-4, atol=2e-5)


@member
@modes
@pytest.mark.parametrize("num_active", [1, 3, E])
def test_a_token_goes_to_distinct_experts_with_weights_above_zero(router, num_active, training):
  num_active = active(router, num_active)
  if not serves(router, num_active):
    pytest.skip("the rule refuses so many experts")
  graph, state = build(router, num_active, scale=2.0)
  got = route(graph, state, draw(200, seed=2), tokens_of(np.ones((1, 200))), training)
  expert = np.asarray(got.expert_TA)
  assert expert.dtype == np.int32 and expert.min() >= 0 and expert.max() < E
  assert all(len(set(row)) == expert.shape[1] >= num_active for row in expert)
  assert (np.asarray(got.weight_TA)[np.asarray(got.valid_TA)] > 0).all()


def test_topk_weights_are_the_scores_or_the_scores_over_their_sum_best_first():
  for normalize in (True, False):
    graph, state = build(TopK(normalize=normalize), 3)
    got = route(graph, state, draw(50), tokens_of(np.ones((1, 50))))
    chosen = np.take_along_axis(np.asarray(got.scores_TE), np.asarray(got.expert_TA), 1)
    if normalize:
      np.testing.assert_allclose(np.sum(got.weight_TA, -1), 1, rtol=1e-6)
      chosen = chosen / chosen.sum(-1, keepdims=True)
    np.testing.assert_allclose(got.weight_TA, chosen, rtol=1e-6)
    assert (np.diff(got.weight_TA) <= 0).all()
    np.testing.assert_allclose(np.sum(got.scores_TE, -1), 1, rtol=1e-6)


@member
def test_equal_scores_go_to_the_lower_expert_or_where_the_id_says(router):
  graph, state = build(router, active(router), scale=0.0)
  got, segment = route(graph, state, draw(4), tokens_of(np.ones((1, 4)))), np.ones((1, 4), int)
  zeros = np.zeros((4, E))
  right = routing.top_k(zeros, active(router))[0]
  if isinstance(router, (Hash, Forced)):
    seen = types.SimpleNamespace(
      ids=np.arange(4), logits=zeros, scores=zeros + 1, num_active=2, segment=segment
    )
    right = routing.RULES[type(router)](router, seen)["expert"]
  np.testing.assert_array_equal(got.expert_TA[:, : right.shape[1]], right)


@member
@modes
def test_what_padding_holds_changes_no_other_token_and_is_counted_nowhere(router, training):
  num_active, segment = CASES["rows with padding"]
  num_active = active(router, num_active)
  graph, state = build(router, num_active)
  valid = np.reshape(segment, -1) > 0
  x = draw(np.size(segment))
  sums, routings = [], []
  for filling in (x, 1e4 * draw(len(x), seed=5), np.full_like(x, np.inf)):
    tokens = tokens_of(segment)
    got = route(graph, state, np.where(valid[:, None], x, filling), tokens, training)
    routings.append(jax.tree.map(lambda leaf: np.asarray(leaf)[valid], got))
    sums.append(sum_routing(got, tokens.valid.reshape(-1)))
  for other in (1, 2):
    jax.tree.map(np.testing.assert_array_equal, routings[0], routings[other])
    jax.tree.map(np.testing.assert_array_equal, sums[0], sums[other])
  assert np.sum(sums[0].counts_E) == np.sum(routings[0].valid_TA)
  assert np.all(routings[0].valid_TA) or router.varies
  assert sums[0].tokens == valid.sum()


@member
@modes
def test_only_a_rule_that_says_so_lets_a_later_token_change_an_earlier_decision(router, training):
  graph, state = build(router, active(router))
  x, length = draw(24), 24
  rng, tokens = np.random.default_rng(0), tokens_of(np.ones((1, length)))
  at = np.append(length, rng.integers(1, length, 100))  # First the batch as it is.
  noise = 3 * rng.normal(size=(len(at), *x.shape)).astype(np.float32)
  later = np.arange(length) >= at[:, None]
  # One compiled body, because two compilations of one formula may differ in the last bit.
  run = jax.jit(lambda xs: jax.lax.map(lambda x: route(graph, state, x, tokens, training), xs))
  got = run(np.where(later[..., None], x + noise, x))
  same = jax.tree.leaves(jax.tree.map(lambda leaf: (leaf == leaf[:1]) | _like(later, leaf), got))
  independent = router.depends_on == "token" or not (training or getattr(router, "always", False))
  assert all(leaf.all() for leaf in same) == independent
  moe = MoEConfig(E, active(router), router, balance=())
  alone = scored_alone(
    TransformerConfig(stack=(LayerGroup((BlockConfig(SoftmaxAttention(), moe),)),))
  )
  assert training or independent or not alone


@member
def test_a_permutation_of_tokens_permutes_decisions(router):
  graph, state = build(router, active(router))
  x, tokens = draw(24), tokens_of(np.ones((1, 24)))
  before = route(graph, state, x, tokens)
  order = np.random.default_rng(3).permutation(24)
  moved = route(graph, state, x[order], jax.tree.map(lambda leaf: leaf[:, order], tokens))
  jax.tree.map(lambda a, b: np.testing.assert_array_equal(np.asarray(a)[order], b), before, moved)


@member
def test_it_is_the_same_without_jit_and_float32_for_bfloat16_tokens(router):
  graph, state = build(router, active(router))
  x, tokens = jnp.asarray(draw(14)).astype(jnp.bfloat16), tokens_of(np.ones((2, 7)))
  compiled = route(graph, state, x, tokens)
  eager = module_of(graph, state)(x, tokens, None, None)[0]
  exact = route(graph, state, x.astype(jnp.float32), tokens)
  for field in dataclasses.fields(compiled):
    got = getattr(compiled, field.name)
    if not isinstance(got, jax.Array):
      continue
    assert got.dtype != jnp.bfloat16
    np.testing.assert_allclose(getattr(eager, field.name), got, rtol=1e-6, atol=1e-7)
    np.testing.assert_array_equal(getattr(exact, field.name), got)


@member
def test_the_stated_number_of_parameters_is_what_the_router_has(router):
  _, state = build(router, active(router))
  sizes = [leaf.size for path, leaf in state.items() if not path.startswith("buffers/")]
  assert sum(sizes) == router.num_params(D, E)


def _like(flags, leaf):
  return flags.reshape(*flags.shape, *[1] * (leaf.ndim - flags.ndim))


@pytest.mark.slow
@pytest.mark.parametrize("cls", routing.RULES)
def test_a_rule_works_with_every_score_and_every_gate(cls):
  num_active = cls.fixed_active or 2
  routers = [
    *(cls(score=score) for score in SCORES),
    *(cls(gate=gate) for _, gate in GATES.values()),
  ]
  built = [build(router, num_active) for router in routers]
  x, tokens = draw(14), tokens_of(CASES["rows with padding"][1])

  @jax.jit
  def run(x, states):
    def value(x, states):
      got = [route(graph, state, x, tokens, True) for (graph, _), state in zip(built, states)]
      total = sum(jnp.sum(one.weight_TA**2) + jnp.sum(one.scores_TE**2) for one in got)
      return total, [(one.expert_TA, one.weight_TA) for one in got]

    return jax.grad(value, argnums=(0, 1), has_aux=True)(x, states)

  grads, found = run(x, [state for _, state in built])
  assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(grads))
  for router, (expert, weight) in zip(routers, found, strict=True):
    assert all(len(set(row)) == expert.shape[1] for row in np.asarray(expert))
    assert np.isfinite(weight).all() and (np.asarray(weight) >= 0).all()
    whole = np.sum(weight, axis=1)
    if router.normalize:
      np.testing.assert_allclose(whole[whole > 0], 1, rtol=1e-5)
      assert (whole > 0).all() or router.score == "relu"
