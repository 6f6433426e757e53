import dataclasses
import typing

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmoe.core.errors import InputError
from jaxmoe.moe.balance import (
  BALANCE,
  Heterogeneous,
  LatencyAware,
  LoadBalance,
  LoadConcentration,
  MutualInformation,
  NullAveraged,
  RouterZ,
  Scope,
  Sparsity,
  StepTotals,
)
from jaxmoe.moe.experts import SwiGLU
from jaxmoe.moe.layer import MoEConfig
from jaxmoe.moe.routers import TopK
from jaxmoe.moe.routers.scores import SCORES
from jaxmoe.moe.routing import RouterSums, Routing, sum_rows
from tests.contracts.oracles import balance as oracle
from tests.contracts.oracles import routing as routing_oracle

# M microbatches of B rows of L tokens, on G devices.
E, A, M, B, L, G = 5, 2, 3, 4, 3, 2
SCOPES = typing.get_args(Scope)
INSTANCES = {
  **{name: instance for name, (_, instance) in BALANCE.items()},
  "latency_aware": LatencyAware(latency=(3.0, 1.0, 1.0, 0.5, 2.0)),
  "sparsity, whatever the load": Sparsity(by_load=False),
}
MEMBERS = {
  f"{name}, {scope}": dataclasses.replace(instance, scope=scope)
  for name, instance in INSTANCES.items()
  for scope in SCOPES
}
member = pytest.mark.parametrize("balance", MEMBERS.values(), ids=MEMBERS.keys())
CASES = (
  "random",
  "no token for an expert",
  "all tokens on the same experts",
  "a microbatch of padding",
  "a row of padding",
  "all padding",
)
cases = pytest.mark.parametrize("case", CASES)


@dataclasses.dataclass(frozen=True)
class WithIdle(SwiGLU):
  """Experts of which the last two are said to compute nothing."""

  def num_zero_compute(self, num_experts):
    return 2


LAYER = MoEConfig(num_experts=E, num_active=A, experts=WithIdle(mlp_dim=4))


def draw(case, seed=0):
  """Returns logits (M, B, L, E), choices (M, B, L, A) and valid tokens (M, B, L)."""
  rng = np.random.default_rng(seed)
  logits = rng.normal(size=(M, B, L, E))
  if case == "no token for an expert":
    logits[..., 3] -= 20
  if case == "all tokens on the same experts":
    logits[..., :A] += 20
  expert = np.argsort(-logits, axis=-1)[..., :A]
  valid = rng.random((M, B, L)) < 0.7
  valid[1, 2] &= case != "a row of padding"
  valid[2] &= case != "a microbatch of padding"
  return logits, expert, valid & (case != "all padding")


def sums_of(logits, expert, valid, score="softmax"):
  """Returns the sums of one microbatch, whole and row by row."""
  logits = logits.reshape(-1, E)
  expert = jnp.asarray(expert.reshape(-1, A), jnp.int32)
  valid = jnp.asarray(valid.reshape(-1))
  routing = Routing(
    expert_TA=expert,
    weight_TA=jnp.ones(expert.shape),
    valid_TA=jnp.broadcast_to(valid[:, None], expert.shape),
    scores_TE=SCORES[score](logits),
    log_z_T=jax.nn.logsumexp(logits, axis=-1),
    load_TE=jax.nn.softmax(2 * logits),
    sum_to_1=TopK(score=score).sum_to_1,
  )
  per_sequence = sum_rows(routing, valid, B)
  return jax.tree.map(lambda leaf: jnp.sum(leaf, axis=0), per_sequence), per_sequence


def step_loss(balance, logits, expert, valid, score="softmax"):
  """Returns the loss of a step, the sum of its microbatches' shares."""
  parts = [sums_of(logits[micro], expert[micro], valid[micro], score) for micro in range(M)]
  whole = jax.tree.map(lambda *leaves: sum(leaves), *(sums for sums, _ in parts))
  running = jax.tree.map(jnp.zeros_like, whole)
  tokens, rows = jnp.float32(valid.sum()), jnp.float32(valid.any(-1).sum())
  loss = 0.0
  for sums, per_sequence in parts:
    known = jax.lax.stop_gradient(whole) if balance.needs_step_totals else None
    totals = StepTotals(tokens, rows, M, G, known, running)
    loss += balance.share(
      sums, per_sequence if balance.needs_sequence_totals else None, totals, LAYER
    )
    running = jax.tree.map(jnp.add, running, jax.lax.stop_gradient(sums))
  return loss


def test_every_balance_loss_has_an_oracle():
  assert {cls for cls, _ in BALANCE.values()} == oracle.LOSSES.keys()


@member
@cases
def test_the_shares_of_a_step_add_up_to_the_float64_oracle(balance, case):
  logits, expert, valid = draw(case)
  run = jax.jit(lambda logits: step_loss(balance, logits, expert, valid))
  loss = run(jnp.asarray(logits, jnp.float32))
  right = oracle.step_loss(balance, LAYER, G, oracle.of_router(logits, expert, valid))
  assert loss.dtype == jnp.float32
  np.testing.assert_allclose(loss, right, rtol=1e-5, atol=1e-6)
  if case == "random":
    eager = step_loss(balance, jnp.asarray(logits, jnp.float32), expert, valid)
    np.testing.assert_allclose(eager, loss, rtol=1e-6)


@member
def test_gradients_equal_finite_differences_with_counts_held_still(balance):
  if balance.scope == "global_running" and not balance.additive:
    pytest.skip("an estimate has no function of which it would be the gradient")
  logits, expert, valid = draw("random")
  run = lambda logits: step_loss(balance, logits, expert, valid)  # noqa: E731
  grads = jax.jit(jax.grad(run))(jnp.asarray(logits, jnp.float32))
  np.testing.assert_array_equal(grads[~valid], 0)
  rng = np.random.default_rng(3)
  for _ in range(6):
    way, moved = rng.normal(size=logits.shape), []
    way /= np.linalg.norm(way)
    for step in (1e-6, -1e-6):
      seen = oracle.of_router(logits + step * way, expert, valid)
      moved.append(oracle.step_loss(balance, LAYER, G, seen))
    expected = (moved[0] - moved[1]) / 2e-6
    np.testing.assert_allclose(np.sum(way * grads), expected, rtol=1e-4, atol=1e-6)


@member
def test_counts_carry_no_gradient(balance):
  logits, expert, valid = draw("random")
  sums, per_sequence = sums_of(jnp.asarray(logits[0], jnp.float32), expert[0], valid[0])

  def loss(counts, counts_by_row):
    moved = dataclasses.replace(sums, counts_E=counts)
    rows = dataclasses.replace(per_sequence, counts_E=counts_by_row)
    zeros = jax.tree.map(jnp.zeros_like, sums)
    totals = StepTotals(sums.tokens, jnp.float32(B), 1, G, None, zeros)
    return balance.share(moved, rows, totals, LAYER)

  for grad in jax.grad(loss, argnums=(0, 1))(sums.counts_E, per_sequence.counts_E):
    np.testing.assert_array_equal(grad, 0)


@member
def test_what_padding_holds_changes_nothing(balance):
  logits, expert, valid = draw("random")
  other_logits, other_expert, _ = draw("random", seed=1)
  moved = np.where(valid[..., None], logits, 50 * other_logits)
  moved_expert = np.where(valid[..., None], expert, other_expert)
  loss = step_loss(balance, jnp.asarray(logits, jnp.float32), expert, valid)
  after = step_loss(balance, jnp.asarray(moved, jnp.float32), moved_expert, valid)
  np.testing.assert_array_equal(loss, after)


@pytest.mark.parametrize("score", ["sigmoid", "relu"])
def test_scores_that_are_no_shares_of_1_count_by_their_share_at_every_scope(score):
  members = [LoadBalance(scope=scope) for scope in SCOPES]
  logits, expert, valid = draw("a microbatch of padding")
  logits[0, 0, 0] = logits[1, 1] = -2  # with a ReLU a token and a row without a score

  def run(logits):
    losses = [step_loss(member, logits, expert, valid, score) for member in members]
    return sum(losses), losses

  narrow = jnp.asarray(logits, jnp.float32)
  (_, losses), grads = jax.jit(jax.value_and_grad(run, has_aux=True))(narrow)
  scores = routing_oracle.SCORES[score]
  seen = oracle.of_router(logits, expert, valid, scores)
  right = [oracle.step_loss(member, LAYER, G, seen) for member in members]
  np.testing.assert_allclose(losses, right, rtol=1e-5)
  assert np.isfinite(grads).all()


@pytest.mark.parametrize("term", [LoadBalance(), NullAveraged()], ids=["plain", "averaged"])
@pytest.mark.parametrize("scale", [0.3, 0.9, 1e-30, 1e30])
def test_at_exactly_even_load_scores_of_any_scale_have_the_loss_1(term, scale):
  tokens = 2 * E
  expert = jnp.arange(A * tokens).reshape(tokens, A) % E
  alike = jnp.full((tokens, E), scale)
  others = alike * jax.random.uniform(jax.random.key(0), alike.shape, minval=0.1)
  for scores in (alike, others):
    ones = jnp.ones(expert.shape)
    routing = Routing(expert, ones, ones > 0, scores, ones[:, 0], sum_to_1=False)
    sums = jax.tree.map(lambda leaf: leaf[0], sum_rows(routing, jnp.ones(tokens, bool), 1))
    np.testing.assert_allclose(term.loss(sums, LAYER), 1, rtol=1e-6)


def test_the_load_balance_loss_is_1_at_balance_and_e_over_a_at_collapse():
  zero, tokens = jnp.float32(0), jnp.float32(10)
  even, hot = jnp.full(E, 4.0), jnp.zeros(E).at[:A].set(10.0)
  for counts, scores, right in ((even, even / A, 1.0), (hot, hot / A, E / A)):
    sums = RouterSums(counts, scores, tokens, zero, zero, counts, tokens)
    np.testing.assert_allclose(LoadBalance().loss(sums, LAYER), right, rtol=1e-6)


def test_scopes_differ_where_rows_and_microbatches_differ_and_agree_on_one_row():
  logits, expert, valid = draw("random")
  by_scope = [step_loss(LoadBalance(scope=scope), logits, expert, valid) for scope in SCOPES]
  assert len({round(float(loss), 4) for loss in by_scope}) == len(SCOPES)
  sums, per_sequence = sums_of(logits[0], expert[0], valid[0])
  row = jax.tree.map(lambda leaf: leaf[:1], per_sequence)
  sums = jax.tree.map(lambda leaf: leaf[0], row)
  zeros = jax.tree.map(jnp.zeros_like, sums)
  alone = StepTotals(sums.tokens, jnp.float32(1), 1, 1, None, zeros)
  shares = [LoadBalance(scope=scope).share(sums, row, alone, LAYER) for scope in SCOPES]
  np.testing.assert_allclose(shares, shares[0], rtol=1e-6)


@pytest.mark.parametrize("cls", [cls for cls, _ in BALANCE.values()])
def test_a_negative_weight_is_refused(cls):
  with pytest.raises(InputError, match="must not be negative"):
    cls(weight=-0.1)


def test_two_losses_of_one_name_are_refused():
  with pytest.raises(InputError, match="two losses called load_balance_micro"):
    MoEConfig(balance=(LoadBalance(0.1, "micro"), RouterZ(), LoadBalance(0.2, "micro")))


REFUSED = {
  "has none": (NullAveraged(), {}),
  "compute nothing": (Heterogeneous(), {}),
  "one number an expert": (LatencyAware(latency=(1.0, 2.0)), {}),
  "defined on a softmax": (MutualInformation(), {"router": TopK(score="sigmoid")}),
  "use the router relu or adaptive": (Sparsity(), {}),
  "load_concentration is defined": (LoadConcentration(), {"router": TopK(score="sigmoid")}),
}


@pytest.mark.parametrize("why", REFUSED)
def test_a_loss_that_makes_no_sense_for_a_layer_is_refused(why):
  term, options = REFUSED[why]
  with pytest.raises(InputError, match=why):
    MoEConfig(num_experts=E, balance=(term,), **options)


def descend(balance, layer, num_choices, rate=0.5, steps=400):
  """Moves the gate of a noisy top-1 router over fixed tokens, by the loss alone.

  Returns the share of hard choices by expert, and the last scores of all tokens.
  """
  rng = np.random.default_rng(0)
  tokens, num_experts = 256, layer.num_experts
  # Without a direction that all tokens share no linear gate could prefer an expert.
  x = jnp.asarray(np.hstack([np.ones((tokens, 1)), rng.normal(size=(tokens, 7))]), jnp.float32)
  noise = jnp.asarray(rng.normal(size=(steps, tokens, num_experts)), jnp.float32)

  def sums(w, noise):
    logits = x @ w
    seen = logits + noise
    expert = jax.lax.top_k(seen, num_choices)[1]
    # P(chosen) for one choice of noisy top-1, by the largest of the others' noisy logits.
    top = jax.lax.top_k(seen, 2)[0]
    others = jnp.where(seen == top[:, :1], top[:, 1:], top[:, :1])
    load = jax.scipy.stats.norm.cdf(logits - others)
    valid = jnp.ones(tokens, bool)
    routing = Routing(
      expert,
      jnp.ones(expert.shape),
      jnp.ones(expert.shape, bool),
      jax.nn.softmax(logits),
      jax.nn.logsumexp(logits, axis=-1),
      load_TE=load,
    )
    return jax.tree.map(lambda leaf: leaf[0], sum_rows(routing, valid, 1))

  def step(w, noise):
    grad = jax.grad(lambda w: balance.loss(sums(w, noise), layer))(w)
    return w - rate * grad, sums(w, noise).counts_E

  w = jnp.asarray(rng.normal(size=(8, num_experts)), jnp.float32)
  w, counts = jax.jit(lambda w: jax.lax.scan(step, w, noise))(w)
  late = np.asarray(counts[-100:]).sum(0)
  return late / late.sum(), np.asarray(jax.nn.softmax(x @ w), np.float64)


def test_latency_aware_balance_brings_hard_choices_into_inverse_proportion_to_latency():
  layer = MoEConfig(num_experts=2, num_active=1)
  share, _ = descend(LatencyAware(latency=(3.0, 1.0)), layer, 1)
  np.testing.assert_allclose(share, [0.25, 0.75], atol=0.05)


def test_mutual_information_alone_spreads_tokens_and_makes_each_sure():
  layer = MoEConfig(num_experts=4, num_active=1)
  _, scores = descend(MutualInformation(), layer, 1, rate=2.0)
  assert oracle.entropy(scores.mean(0)) > np.log(4) - 0.02
  assert np.mean([oracle.entropy(token) for token in scores]) < 0.3
