import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmoe.core.errors import InputError
from jaxmoe.moe.balance import BALANCE, LoadBalance, Reference, RouterZ
from jaxmoe.moe.routing import RouterSums

E, A, M, T = 5, 2, 3, 11
SCOPES = ("micro", "global", "global_running")
MEMBERS = {
  **{name: instance for name, (_, instance) in BALANCE.items()},
  **{scope: LoadBalance(scope=scope) for scope in SCOPES},
}
member = pytest.mark.parametrize("balance", MEMBERS.values(), ids=MEMBERS.keys())


def draw(case, seed=0):
  """Returns logits (M, T, E), choices (M, T, A) and valid tokens (M, T) of M microbatches."""
  rng = np.random.default_rng(seed)
  logits = rng.normal(size=(M, T, E))
  if case == "no token for an expert":
    logits[..., 3] -= 20
  if case == "all tokens on the same experts":
    logits[..., :A] += 20
  expert = np.argsort(-logits, axis=-1)[..., :A]
  valid = rng.random((M, T)) < 0.7
  valid[2] = valid[2] & (case != "a microbatch of padding")
  return logits, expert, valid & (case != "all padding")


CASES = (
  "random",
  "no token for an expert",
  "all tokens on the same experts",
  "a microbatch of padding",
  "all padding",
)
cases = pytest.mark.parametrize("case", CASES)


def softmax(logits):
  raised = np.exp(logits - logits.max(-1, keepdims=True))
  return raised / raised.sum(-1, keepdims=True)


def load_balance_oracle(config, logits, expert, valid):
  """E sum_i f_i p_i, token by token, with f over the tokens that the scope names."""
  scores, counts = softmax(logits), np.zeros((M, E))
  for micro, token in np.argwhere(valid):
    for choice in expert[micro, token]:
      counts[micro, choice] += 1
  mean = [scores[micro][valid[micro]].sum(0) for micro in range(M)]
  tokens, total = max(valid.sum(), 1), 0.0
  for micro in range(M):
    seen = {
      "micro": counts[micro], "global": counts.sum(0), "global_running": counts[: micro + 1].sum(0)
    }[config.scope]  # fmt: skip
    over = M * max(valid[micro].sum(), 1) if config.scope == "micro" else tokens
    total += E * np.sum(seen / max(seen.sum(), 1) * mean[micro]) / over
  return total


def router_z_oracle(config, logits, expert, valid):
  """The mean over tokens of logsumexp squared."""
  total = sum(np.log(np.exp(logits[at]).sum()) ** 2 for at in map(tuple, np.argwhere(valid)))
  return total / max(valid.sum(), 1)


ORACLES = {LoadBalance: load_balance_oracle, RouterZ: router_z_oracle}


def sums_of(logits, expert, valid):
  """Returns the sums of one microbatch, as a router's scores give them."""
  counts = np.zeros(E, np.float32)
  np.add.at(counts, expert[valid], 1)
  log_z = jax.nn.logsumexp(logits, axis=-1)
  used = jnp.asarray(valid)
  return RouterSums(
    counts_E=jnp.asarray(counts),
    scores_E=jnp.sum(jnp.where(used[:, None], jax.nn.softmax(logits), 0), axis=0),
    tokens=jnp.float32(valid.sum()),
    log_z_squared=jnp.sum(jnp.where(used, log_z**2, 0)),
  )


def step_loss(balance, logits, expert, valid):
  """Returns the loss of a step, the sum of its microbatches' shares."""
  sums = [sums_of(logits[micro], expert[micro], valid[micro]) for micro in range(M)]
  total, running = sum(part.counts_E for part in sums), jnp.zeros(E)
  loss = 0.0
  for part in sums:
    counts = total if balance.needs_counts else None
    loss += balance.loss(part, Reference(jnp.float32(valid.sum()), M, counts, running))
    running = running + part.counts_E
  return loss


def test_every_balance_loss_has_an_oracle():
  assert {cls for cls, _ in BALANCE.values()} == ORACLES.keys()


@member
@cases
@pytest.mark.parametrize("jit", [False, True], ids=["eager", "jit"])
def test_the_shares_of_a_step_add_up_to_the_float64_oracle(balance, case, jit):
  logits, expert, valid = draw(case)
  run = lambda logits: step_loss(balance, logits, expert, valid)  # noqa: E731
  loss = (jax.jit(run) if jit else run)(jnp.asarray(logits, jnp.float32))
  right = ORACLES[type(balance)](balance, logits, expert, valid)
  assert loss.dtype == jnp.float32
  np.testing.assert_allclose(loss, right, rtol=1e-5, atol=1e-6)


@member
def test_gradients_equal_finite_differences_with_counts_held_still(balance):
  logits, expert, valid = draw("random")
  run = lambda logits: step_loss(balance, logits, expert, valid)  # noqa: E731
  grads = jax.jit(jax.grad(run))(jnp.asarray(logits, jnp.float32))
  np.testing.assert_array_equal(grads[~valid], 0)
  for index in list(np.ndindex(logits.shape))[::3]:
    moved = []
    for step in (1e-6, -1e-6):
      there = logits.copy()
      there[index] += step
      moved.append(ORACLES[type(balance)](balance, there, expert, valid))
    expected = (moved[0] - moved[1]) / 2e-6
    np.testing.assert_allclose(grads[index], expected, rtol=1e-4, atol=1e-6)


@member
def test_counts_carry_no_gradient(balance):
  logits, expert, valid = draw("random")
  part = sums_of(jnp.asarray(logits[0], jnp.float32), expert[0], valid[0])

  def loss(counts):
    moved = RouterSums(counts, part.scores_E, part.tokens, part.log_z_squared)
    known = counts if balance.needs_counts else None
    return balance.loss(moved, Reference(part.tokens, 1, known, jnp.zeros(E)))

  np.testing.assert_array_equal(jax.grad(loss)(part.counts_E), 0)


@member
def test_what_padding_holds_changes_nothing(balance):
  logits, expert, valid = draw("random")
  other_logits, other_expert, _ = draw("random", seed=1)
  moved = np.where(valid[..., None], logits, 50 * other_logits)
  moved_expert = np.where(valid[..., None], expert, other_expert)
  loss = step_loss(balance, jnp.asarray(logits, jnp.float32), expert, valid)
  after = step_loss(balance, jnp.asarray(moved, jnp.float32), moved_expert, valid)
  np.testing.assert_array_equal(loss, after)


def test_the_load_balance_loss_is_1_at_balance_and_e_over_a_at_collapse():
  even = RouterSums(jnp.full(E, 4.0), jnp.full(E, 2.0), jnp.float32(10), jnp.float32(0))
  hot = jnp.zeros(E).at[:A].set(10.0)
  collapsed = RouterSums(hot, hot / A, jnp.float32(10), jnp.float32(0))
  for scope in SCOPES:
    balance = LoadBalance(scope=scope)
    for sums, right in ((even, 1.0), (collapsed, E / A)):
      counts = sums.counts_E if balance.needs_counts else None
      loss = balance.loss(sums, Reference(sums.tokens, 1, counts, jnp.zeros(E)))
      np.testing.assert_allclose(loss, right, rtol=1e-6)


def test_scopes_differ_where_microbatches_differ_and_agree_on_one():
  logits, expert, valid = draw("random")
  by_scope = [step_loss(LoadBalance(scope=scope), logits, expert, valid) for scope in SCOPES]
  assert len({round(float(loss), 4) for loss in by_scope}) == 3
  part = sums_of(logits[0], expert[0], valid[0])
  alone = Reference(part.tokens, 1, None, jnp.zeros(E))
  assert len({float(LoadBalance(scope=scope).loss(part, alone)) for scope in SCOPES}) == 1


@pytest.mark.parametrize("cls", [LoadBalance, RouterZ])
def test_a_negative_weight_is_refused(cls):
  with pytest.raises(InputError, match="must not be negative"):
    cls(weight=-0.1)
