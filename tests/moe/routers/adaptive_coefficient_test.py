import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmoe.core.errors import InputError
from jaxmoe.moe.balance import LoadBalance, Sparsity
from jaxmoe.moe.layer import MoEConfig
from jaxmoe.moe.routers.adaptive_coefficient import AdaptiveTopK, ReLU
from jaxmoe.moe.routing import Routing, sum_routing

E = 8


def sums_of(counts, tokens):
  return types.SimpleNamespace(counts_E=jnp.float32(counts), tokens=jnp.float32(tokens))


@pytest.mark.parametrize(
  "router, counts, factor",
  [
    (ReLU(target=1.5), [10, 6, 0, 0], 1.2),
    (ReLU(target=1.5), [4, 4, 4, 3], 1.0),
    (ReLU(target=1.5), [8, 6, 0, 0], 1 / 1.2),
    (AdaptiveTopK(target=1.5, rate=2.0), [9, 4, 4, 3], 2.0),
    (AdaptiveTopK(target=1.5, rate=2.0), [9, 5, 5, 5], 1.0),
    (AdaptiveTopK(target=1.5, rate=2.0), [5, 5, 5, 5], 0.5),
  ],
)
def test_the_factor_grows_by_its_rate_above_the_target_and_shrinks_below(router, counts, factor):
  after = router.update({"pressure": jnp.full(1, 0.5)}, sums_of(counts, 10), None)["pressure"]
  np.testing.assert_allclose(after, [0.5 * factor], rtol=1e-6)
  idle = router.update({"pressure": jnp.full(1, 0.5)}, sums_of([0, 0, 0, 0], 0), None)["pressure"]
  np.testing.assert_array_equal(idle, [0.5])


def test_relu_chooses_what_is_above_zero_and_may_choose_nothing(seen_of):
  logits = np.array([[0.5, -1.0, 2.0, 0.25], [-1.0, -2.0, -0.1, 0.0], [0.1, 0.2, -0.3, -0.4]])
  chosen = ReLU().select(seen_of(ReLU(), logits, num_active=2))
  np.testing.assert_array_equal(chosen.valid_TA, [[True, True], [False, False], [True, True]])
  np.testing.assert_array_equal(np.asarray(chosen.expert_TA)[[0, 2]], [[2, 0], [1, 0]])
  np.testing.assert_allclose(chosen.weight_TA, [[2, 0.5], [0, 0], [0.2, 0.1]], rtol=1e-6)


@pytest.mark.parametrize("target", [1.0, 2.5])
def test_relu_under_the_sparsity_loss_comes_to_its_target_while_it_learns_a_task(seen_of, target):
  rng = np.random.default_rng(0)
  x, outputs = (jnp.asarray(rng.normal(size=size), jnp.float32) for size in ((128, 8), (E, 8)))
  x = x.at[:, 0].set(1.0)  # Without a direction that all tokens share no expert can be rare.
  w = jnp.asarray(rng.normal(size=(8, E)), jnp.float32)
  y = jax.nn.relu(x @ w) @ outputs  # Without the loss about half of the experts would be right.
  router, term = ReLU(target=target, rate=1.02, first=1e-2), Sparsity()
  layer = MoEConfig(E, E, balance=())

  def value(w, pressure):
    seen = seen_of(router, x @ w, num_active=E, buffers={"pressure": pressure})
    chosen = router.select(seen)
    routing = Routing(
      chosen.expert_TA,
      chosen.weight_TA,
      chosen.valid_TA,
      seen.scores_TE,
      jnp.zeros(128),
      adaptive_coefficient_T=jnp.broadcast_to(pressure, 128),
    )
    sums = sum_routing(routing, jnp.ones(128, bool))
    error = jnp.mean(jnp.square(seen.scores_TE @ outputs - y))
    return error + term.weight_of(sums) * term.loss(sums, layer), sums

  def step(state, _):
    w, buffers = state
    grads, sums = jax.grad(value, has_aux=True)(w, buffers["pressure"])
    return (w - 0.05 * grads, router.update(buffers, sums, None)), jnp.sum(sums.counts_E) / 128

  run = lambda w: jax.lax.scan(step, (w, router.buffers(E)), None, length=1000)[1]  # noqa: E731
  active = np.asarray(jax.jit(run)(w))
  assert active[0] > 5
  assert abs(active[-200:].mean() - target) < 0.1 * target


def test_a_weight_follows_the_router_only_if_asked_and_padding_does_not_dilute_it():
  ones = jnp.ones((4, 2))
  routing = Routing(
    jnp.zeros((4, 2), jnp.int32),
    ones,
    ones > 0,
    ones,
    ones[:, 0],
    adaptive_coefficient_T=jnp.full(4, 0.25),
  )
  sums = sum_routing(routing, jnp.array([True, True, False, False]))
  np.testing.assert_allclose(LoadBalance(weight=2.0, adaptive=True).weight_of(sums), 0.5)
  assert LoadBalance(weight=2.0).weight_of(sums) == 2.0


def test_a_target_that_the_most_experts_cannot_exceed_is_refused():
  with pytest.raises(InputError, match="must lie below num_active, the most: target=2"):
    MoEConfig(num_experts=E, num_active=2, router=ReLU(target=2.0))


@pytest.mark.parametrize("fields", [{"rate": 0.9}, {"first": 0.0}, {"target": 0.0}])
def test_a_factor_that_cannot_be_steered_is_refused(fields):
  with pytest.raises(InputError, match="rate must be at least 1, first and target above 0"):
    ReLU(**fields)
