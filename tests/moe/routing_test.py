import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from jaxmoe.moe.routing import Routing, shares_of, sum_routing

T, E, A = 13, 5, 2


def draw(seed=0):
  rng = np.random.default_rng(seed)
  expert = np.stack([rng.permutation(E)[:A] for _ in range(T)])
  valid = rng.random(T) < 0.6
  # A router may also leave out single choices of a valid token.
  valid_TA = valid[:, None] & (rng.random((T, A)) < 0.8)
  scores, log_z = rng.random((T, E)), rng.normal(size=T)
  fields = (expert.astype(np.int32), rng.random((T, A)), valid_TA, scores, log_z)
  arrays = (jnp.asarray(field) for field in fields)
  return Routing(*arrays), valid


def test_sums_equal_a_loop_over_valid_tokens():
  routing, valid = draw()
  counts, scores, squares = np.zeros(E), np.zeros(E), 0.0
  for token in range(T):
    for choice in range(A):
      counts[routing.expert_TA[token, choice]] += bool(routing.valid_TA[token, choice])
    if valid[token]:
      scores += np.asarray(routing.scores_TE[token], np.float64)
      squares += float(routing.log_z_T[token]) ** 2
  sums = sum_routing(routing, jnp.asarray(valid))
  np.testing.assert_array_equal(sums.counts_E, counts)
  np.testing.assert_allclose(sums.scores_E, scores, rtol=1e-6)
  np.testing.assert_allclose(sums.log_z_squared, squares, rtol=1e-6)
  assert sums.tokens == valid.sum()
  assert {leaf.dtype for leaf in jax.tree.leaves(sums)} == {jnp.dtype(jnp.float32)}


def test_sums_of_parts_add_up_to_the_sums_of_the_whole():
  routing, valid = draw()
  whole = sum_routing(routing, jnp.asarray(valid))
  parts = [
    sum_routing(jax.tree.map(lambda leaf, at=at: leaf[at], routing), jnp.asarray(valid[at]))
    for at in (slice(0, 4), slice(4, T))
  ]
  added = jax.tree.map(lambda one, other: one + other, *parts)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), added, whole)


def test_the_invalid_may_hold_anything():
  routing, valid = draw()
  odd = Routing(
    expert_TA=jnp.where(routing.valid_TA, routing.expert_TA, 10**6),
    weight_TA=routing.weight_TA,
    valid_TA=routing.valid_TA,
    scores_TE=jnp.where(valid[:, None], routing.scores_TE, jnp.nan),
    log_z_T=jnp.where(valid, routing.log_z_T, jnp.inf),
  )
  sums = (sum_routing(each, jnp.asarray(valid)) for each in (routing, odd))
  jax.tree.map(np.testing.assert_array_equal, *sums)


def test_shares_of_scores_and_their_gradient_do_not_depend_on_how_large_scores_are():
  """Of scores that are exponentials of logits shares are the softmax, and so is the gradient."""
  rng = np.random.default_rng(0)
  logits_TE, way_TE = rng.normal(size=(2, T, E)).astype(np.float32)
  shift_T1 = np.linspace(-75, 80, T, dtype=np.float32)[:, None]
  shares = lambda z: shares_of(jnp.exp(z + shift_T1))  # noqa: E731
  expected, back = jax.vjp(jax.nn.softmax, logits_TE)
  got, got_back = jax.vjp(shares, logits_TE)
  # exp() of a sum near 80 is off by 80 times the rounding of the sum.
  np.testing.assert_allclose(got, expected, rtol=2e-5)
  np.testing.assert_allclose(got_back(way_TE)[0], back(way_TE)[0], rtol=1e-4, atol=2e-5)


def test_a_token_without_any_score_has_shares_of_0_and_no_gradient():
  scores_TE = jnp.zeros((2, E)).at[1, 3].set(0.5)
  shares, back = jax.vjp(shares_of, scores_TE)
  np.testing.assert_array_equal(shares, scores_TE * 2)
  np.testing.assert_array_equal(back(jnp.ones((2, E)))[0][0], 0)


def test_only_scores_that_are_no_shares_have_a_sum_of_shares():
  routing, valid = draw()
  sums = sum_routing(routing, jnp.asarray(valid))
  assert sums.shares_E is None
  assert sums.summed_shares_E is sums.scores_E
  other = sum_routing(dataclasses.replace(routing, sum_to_1=False), jnp.asarray(valid))
  scores = np.asarray(routing.scores_TE, np.float64)[valid]
  right = (scores / scores.sum(1, keepdims=True)).sum(0)
  np.testing.assert_allclose(other.summed_shares_E, right, rtol=1e-6)
  np.testing.assert_array_equal(other.scores_E, sums.scores_E)
