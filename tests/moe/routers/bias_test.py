import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmoe.core.errors import InputError
from jaxmoe.moe.layer import MoEConfig
from jaxmoe.moe.routers.bias import AuxFree, Quantile
from jaxmoe.moe.routers.router import RouterStatistics

E, A = 8, 2


def sums_of(expert, valid=None):
  """Returns what `update` reads of the sums of these choices."""
  valid = np.ones(len(expert), bool) if valid is None else valid
  counts = np.bincount(np.asarray(expert)[valid].reshape(-1), minlength=E)
  return types.SimpleNamespace(counts_E=jnp.float32(counts), tokens=jnp.float32(valid.sum()))


def violation(chosen):
  """Returns how far the fullest expert lies above the mean load, as a share of it."""
  counts = sums_of(chosen.expert_TA).counts_E
  return float(counts.max() / counts.mean() - 1)


# ---- DeepSeek-V3's bias ----


def test_the_bias_moves_by_the_rate_against_the_load_and_not_at_all_at_the_mean():
  router = AuxFree(bias_rate=0.25)
  counts = jnp.float32([9, 3, 4, 4, 0, 4, 4, 4])
  sums = types.SimpleNamespace(counts_E=counts)
  bias = router.update({"bias": jnp.full(E, 0.5)}, sums, None)["bias"]
  assert bias.dtype == jnp.float32
  np.testing.assert_array_equal(bias, 0.5 + 0.25 * np.float32([-1, 1, 0, 0, 1, 0, 0, 0]))


def test_the_bias_decides_who_is_chosen_and_never_what_they_weigh(seen_of, skewed):
  router = AuxFree()
  plain = router.select(seen_of(router, skewed))
  level = router.select(seen_of(router, skewed, buffers={"bias": jnp.full(E, 0.5)}))
  jax.tree.map(np.testing.assert_array_equal, vars(plain), vars(level))
  lifted = {"bias": jnp.zeros(E).at[7].set(10.0)}
  seen = seen_of(router, skewed, buffers=lifted)
  chosen = router.select(seen)
  assert (chosen.expert_TA[:, 0] == 7).all() and not (plain.expert_TA == 7).all(1).any()
  score = np.take_along_axis(np.asarray(seen.scores_TE), np.asarray(chosen.expert_TA), 1)
  np.testing.assert_allclose(chosen.weight_TA, score / score.sum(1, keepdims=True), rtol=1e-6)


def test_steps_on_a_skewed_batch_even_out_its_load(seen_of, skewed):
  router, before = AuxFree(bias_rate=0.01), None
  buffers = router.buffers(E)
  for _ in range(300):
    chosen = router.select(seen_of(router, skewed, buffers=buffers))
    before = before or violation(chosen)
    buffers = router.update(buffers, sums_of(chosen.expert_TA), None)
  assert before > 1.5 and violation(chosen) < 0.15


# ---- its node limit ----


def test_experts_lie_in_no_more_groups_than_are_active(seen_of, skewed):
  router = AuxFree(num_groups=4, groups_active=2)
  chosen = router.select(seen_of(router, skewed, num_active=4))
  groups = [len(set(row // 2)) for row in np.asarray(chosen.expert_TA)]
  assert set(groups) == {2}
  free = AuxFree().select(seen_of(router, skewed, num_active=4))
  assert max(len(set(row // 2)) for row in np.asarray(free.expert_TA)) > 2


def test_groups_are_ranked_by_the_sum_of_their_two_best_or_as_in_v2_by_the_best(seen_of):
  logits = np.array([[4.0, -4.0, 1.5, 1.0]])  # sigmoids: 0.98, 0.02 and 0.82, 0.73
  for group_best, group in ((2, [2, 3]), (1, [0, 1])):
    router = AuxFree(num_groups=2, group_best=group_best)
    np.testing.assert_array_equal(router.select(seen_of(router, logits)).expert_TA, [group])


def test_an_expert_outside_of_the_groups_is_not_chosen_where_those_inside_rank_below_zero(seen_of):
  """DeepSeek's first code gave experts outside a rank of 0."""
  router, bias = AuxFree(num_groups=2), jnp.float32([-3, -4, -9, -9])
  chosen = router.select(seen_of(router, np.zeros((1, 4)), buffers={"bias": bias}))
  np.testing.assert_array_equal(chosen.expert_TA, [[0, 1]])


@pytest.mark.parametrize(
  "fields, message",
  [
    ({"num_groups": 3}, "num_groups must divide num_experts into groups of 2 or more"),
    ({"num_groups": 8}, "num_groups must divide num_experts into groups of 2 or more"),
    ({"num_groups": 4, "group_best": 3}, "groups of 3 or more"),
    ({"num_groups": 4, "groups_active": 5}, "groups_active must lie between 1 and num_groups"),
    ({"groups_active": 0}, "groups_active must lie between 1 and num_groups"),
    ({"group_best": 0}, "group_best be at least 1"),
    ({"bias_rate": -1.0}, "bias_rate must not be negative"),
  ],
)
def test_groups_that_cannot_serve_are_refused(fields, message):
  with pytest.raises(InputError, match=message):
    MoEConfig(num_experts=E, num_active=A, router=AuxFree(**fields))


def test_more_active_experts_than_the_active_groups_have_are_refused():
  MoEConfig(num_experts=E, num_active=4, router=AuxFree(num_groups=4, groups_active=2))
  with pytest.raises(InputError, match="groups of 3 or more"):
    MoEConfig(num_experts=E, num_active=5, router=AuxFree(num_groups=4, groups_active=2))


# ---- quantile balancing ----


def quantile_oracle(margins, active):
  """Returns the n-th largest margin of each expert, n = T A // E, less their mean (float64)."""
  nth = max(1, len(margins) * active // E)
  beta = np.array([sorted(column, reverse=True)[nth - 1] for column in margins.T.astype(float)])
  return beta - beta.mean()


def step(router, seen, chosen, valid=None):
  valid = np.ones(len(chosen.expert_TA), bool) if valid is None else valid
  statistics = RouterStatistics(chosen.margins_TE, jnp.asarray(valid), seen.num_active)
  return router.update(seen.buffers, sums_of(chosen.expert_TA, valid), statistics)["beta"]


@pytest.mark.parametrize("num_tokens, active", [(400, 2), (399, 3), (7, 1), (3, 2), (1, 1)])
def test_beta_is_the_exact_quantile_of_the_margins_of_valid_tokens(
  seen_of, skewed, num_tokens, active
):
  router, rng = Quantile(), np.random.default_rng(1)
  seen = seen_of(router, skewed[:num_tokens], active, buffers={"beta": jnp.linspace(-1, 1, E)})
  chosen = router.select(seen)
  right = quantile_oracle(np.asarray(chosen.margins_TE), active)
  np.testing.assert_allclose(step(router, seen, chosen), right, rtol=1e-5, atol=1e-6)
  valid = rng.random(num_tokens) < 0.7
  valid[0] = True
  right = quantile_oracle(np.asarray(chosen.margins_TE)[valid], active)
  np.testing.assert_allclose(step(router, seen, chosen, valid), right, rtol=1e-5, atol=1e-6)


def test_beta_depends_on_neither_the_order_nor_the_split_of_tokens(seen_of, skewed):
  router = Quantile()
  whole = seen_of(router, skewed)
  beta = step(router, whole, router.select(whole))
  order = np.random.default_rng(2).permutation(len(skewed))
  for parts in (1, 2, 5, 400):
    split = [router.select(seen_of(router, part)) for part in np.split(skewed[order], parts)][::-1]
    joined = jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *map(vars, split))
    joined = types.SimpleNamespace(**joined)
    np.testing.assert_array_equal(step(router, whole, joined), beta)
  # Sorted by how much they like expert 0, two halves have other quantiles, and another mean.
  halves = [seen_of(router, half) for half in np.split(skewed[np.argsort(skewed[:, 0])], 2)]
  of_halves = [step(router, half, router.select(half)) for half in halves]
  assert np.abs(np.mean(of_halves, axis=0) - beta).max() > 0.05


def test_a_few_steps_on_a_skewed_batch_even_out_its_load(seen_of, skewed):
  router, violations = Quantile(), []
  buffers = router.buffers(E)
  for _ in range(30):
    seen = seen_of(router, skewed, buffers=buffers)
    chosen = router.select(seen)
    violations.append(violation(chosen))
    buffers = {"beta": step(router, seen, chosen)}
    assert abs(float(buffers["beta"].mean())) < 1e-6
  assert violations[0] > 1.5 and violations[-1] < 0.05


def test_beta_stays_where_a_step_has_no_token_or_its_choices_were_given(seen_of, skewed):
  router, beta = Quantile(), jnp.linspace(-1, 1, E)
  seen = seen_of(router, skewed, buffers={"beta": beta})
  chosen = router.select(seen)
  np.testing.assert_array_equal(step(router, seen, chosen, np.zeros(len(skewed), bool)), beta)
  kept = router.update(seen.buffers, sums_of(chosen.expert_TA), None)
  np.testing.assert_array_equal(kept["beta"], beta)
