import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxmoe.core.backends import HERE, Chooser, Devices, Need
from jaxmoe.core.init import Init
from jaxmoe.core.rng import Keys
from jaxmoe.core.tokens import Tokens
from jaxmoe.moe.dispatch import DISPATCHERS, Capacity, Dense, DispatchContext, Dropless, Einsum
from jaxmoe.moe.dispatch.capacity import Limited
from jaxmoe.moe.dispatch.overflow import OVERFLOW
from jaxmoe.moe.dispatch.plan import Plan, Uniform, tokens_of_rows
from jaxmoe.moe.experts import SwiGLU
from jaxmoe.moe.layer import MoEConfig
from jaxmoe.moe.routing import Routing, sum_routing
from jaxmoe.ops import expert_mlp, grouped_matmul
from tests.contracts.oracles import dispatch as oracles

D, E, A, F = 6, 5, 2, 4
T = 41  # Divides nothing, and all of it on one expert overflows the rows `fused` gives an expert.
CHOOSERS = {
  **{
    f"dropless, {layer}": Chooser(names=(("expert_mlp", layer),)) for layer in expert_mlp.BACKENDS
  },
  **{
    f"dropless, rows, {matmul}": Chooser(
      names=(("expert_mlp", "rows"), ("grouped_matmul", matmul))
    )
    for matmul, backend in grouped_matmul.BACKENDS.items()
    if backend.fits(Need(Devices("cpu"))) is None
  },
}
MEMBERS = {
  **{name: instance for name, (_, instance) in DISPATCHERS.items()},
  **dict.fromkeys(CHOOSERS, Dropless()),
  **{
    f"{overflow}, tight": Capacity(0.4, overflow=overflow, allow_future=True)
    for overflow in OVERFLOW
  },
  "position, one row": Capacity(factor=1e-6),
  "spill, one row": Capacity(factor=1e-6, overflow="spill"),
  "capacity, wide": Capacity(factor=100.0),
  "einsum, tight": Einsum(factor=0.4),
}


def rows(name, tokens):
  """Returns how many rows an expert has, at most T."""
  limited = isinstance(MEMBERS[name], Limited)
  return oracles.rows_of_an_expert(MEMBERS[name], tokens, A, E) if limited else tokens


DROPLESS = {name: member for name, member in MEMBERS.items() if rows(name, T) == T}
member = pytest.mark.parametrize("name", MEMBERS)
planning = pytest.mark.parametrize(
  "name", [name for name, member in MEMBERS.items() if not isinstance(member, Einsum)]
)
KEYS = Keys.from_seed(3)


def site(name):
  """Returns the context of a member."""
  return DispatchContext(keys=KEYS, chooser=CHOOSERS.get(name, HERE))


CASES = (
  "random",
  "with padding",
  "some choices do not count",
  "no token for an expert",
  "all tokens on the same experts",
  "all padding",
  "one token",
)
EXPERTS = SwiGLU(F).build(Init(Keys.from_seed(0)), D, E)
GRAPH, WEIGHTS = nnx.graphdef(EXPERTS), nnx.to_pure_dict(nnx.state(EXPERTS))


def draw(case, seed=0, tokens=T):
  """Returns x (T, D) and the decision of a router as a dict, in NumPy."""
  rng = np.random.default_rng(seed)
  tokens = 1 if case == "one token" else tokens
  logits = rng.normal(size=(tokens, E))
  if case == "no token for an expert":
    logits[:, 3] = -9
  if case == "all tokens on the same experts":
    logits[:, [4, 1]] = 9
  expert = np.argsort(-logits, axis=1, kind="stable")[:, :A]
  valid = np.ones(tokens, bool)
  if case == "with padding":
    valid = rng.random(tokens) < 0.6
  if case == "all padding":
    valid[:] = False
  valid = np.repeat(valid[:, None], A, axis=1)
  if case == "some choices do not count":
    valid &= rng.random((tokens, A)) < 0.7
  weight = rng.uniform(0.1, 1, size=(tokens, A))
  x = rng.normal(size=(tokens, D))
  scores = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
  return x.astype(np.float32), {
    "expert": expert, "weight": weight, "valid": valid, "scores": scores
  }  # fmt: skip


def routing_of(decision):
  expert = jnp.asarray(decision["expert"], jnp.int32)
  weight, scores = (jnp.asarray(decision[key], jnp.float32) for key in ("weight", "scores"))
  return Routing(expert, weight, jnp.asarray(decision["valid"]), scores, scores[:, 0])


def fate(dispatch, decision):
  """Returns what becomes of each choice, by the oracle and the chance that `site` draws."""
  chance = np.asarray(jax.random.uniform(KEYS("overflow"), decision["expert"].shape))
  return oracles.fate(dispatch, decision, chance)


@functools.partial(jax.jit, static_argnums=0)
def run(name, x, routing, weights, grad_y):
  """Returns outputs, counts and the gradients of x, weights, scores and the experts."""

  def compute(x, weight_TA, scores_TE, weights):
    moved = dataclasses.replace(routing, weight_TA=weight_TA, scores_TE=scores_TE)
    return MEMBERS[name](x, moved, nnx.merge(GRAPH, weights), site(name))

  inputs = x, routing.weight_TA, routing.scores_TE, weights
  y, vjp, counts = jax.vjp(compute, *inputs, has_aux=True)
  return y, counts, *vjp(grad_y)


def oracle(x, decision, found, grad_y):
  """Returns float64 y and the gradients of x, weights, scores and experts, choice by choice."""
  gate_up, down = (np.asarray(WEIGHTS[key], np.float64) for key in ("gate_up", "down"))
  y, grad_x, grad_weight = np.zeros(x.shape), np.zeros(x.shape), np.zeros(found["has_row"].shape)
  grad_scores = np.zeros((len(x), E))
  grads = {"gate_up": np.zeros_like(gate_up), "down": np.zeros_like(down)}
  for token, choice in np.argwhere(found["has_row"]):
    expert, ratio = found["expert"][token, choice], found["ratio"][token, choice]
    scale = decision["weight"][token, choice] * ratio
    row, grad_row = x[token].astype(np.float64), scale * grad_y[token]
    gate, up = np.einsum("d,dgf->gf", row, gate_up[expert])
    sigmoid = 1 / (1 + np.exp(-gate))
    hidden = gate * sigmoid * up
    out = hidden @ down[expert]
    y[token] += scale * out
    grad_weight[token, choice] = ratio * out @ grad_y[token]
    if ratio < 1:  # The weight times score(new) / score(old).
      old = decision["expert"][token, choice]
      grad_scores[token, expert] += scale * out @ grad_y[token] / decision["scores"][token, expert]
      grad_scores[token, old] -= scale * out @ grad_y[token] / decision["scores"][token, old]
    back = down[expert] @ grad_row
    first = np.stack([back * up * sigmoid * (1 + gate * (1 - sigmoid)), back * gate * sigmoid])
    grads["down"][expert] += np.outer(hidden, grad_row)
    grads["gate_up"][expert] += np.einsum("d,gf->dgf", row, first)
    grad_x[token] += np.einsum("gf,dgf->d", first, gate_up[expert])
  return y, grad_x, grad_weight, grad_scores, grads


def test_the_gradients_of_the_oracle_are_its_finite_differences():
  x, decision = draw("some choices do not count", tokens=9)
  dispatch = Capacity(0.6, overflow="spill")
  assert (fate(dispatch, decision)["ratio"] < 1).any()
  rng = np.random.default_rng(1)
  way, grad_y = rng.normal(size=x.shape), rng.normal(size=x.shape)
  of_scores = rng.normal(size=(len(x), E))
  _, grad_x, grad_weight, grad_scores, _ = oracle(x, decision, fate(dispatch, decision), grad_y)
  slope = np.sum(way * grad_x) + grad_weight.sum() + np.sum(of_scores * grad_scores)
  ends = []
  for step in (1e-6, -1e-6):
    scores = decision["scores"] + step * of_scores
    there = decision | {"weight": decision["weight"] + step, "scores": scores}
    moved = x.astype(np.float64) + step * way
    ends.append(np.sum(grad_y * oracle(moved, there, fate(dispatch, there), grad_y)[0]))
  np.testing.assert_allclose((ends[0] - ends[1]) / 2e-6, slope, rtol=1e-6)


@member
@pytest.mark.parametrize("case", CASES)
def test_values_counts_and_gradients_equal_the_float64_loop(name, case):
  x, decision = draw(case)
  grad_y = np.random.default_rng(1).normal(size=x.shape).astype(np.float32)
  found = fate(MEMBERS[name], decision)
  y, counts, grad_x, grad_weight, grad_scores, grads = run(
    name, x, routing_of(decision), WEIGHTS, grad_y
  )
  right = oracle(x, decision, found, grad_y)
  np.testing.assert_allclose(y, right[0], rtol=1e-5, atol=3e-6)
  np.testing.assert_allclose(grad_x, right[1], rtol=1e-5, atol=1e-5)
  np.testing.assert_allclose(grad_weight, right[2], rtol=1e-5, atol=1e-5)
  # Divided by scores that may be small.
  np.testing.assert_allclose(grad_scores, right[3], rtol=1e-4, atol=1e-4)
  for key, grad in right[4].items():
    # Sums over up to 41 rows.
    np.testing.assert_allclose(grads[key], grad, rtol=1e-5, atol=3e-5)
  missing = np.sum(decision["valid"] & ~found["has_row"])
  moved = np.sum(found["has_row"] & (found["expert"] != decision["expert"]))
  assert sum(map(float, counts.dropped.values())) == missing
  assert sum(map(float, counts.spilled.values())) == moved
  if name in DROPLESS:
    assert missing == moved == 0


@planning
@pytest.mark.parametrize("case", CASES)
def test_a_plan_gives_each_kept_choice_one_row_of_its_expert_and_counts_the_rest(name, case):
  dispatch = MEMBERS[name]
  x, decision = draw(case)
  routing, found = routing_of(decision), fate(dispatch, decision)
  plan = dispatch.plan(routing, site(name))
  row_TA, token_R = np.asarray(plan.row_TA), np.asarray(plan.token_R)
  sizes = np.asarray(plan.groups.sizes_S)
  has_row = row_TA < len(token_R)
  np.testing.assert_array_equal(has_row, found["has_row"])
  rows = row_TA[has_row]
  assert len(set(rows)) == len(rows)
  np.testing.assert_array_equal(token_R[rows], np.argwhere(has_row)[:, 0])
  slots, place = slot_and_place(plan, rows)
  np.testing.assert_array_equal(slots, found["expert"][has_row])
  assert (place < sizes[slots]).all()
  counts = sum_routing(routing, jnp.ones(len(x), bool)).counts_E
  dropped = sum(map(float, plan.dropped.values()))
  assert float(counts.sum()) == len(rows) + dropped == decision["valid"].sum()
  if not isinstance(dispatch, Dense):
    np.testing.assert_array_equal(np.bincount(slots, minlength=E), sizes)
    unused = np.setdiff1d(np.arange(len(token_R)), rows)
    np.testing.assert_array_equal(token_R[unused], len(x))


def slot_and_place(plan, rows):
  """Returns the slots of rows, and their places there."""
  if isinstance(plan.groups, Uniform):
    return rows // plan.groups.rows_per_slot, rows % plan.groups.rows_per_slot
  ends = jnp.cumsum(plan.groups.sizes_S)
  slots = jnp.searchsorted(ends, rows, side="right")
  return slots, rows - (ends - plan.groups.sizes_S)[slots]


@member
@pytest.mark.parametrize("case", ["with padding", "all padding"])
def test_what_padding_holds_changes_nothing_bit_for_bit_and_comes_out_zero(name, case):
  x, decision = draw(case)
  other, other_decision = draw("random", seed=9)
  padding = ~decision["valid"][:, 0]
  grad_y = np.random.default_rng(1).normal(size=x.shape).astype(np.float32)
  grad_y[padding] = 0
  before = run(name, x, routing_of(decision), WEIGHTS, grad_y)
  x[padding] = 100 * other[padding]
  for key in ("expert", "weight", "scores"):
    decision[key][padding] = other_decision[key][padding]
  after = run(name, x, routing_of(decision), WEIGHTS, grad_y)
  jax.tree.map(np.testing.assert_array_equal, before, after)
  np.testing.assert_array_equal(np.asarray(after[0])[padding], 0)


@pytest.mark.parametrize("name", [*DROPLESS, "score, tight"])
def test_a_permutation_of_tokens_permutes_outputs(name):
  x, decision = draw("with padding")
  order = np.random.default_rng(3).permutation(T)
  grad_y = np.ones_like(x)
  y, _, *grads, of_experts = run(name, x, routing_of(decision), WEIGHTS, grad_y)
  moved = {key: field[order] for key, field in decision.items()}
  moved_y, _, *moved_grads, moved_of_experts = run(
    name, x[order], routing_of(moved), WEIGHTS, grad_y
  )
  for one, other in zip((y, *grads), (moved_y, *moved_grads), strict=True):
    # A vectorised loop may round its last rows otherwise.
    np.testing.assert_allclose(np.asarray(one)[order], other, rtol=1e-5, atol=1e-6)
  # Sums over rows in another order.
  for key in of_experts:
    np.testing.assert_allclose(of_experts[key], moved_of_experts[key], rtol=1e-5, atol=1e-5)


@member
def test_it_is_the_same_without_jit(name):
  x, decision = draw("with padding", tokens=7)
  routing = routing_of(decision)
  y, counts = MEMBERS[name](jnp.asarray(x), routing, nnx.merge(GRAPH, WEIGHTS), site(name))
  compiled, also_counts, *_ = run(name, x, routing, WEIGHTS, jnp.ones_like(x))
  np.testing.assert_allclose(y, compiled, rtol=1e-6, atol=1e-6)
  assert jax.tree.structure(counts) == jax.tree.structure(also_counts)
  jax.tree.map(np.testing.assert_array_equal, counts, also_counts)


def test_every_dropless_back_end_equals_every_other():
  for case in CASES[:4]:
    x, decision = draw(case)
    routing, grad_y = routing_of(decision), jnp.ones_like(x)
    outputs = {
      name: run(name, x, routing, WEIGHTS, grad_y)[0] for name in DROPLESS
    }
    for name, y in outputs.items():
      message = f"{name}, {case}"
      np.testing.assert_allclose(y, outputs["dense"], rtol=1e-5, atol=1e-6, err_msg=message)


def layer_of(dispatch, seed=0):
  """Returns (graph, state) of a whole layer, router included."""
  config = MoEConfig(E, A, experts=SwiGLU(F), dispatch=dispatch, shared_mlp_dim=3)
  layer = config.build(Init(Keys.from_seed(seed)), D)
  return nnx.graphdef(layer), nnx.to_pure_dict(nnx.state(layer))


B, L, TRIALS = 2, 20, 200


def tokens_of(segment):
  slot = jnp.broadcast_to(jnp.arange(L, dtype=jnp.int32)[None], (B, L))
  return Tokens(slot, slot, jnp.asarray(segment, jnp.int32), slot)


@functools.partial(jax.jit, static_argnums=0)
def run_many(graph, state, inputs, tokens):
  """Returns outputs and which experts compute each token, of many inputs by one compiled body.

  One body, because two compilations of one formula may differ in the last bit.
  """

  def once(x):
    layer = nnx.merge(graph, state)
    routing = layer.router(x.reshape(-1, D), tokens, None, None)[0]
    context = DispatchContext(keys=KEYS / "dispatch" / "0")
    if isinstance(layer.dispatch, Einsum):
      computed_TE = jnp.any(layer.dispatch.masks(routing, context)[0] > 0, axis=2)
    else:
      plan = layer.dispatch.plan(routing, context)
      slot_TA = jnp.where(plan.row_TA < plan.token_R.size, slot_and_place(plan, plan.row_TA)[0], E)
      computed_TE = jnp.any(jax.nn.one_hot(slot_TA, E) > 0, axis=1)
    return layer(x, tokens, None, KEYS)[0], computed_TE.reshape(B, L, E)

  return jax.lax.map(once, inputs)


def perturbed(scale):
  """Returns (1 + TRIALS, B, L, D), the first as it was, and which tokens each trial changed."""
  rng = np.random.default_rng(1)
  x = rng.normal(size=(B, L, D))
  row, at = rng.integers(0, B, TRIALS), rng.integers(0, L, TRIALS)
  here = np.arange(B)[None, :, None] == row[:, None, None]
  later = here & (np.arange(L) >= at[:, None, None])
  noise = scale * rng.normal(size=(TRIALS, B, L, D))
  inputs = np.concatenate([x[None], np.where(later[..., None], x + noise, x)])
  return inputs.astype(np.float32), here & np.ones(L, bool), later


@dataclasses.dataclass(frozen=True)
class GShardOrder(Capacity):
  """All first choices have their places before all second ones (Algorithm 1 of GShard)."""

  def plan(self, routing, context):
    capacity, one_hot = self.rows_for(routing, context), jax.nn.one_hot(routing.expert_TA, E)
    in_order = jnp.concatenate([one_hot[:, choice] for choice in range(A)])
    place = jnp.sum((jnp.cumsum(in_order, axis=0) - in_order) * in_order, axis=1)
    place_TA = place.reshape(A, -1).T.astype(jnp.int32)
    row_TA = jnp.where(place_TA < capacity, routing.expert_TA * capacity + place_TA, E * capacity)
    groups = Uniform(jnp.full(E, capacity), capacity)
    return Plan(tokens_of_rows(row_TA, E * capacity), row_TA, routing.weight_TA, groups)


@pytest.mark.parametrize("name", [*MEMBERS, "gshard order"])
def test_a_later_token_changes_an_earlier_output_of_its_row_only_where_that_is_stated(name):
  dispatch = MEMBERS.get(name, GShardOrder(0.8))
  graph, state = layer_of(dispatch)
  inputs, here, later = perturbed(3.0)
  y, computed = map(np.asarray, run_many(graph, state, inputs, tokens_of(np.ones((B, L)))))
  changed = np.any(y[1:] != y[:1], axis=-1)
  leaks = dispatch.looks_ahead or name == "gshard order"
  assert (changed & here & ~later).any() == leaks
  assert (changed & later).any(axis=(1, 2)).mean() > 0.9, "the perturbation does nothing"
  # Other rows share the queues: what changes there is what lost or got a place, and nothing else.
  moved = np.any(computed[1:] != computed[:1], axis=-1)
  # (A row that is at another place of its expert's may be rounded otherwise, to the last bit.)
  rounding = 0 if name in DROPLESS else 2e-6
  changed = np.any(np.abs(y[1:] - y[:1]) > rounding, axis=-1)
  np.testing.assert_array_equal(changed & ~here, moved & ~here)
  if name in DROPLESS:
    assert not (moved & ~here).any()
  elif computed[:, 1].any() and dispatch.factor < 2:  # Or the first row of the batch has it all.
    assert (moved & ~here).any()


@member
def test_a_later_token_has_no_gradient_from_an_earlier_output(name):
  graph, state = layer_of(MEMBERS[name])
  x = jax.random.normal(jax.random.key(1), (B, L, D))
  tokens = tokens_of(np.ones((B, L)))
  half = L // 2

  @jax.jit
  def grad(x):
    early = lambda x: jnp.sum(nnx.merge(graph, state)(x, tokens, None, KEYS)[0][:, :half])  # noqa: E731
    return jax.grad(early)(x)

  np.testing.assert_array_equal(grad(x)[:, half:], 0)
  assert np.abs(grad(x)[:, :half]).max() > 0
