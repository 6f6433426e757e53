"""Every router with every dispatcher, values and gradients, against a loop over tokens.

A router and a dispatcher are compiled once each and chained by their vector-Jacobian products, so
that pairs cost no compilation; whole layers are compiled for a few pairs, and for all when slow.
"""

import dataclasses
import functools

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
from jaxmoe.moe.dispatch import DISPATCHERS, DispatchContext
from jaxmoe.moe.experts import EXPERTS, SwiGLU
from jaxmoe.moe.layer import MoEConfig
from jaxmoe.moe.routers import ROUTERS
from jaxmoe.moe.routing import sum_routing
from jaxmoe.parity.cell_errors import tree_error
from tests.contracts.oracles import dispatch as dispatch_oracle
from tests.contracts.oracles import routing as routing_oracle

D, E, A, F, T = 4, 4, 2, 3, 11
KEYS = Keys.from_seed(5)
SITE = DispatchContext(keys=KEYS / "dispatch" / "0")
CASES = (
  "sizes that divide nothing", "no token for an expert", "all tokens alike", "one token",
  "all padding",
)  # fmt: skip
router = pytest.mark.parametrize("router", ROUTERS)
dispatcher = pytest.mark.parametrize("dispatcher", DISPATCHERS)
EXPERT_GRAPH, EXPERT_STATE = nnx.split(SwiGLU(F).build(Init(Keys.from_seed(1)), D, E))
EXPERT_WEIGHTS = nnx.to_pure_dict(EXPERT_STATE)


@functools.cache
def build(name):
  """Returns a router's graph and leaves, none of which is zero."""
  config = ROUTERS[name][1]
  module = config.build(Init(Keys.from_seed(0)), D, E, config.fixed_active or A)
  state = nnx.to_pure_dict(nnx.state(module))
  for path, leaf in param_names.flatten(state).items():
    # Thresholds and biases about the size of scores.
    drawn = np.random.default_rng(list(path.encode())).uniform(0.1, 0.3, leaf.shape)
    names_, place = path.split("/"), state
    for piece in names_[:-1]:
      place = place[piece]
    place[names_[-1]] = leaf + jnp.asarray(drawn, jnp.float32)
  return nnx.graphdef(module), state


def tokens_of(valid):
  slot = jnp.arange(T, dtype=jnp.int32)[None]
  return Tokens(slot, slot, jnp.asarray(valid, jnp.int32)[None], slot)


def draw(case, seed=1):
  """Returns x (T, D) and which tokens count."""
  rng = np.random.default_rng(seed)
  x, valid = rng.normal(size=(T, D)), rng.random(T) < 0.8
  if case == "no token for an expert":
    weight = np.asarray(param_names.flatten(build("topk")[1])["gate/weight"])
    x -= 3 * weight[:, 3] / np.linalg.norm(weight[:, 3])
  if case == "all tokens alike":
    x = x[:1] * (2 + 0.1 * rng.permutation(T)[:, None]) + 0.05 * x
  if case in ("one token", "all padding"):
    valid = (np.arange(T) == 4) & (case == "one token")
  return x.astype(np.float32), valid


@functools.partial(jax.jit, static_argnums=0)
def route(graph, state, x, tokens, grad_weight, grad_scores):
  """Returns a routing, and the gradients of the leaves and of x for those of its parts."""

  def decide(state, x):
    routing = nnx.merge(graph, state)(x, tokens, None, KEYS / "router")[0]
    return (routing.weight_TA, routing.scores_TE), routing

  _, pull, routing = jax.vjp(decide, state, x, has_aux=True)
  bare = dataclasses.replace(routing, load_TE=None, margins_TE=None)
  return bare, *pull((grad_weight, grad_scores))


@functools.partial(jax.jit, static_argnums=0)
def dispatch(config, x, routing, weights, grad_y):
  """Returns outputs, counts and the gradients of x, weights, scores and experts."""

  def compute(x, weight_TA, scores_TE, weights):
    moved = dataclasses.replace(routing, weight_TA=weight_TA, scores_TE=scores_TE)
    return config(x, moved, nnx.merge(EXPERT_GRAPH, weights), SITE)

  inputs = x, routing.weight_TA, routing.scores_TE, weights
  y, pull, counts = jax.vjp(compute, *inputs, has_aux=True)
  return y, counts, *pull(grad_y)


def run(name, config, x, valid, grad_y):
  """Returns routing, outputs, counts and the gradients of x and of the leaves of both modules."""
  graph, state = build(name)
  tokens = tokens_of(valid)
  width = jax.eval_shape(
    lambda: nnx.merge(graph, state)(x, tokens, None, KEYS / "router")[0]
  ).expert_TA.shape[1]  # fmt: skip
  zeros = np.zeros((T, width), np.float32), np.zeros((T, E), np.float32)
  routing, *_ = route(graph, state, x, tokens, *zeros)
  y, counts, by_rows, grad_weight, grad_scores, of_experts = dispatch(
    config, x, routing, EXPERT_WEIGHTS, grad_y
  )
  _, of_router, by_router = route(graph, state, x, tokens, grad_weight, grad_scores)
  leaves = {"x": by_rows + by_router, **param_names.flatten(of_router), **of_experts}
  return routing, y, counts, leaves


def decide(name, valid, leaves):
  """Returns the oracle's decision from float64 leaves."""
  config = ROUTERS[name][1]
  found = routing_oracle.route(
    config, config.fixed_active or A, leaves["x"], leaves, valid[None].astype(int), KEYS / "router"
  )
  found["valid"] = found["valid"] & valid[:, None]
  found["active"] = getattr(config, "factor", 1.0) * (config.fixed_active or A)
  return found


def loop(name, config, valid, leaves, slope=None):
  """Returns y (T, D) in float64, the decision and what became of each choice.

  `slope` is that of the weights where gradients are taken, if it is not the weights' own.
  """
  decision = decide(name, valid, leaves)
  chance = np.asarray(jax.random.uniform(SITE.keys("overflow"), decision["expert"].shape))
  fate = dispatch_oracle.fate(config, decision, chance)
  weight = decision["weight"]
  if slope is not None:
    weight = weight + decision["estimated"] - slope
  y = np.zeros((T, D))
  for token, choice in np.argwhere(fate["has_row"]):
    expert = fate["expert"][token, choice]
    gate, up = np.einsum("d,dgf->gf", leaves["x"][token], leaves["gate_up"][expert])
    hidden = gate / (1 + np.exp(-gate)) * up
    scale = weight[token, choice] * fate["ratio"][token, choice]
    y[token] += scale * hidden @ leaves["down"][expert]
  return y, decision, fate


@router
@dispatcher
def test_values_counts_and_gradients_equal_the_float64_loop(router, dispatcher):
  config = DISPATCHERS[dispatcher][1]
  params = {**param_names.flatten(build(router)[1]), **EXPERT_WEIGHTS}
  for case in CASES:
    x, valid = draw(case)
    rng = np.random.default_rng(1)
    grad_y = rng.normal(size=(T, D)).astype(np.float32)
    routing, y, counts, grads = run(router, config, x, valid, grad_y)
    leaves = {key: np.asarray(leaf, np.float64) for key, leaf in {"x": x, **params}.items()}
    right, decision, fate = loop(router, config, valid, leaves)
    used = decision["valid"]
    number = float(sum_routing(routing, jnp.asarray(valid)).counts_E.sum())
    dropped, spilled = (sum(map(float, of.values())) for of in counts)
    assert number == np.sum(routing.valid_TA), case
    same = np.array_equal(routing.valid_TA, used) and np.array_equal(
      np.asarray(routing.expert_TA)[used], decision["expert"][used]
    )
    if ROUTERS[router][1].depends_on == "batch" and not (same and decision["clear"][valid].all()):
      assert case != CASES[0], "choose another seed"
      continue  # Several ways to share tokens out are as good as each other, or almost.
    assert same and decision["clear"][valid].all(), case
    assert number == fate["has_row"].sum() + dropped == used.sum()
    assert spilled == np.sum(fate["has_row"] & (fate["expert"] != decision["expert"]))
    np.testing.assert_allclose(y, right, rtol=1e-5, atol=1e-5, err_msg=case)
    np.testing.assert_array_equal(np.asarray(y)[~valid], 0)
    if case not in ("sizes that divide nothing", "all tokens alike"):
      assert all(np.isfinite(grad).all() for grad in grads.values())
      continue
    slope = decision.get("estimated")
    for key, leaf in leaves.items():
      way, ends = rng.normal(size=leaf.shape), []
      for step in (1e-6, -1e-6):
        moved = {**leaves, key: leaf + step * way}
        ends.append(np.sum(grad_y * loop(router, config, valid, moved, slope)[0]))
      expected = (ends[0] - ends[1]) / 2e-6 if not key.startswith("buffers/") else 0.0
      # A sum over all entries of a leaf, each a float32.
      message = f"{case}, {key}"
      np.testing.assert_allclose(
        np.sum(way * grads[key]), expected, rtol=1e-4, atol=1e-4, err_msg=message
      )


@router
@dispatcher
def test_what_padding_holds_changes_nothing_bit_for_bit(router, dispatcher):
  config = DISPATCHERS[dispatcher][1]
  x, valid = draw("sizes that divide nothing")
  grad_y = valid[:, None] * np.ones_like(x)
  results = []
  for filling in (x, 100 * draw("all padding", seed=9)[0]):
    _, *result = run(router, config, np.where(valid[:, None], x, filling), valid, grad_y)
    results.append(result)
  jax.tree.map(np.testing.assert_array_equal, *results)


@functools.partial(jax.jit, static_argnums=0)
def evaluate(graph, state, x, tokens):
  """Returns the routing of evaluation, its buffers and probabilities aside."""
  routing = nnx.merge(graph, state)(x, tokens, None, None)[0]
  return dataclasses.replace(routing, load_TE=None, margins_TE=None)


@router
def test_a_permutation_of_tokens_permutes_outputs_where_nothing_is_dropped(router):
  graph, state = build(router)
  x, valid = draw("sizes that divide nothing")
  order, tokens = np.random.default_rng(3).permutation(T), tokens_of(valid)
  routing = evaluate(graph, state, x, tokens)
  moved = evaluate(graph, state, x[order], jax.tree.map(lambda leaf: leaf[:, order], tokens))
  for name in ("dense", "dropless"):
    config, ones = DISPATCHERS[name][1], np.ones_like(x)
    y, *_ = dispatch(config, x, routing, EXPERT_WEIGHTS, ones)
    moved_y, *_ = dispatch(config, x[order], moved, EXPERT_WEIGHTS, ones)
    # A vectorised loop may round its last rows otherwise.
    np.testing.assert_allclose(np.asarray(y)[order], moved_y, rtol=1e-5, atol=1e-6)


@router
def test_recorded_choices_given_back_weigh_the_same_bit_for_bit(router):
  graph, state = build(router)
  x, valid = draw("sizes that divide nothing")
  tokens = tokens_of(valid)
  routing = evaluate(graph, state, x, tokens)
  given = jnp.where(routing.valid_TA, routing.expert_TA, -1)[None]
  again = evaluate(graph, state, x, dataclasses.replace(tokens, replayed_experts=given))
  used = np.asarray(routing.valid_TA)
  np.testing.assert_array_equal(again.valid_TA, used)
  for field in ("expert_TA", "weight_TA"):
    np.testing.assert_array_equal(getattr(again, field)[used], getattr(routing, field)[used])
  assert again.num_active == routing.num_active, "buffers would have other sizes"


def layer_of(router, dispatcher, experts):
  """Returns a whole layer's graph and leaves."""
  config = ROUTERS[router][1]
  moe = MoEConfig(E, config.fixed_active or A, config, experts, DISPATCHERS[dispatcher][1])
  graph, state = nnx.split(moe.build(Init(Keys.from_seed(0)), D))
  return graph, nnx.to_pure_dict(state)


def whole(graph, state, x, tokens):
  """Returns the outputs, sums and gradients of a whole layer."""

  def value(state, x):
    y, _, sums = nnx.merge(graph, state)(x[None], tokens, None, KEYS)
    return jnp.sum(y**2), (y[0], sums)

  (_, (y, sums)), grads = jax.value_and_grad(value, argnums=(0, 1), has_aux=True)(state, x)
  return y, sums, grads


FEW = [
  ("topk", "dropless"), ("expert_choice", "capacity"), ("causal_expert_choice", "einsum"),
  ("skewed", "capacity_spill"),
]  # fmt: skip


@pytest.mark.parametrize(
  "router, dispatcher", [FEW[0], *(pytest.param(*pair, marks=pytest.mark.slow) for pair in FEW[1:])]
)
def test_a_whole_layer_compiles_once_and_is_the_same_without_jit(router, dispatcher):
  graph, state = layer_of(router, dispatcher, SwiGLU(F))
  compiled = jax.jit(functools.partial(whole, graph))
  for seed in (0, 1):
    x, valid = draw("sizes that divide nothing", seed=seed)
    y, sums, grads = compiled(state, jnp.asarray(x), tokens_of(valid))
  assert compiled._cache_size() == 1
  eager_y, eager_sums, eager_grads = whole(graph, state, jnp.asarray(x), tokens_of(valid))
  close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5)
  jax.tree.map(close, (y, sums, grads), (eager_y, eager_sums, eager_grads))


def tries(router, experts):
  """Yields name, x, valid and tokens of every case; pairs also get the fifth token alone."""
  for case in CASES:
    x, valid = draw(case)
    tokens = tokens_of(valid)
    yield case, jnp.asarray(x), valid, tokens
    if router == "topk" or experts == "swiglu":
      yield f"{case}, one", x[4:5], valid[4:5], jax.tree.map(lambda leaf: leaf[:, 4:5], tokens)


@functools.cache
def dense_results(router, experts):
  """Returns outputs and gradients of every try where each expert computes each token."""
  graph, state = layer_of(router, "dense", EXPERTS[experts][1])
  compiled = jax.jit(functools.partial(whole, graph))
  found = {name: compiled(state, x, tokens) for name, x, _, tokens in tries(router, experts)}
  return {name: jax.device_get((y, grads)) for name, (y, _, grads) in found.items()}


@pytest.mark.slow
@pytest.mark.parametrize("experts", EXPERTS)
@router
@dispatcher
def test_a_whole_layer_equals_dense_dispatch_where_nothing_is_dropped(router, dispatcher, experts):
  try:
    graph, state = layer_of(router, dispatcher, EXPERTS[experts][1])
  except InputError:
    pytest.skip("the parts refuse each other")
  compiled, dense = jax.jit(functools.partial(whole, graph)), dense_results(router, experts)
  for name, x, valid, tokens in tries(router, experts):
    y, sums, grads = compiled(state, x, tokens)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((y, grads))), name
    np.testing.assert_array_equal(np.asarray(y)[~valid], 0, err_msg=name)
    lost = sum(map(float, (*sums.dropped.values(), *sums.spilled.values())))
    assert 0 <= lost <= float(sums.router.counts_E.sum()), name
    if not lost:
      right, right_grads = dense[name]
      np.testing.assert_allclose(y, right, rtol=1e-5, atol=1e-5, err_msg=name)
      assert tree_error(grads, right_grads) < 2e-5, name
  assert compiled._cache_size() <= 2
