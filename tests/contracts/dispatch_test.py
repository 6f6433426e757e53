import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxmoe.core.parameters import Init
from jaxmoe.core.rng import Keys
from jaxmoe.core.tokens import Tokens
from jaxmoe.moe.dispatch import DISPATCHERS, Capacity, Dense, Dropless
from jaxmoe.moe.dispatch.plan import Uniform
from jaxmoe.moe.experts import SwiGLU
from jaxmoe.moe.layer import MoE
from jaxmoe.moe.routing import Routing, sum_routing

D, E, A, F = 6, 5, 2, 4
T = 41  # Divides nothing, and all of it on one expert overflows the rows `fused` gives an expert.
MEMBERS = {
  **{name: instance for name, (_, instance) in DISPATCHERS.items()},
  **{f"dropless {name}": Dropless(name) for name in ("fused", "blocks", "ragged", "loop")},
  "capacity, tight": Capacity(factor=0.4),
  "capacity, one row": Capacity(factor=1e-6),
  "capacity, wide": Capacity(factor=100.0),
}
DROPS = ("capacity", "capacity, tight", "capacity, one row")
DROPLESS = {name: member for name, member in MEMBERS.items() if name not in DROPS}
member = pytest.mark.parametrize("name", MEMBERS)
drop_free = pytest.mark.parametrize("name", DROPLESS)
CASES = (
  "random",
  "with padding",
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
  weight = rng.uniform(0.1, 1, size=(tokens, A))
  x = rng.normal(size=(tokens, D))
  return x.astype(np.float32), {"expert": expert, "weight": weight, "valid": valid}


def routing_of(decision):
  expert = jnp.asarray(decision["expert"], jnp.int32)
  valid = jnp.broadcast_to(jnp.asarray(decision["valid"])[:, None], expert.shape)
  zeros = jnp.zeros((expert.shape[0], E))
  return Routing(expert, jnp.asarray(decision["weight"], jnp.float32), valid, zeros, zeros[:, 0])


@functools.partial(jax.jit, static_argnums=0)
def run(dispatch, x, routing, weights, grad_y):
  """Returns outputs, drops and the gradients of x, the combine weights and the experts."""

  def compute(x, weight_TA, weights):
    moved = Routing(
      routing.expert_TA, weight_TA, routing.valid_TA, routing.scores_TE, routing.log_z_T
    )
    return dispatch(x, moved, nnx.merge(GRAPH, weights))

  y, vjp, dropped = jax.vjp(compute, x, routing.weight_TA, weights, has_aux=True)
  return y, dropped, *vjp(grad_y)


def kept(dispatch, decision):
  """Returns (T, A), which choices have a row: by queues, in order of tokens."""
  tokens, capacity = len(decision["valid"]), len(decision["valid"])
  if isinstance(dispatch, Capacity):
    capacity = min(tokens, max(1, int(np.ceil(dispatch.factor * tokens * A / E))))
  length, has_row = np.zeros(E, int), np.zeros((tokens, A), bool)
  for token, choice in np.ndindex(tokens, A):
    if decision["valid"][token]:
      expert = decision["expert"][token, choice]
      has_row[token, choice] = length[expert] < capacity
      length[expert] += 1
  return has_row


def oracle(x, decision, has_row, grad_y):
  """Returns float64 y and the gradients, choice by choice."""
  gate_up, down = (np.asarray(WEIGHTS[key], np.float64) for key in ("gate_up", "down"))
  y, grad_x, grad_weight = np.zeros(x.shape), np.zeros(x.shape), np.zeros(has_row.shape)
  grads = {"gate_up": np.zeros_like(gate_up), "down": np.zeros_like(down)}
  for token, choice in np.argwhere(has_row):
    expert, scale = decision["expert"][token, choice], decision["weight"][token, choice]
    row, grad_row = x[token].astype(np.float64), scale * grad_y[token]
    gate, up = np.einsum("d,dgf->gf", row, gate_up[expert])
    sigmoid = 1 / (1 + np.exp(-gate))
    hidden = gate * sigmoid * up
    y[token] += scale * hidden @ down[expert]
    grad_weight[token, choice] = hidden @ down[expert] @ grad_y[token]
    back = down[expert] @ grad_row
    first = np.stack([back * up * sigmoid * (1 + gate * (1 - sigmoid)), back * gate * sigmoid])
    grads["down"][expert] += np.outer(hidden, grad_row)
    grads["gate_up"][expert] += np.einsum("d,gf->dgf", row, first)
    grad_x[token] += np.einsum("gf,dgf->d", first, gate_up[expert])
  return y, grad_x, grad_weight, grads


def test_the_gradients_of_the_oracle_are_its_finite_differences():
  x, decision = draw("with padding", tokens=7)
  has_row = kept(Capacity(0.6), decision)
  rng = np.random.default_rng(1)
  way, grad_y = rng.normal(size=x.shape), rng.normal(size=x.shape)
  _, grad_x, grad_weight, _ = oracle(x, decision, has_row, grad_y)
  slope = np.sum(way * grad_x) + grad_weight.sum()
  ends = []
  for step in (1e-6, -1e-6):
    there = decision | {"weight": decision["weight"] + step}
    moved = x.astype(np.float64) + step * way
    ends.append(np.sum(grad_y * oracle(moved, there, has_row, grad_y)[0]))
  np.testing.assert_allclose((ends[0] - ends[1]) / 2e-6, slope, rtol=1e-6)


@member
@pytest.mark.parametrize("case", CASES)
def test_values_drops_and_gradients_equal_the_float64_loop(name, case):
  x, decision = draw(case)
  grad_y = np.random.default_rng(1).normal(size=x.shape).astype(np.float32)
  has_row = kept(MEMBERS[name], decision)
  y, dropped, grad_x, grad_weight, grads = run(
    MEMBERS[name], x, routing_of(decision), WEIGHTS, grad_y
  )
  right = oracle(x, decision, has_row, grad_y)
  np.testing.assert_allclose(y, right[0], rtol=1e-5, atol=3e-6)
  np.testing.assert_allclose(grad_x, right[1], rtol=1e-5, atol=1e-5)
  np.testing.assert_allclose(grad_weight, right[2], rtol=1e-5, atol=1e-5)
  for key, grad in right[3].items():
    # Sums over up to 41 rows.
    np.testing.assert_allclose(grads[key], grad, rtol=1e-5, atol=3e-5)
  missing = np.sum(decision["valid"][:, None] & ~has_row)
  assert sum(map(float, dropped.values())) == missing
  if name not in DROPS:
    assert missing == 0


@member
@pytest.mark.parametrize("case", CASES)
def test_a_plan_gives_each_kept_choice_one_row_of_its_expert_and_counts_the_rest(name, case):
  dispatch = MEMBERS[name]
  x, decision = draw(case)
  routing = routing_of(decision)
  plan = dispatch.plan(routing)
  row_TA, token_R = np.asarray(plan.row_TA), np.asarray(plan.token_R)
  sizes = np.asarray(plan.groups.sizes_S)
  has_row = row_TA < len(token_R)
  np.testing.assert_array_equal(has_row, kept(dispatch, decision))
  rows = row_TA[has_row]
  assert len(set(rows)) == len(rows)
  np.testing.assert_array_equal(token_R[rows], np.argwhere(has_row)[:, 0])
  if isinstance(plan.groups, Uniform):
    slots, place = np.divmod(rows, plan.groups.rows_per_slot)
    first = np.zeros(E, int)
  else:
    first = np.cumsum(sizes) - sizes
    slots = np.searchsorted(np.cumsum(sizes), rows, side="right")
    place = rows - first[slots]
  np.testing.assert_array_equal(slots, decision["expert"][has_row])
  assert (place < sizes[slots]).all()
  counts = sum_routing(routing, jnp.asarray(decision["valid"])).counts_E
  dropped = sum(map(float, plan.dropped.values()))
  assert float(counts.sum()) == len(rows) + dropped == A * decision["valid"].sum()
  if not isinstance(dispatch, Dense):
    np.testing.assert_array_equal(np.bincount(slots, minlength=E), sizes)
    unused = np.setdiff1d(np.arange(len(token_R)), rows)
    np.testing.assert_array_equal(token_R[unused], len(x))


@member
@pytest.mark.parametrize("case", ["with padding", "all padding"])
def test_what_padding_holds_changes_nothing_bit_for_bit_and_comes_out_zero(name, case):
  x, decision = draw(case)
  other, other_decision = draw("random", seed=9)
  padding = ~decision["valid"]
  grad_y = np.random.default_rng(1).normal(size=x.shape).astype(np.float32)
  grad_y[padding] = 0
  before = run(MEMBERS[name], x, routing_of(decision), WEIGHTS, grad_y)
  x[padding] = 100 * other[padding]
  for key in ("expert", "weight"):
    decision[key][padding] = other_decision[key][padding]
  after = run(MEMBERS[name], x, routing_of(decision), WEIGHTS, grad_y)
  jax.tree.map(np.testing.assert_array_equal, before, after)
  np.testing.assert_array_equal(np.asarray(after[0])[padding], 0)


@drop_free
def test_a_permutation_of_tokens_permutes_outputs(name):
  x, decision = draw("with padding")
  order = np.random.default_rng(3).permutation(T)
  grad_y = np.ones_like(x)
  y, _, grad_x, grad_weight, grads = run(
    MEMBERS[name], x, routing_of(decision), WEIGHTS, grad_y
  )
  moved = {key: field[order] for key, field in decision.items()}
  moved_y, _, moved_x, moved_weight, moved_grads = run(
    MEMBERS[name], x[order], routing_of(moved), WEIGHTS, grad_y
  )
  for one, other in ((y, moved_y), (grad_x, moved_x), (grad_weight, moved_weight)):
    # A vectorised loop may round its last rows otherwise.
    np.testing.assert_allclose(np.asarray(one)[order], other, rtol=1e-5, atol=1e-6)
  # Sums over rows in another order.
  for key in grads:
    np.testing.assert_allclose(grads[key], moved_grads[key], rtol=1e-5, atol=1e-5)


@member
def test_it_is_the_same_without_jit(name):
  x, decision = draw("with padding", tokens=7)
  routing = routing_of(decision)
  y, dropped = MEMBERS[name](jnp.asarray(x), routing, nnx.merge(GRAPH, WEIGHTS))
  compiled, also_dropped, *_ = run(MEMBERS[name], x, routing, WEIGHTS, jnp.ones_like(x))
  np.testing.assert_allclose(y, compiled, rtol=1e-6, atol=1e-6)
  assert dropped.keys() == also_dropped.keys()
  jax.tree.map(np.testing.assert_array_equal, dropped, also_dropped)


def test_every_dropless_back_end_equals_every_other():
  for case in CASES[:4]:
    x, decision = draw(case)
    routing, grad_y = routing_of(decision), jnp.ones_like(x)
    outputs = {
      name: run(dispatch, x, routing, WEIGHTS, grad_y)[0] for name, dispatch in DROPLESS.items()
    }
    for name, y in outputs.items():
      message = f"{name}, {case}"
      np.testing.assert_allclose(y, outputs["dense"], rtol=1e-5, atol=1e-6, err_msg=message)


def layer_of(dispatch, seed=0):
  """Returns (graph, state) of a whole layer, router included."""
  config = MoE(E, A, experts=SwiGLU(F), dispatch=dispatch, shared_hidden=3)
  layer = config.build(Init(Keys.from_seed(seed)), D)
  return nnx.graphdef(layer), nnx.to_pure_dict(nnx.state(layer))


B, L, TRIALS = 2, 20, 200


def tokens_of(segment):
  slot = jnp.broadcast_to(jnp.arange(L, dtype=jnp.int32)[None], (B, L))
  return Tokens(slot, slot, jnp.asarray(segment, jnp.int32), slot)


@functools.partial(jax.jit, static_argnums=0)
def run_many(graph, state, inputs, tokens):
  """Returns outputs and which choices have a row, of many inputs through one compiled body.

  One body, because two compilations of one formula may differ in the last bit.
  """

  def once(x):
    layer = nnx.merge(graph, state)
    plan = layer.dispatch.plan(layer.router(x.reshape(-1, D), tokens, None, None)[0])
    has_row = plan.row_TA < plan.token_R.shape[0]
    return layer(x, tokens, None, None)[0], has_row.reshape(B, L, A)

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


@member
def test_a_later_token_never_changes_an_earlier_output_of_its_row(name):
  graph, state = layer_of(MEMBERS[name])
  inputs, here, later = perturbed(3.0)
  y, has_row = map(np.asarray, run_many(graph, state, inputs, tokens_of(np.ones((B, L)))))
  changed = np.any(y[1:] != y[:1], axis=-1)
  assert not (changed & here & ~later).any()
  assert (changed & later).any(axis=(1, 2)).mean() > 0.9, "the perturbation does nothing"
  # Other rows share the queues: what changes there is what lost or got a place, and nothing else.
  moved = np.any(has_row[1:] != has_row[:1], axis=-1)
  np.testing.assert_array_equal(changed & ~here, moved & ~here)
  if name != "capacity, one row":  # There the first row of the batch has every place, always.
    assert (moved & ~here).any() == (name in DROPS)


@member
def test_a_later_token_has_no_gradient_from_an_earlier_output(name):
  graph, state = layer_of(MEMBERS[name])
  x = jax.random.normal(jax.random.key(1), (B, L, D))
  tokens = tokens_of(np.ones((B, L)))
  half = L // 2

  @jax.jit
  def grad(x):
    early = lambda x: jnp.sum(nnx.merge(graph, state)(x, tokens, None, None)[0][:, :half])  # noqa: E731
    return jax.grad(early)(x)

  np.testing.assert_array_equal(grad(x)[:, half:], 0)
  assert np.abs(grad(x)[:, :half]).max() > 0
