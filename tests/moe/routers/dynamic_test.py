import jax.numpy as jnp
import numpy as np
import pytest

from jaxmoe.core.errors import InputError
from jaxmoe.moe.routers.dynamic import Threshold, TopP

SHARES = np.array([[0.5, 0.25, 0.125, 0.0625, 0.0625], [0.96, 0.01, 0.01, 0.01, 0.01]])


@pytest.mark.parametrize(
  "p, numbers",
  [(0.4, [1, 1]), (0.499, [1, 1]), (0.501, [2, 1]), (0.8, [3, 1]), (0.97, [4, 2]), (1.0, [4, 4])],
)
def test_top_p_takes_the_fewest_best_experts_that_hold_p_and_no_more_than_the_most(
  seen_of, p, numbers
):
  chosen = TopP(p=p).select(seen_of(TopP(), np.log(SHARES), num_active=4))
  kept = np.arange(4) < np.array(numbers)[:, None]
  np.testing.assert_array_equal(chosen.valid_TA, kept)
  np.testing.assert_array_equal(chosen.expert_TA, [[0, 1, 2, 3]] * 2)
  np.testing.assert_allclose(chosen.weight_TA, kept * SHARES[:, :4], rtol=1e-5)


def test_top_p_counts_shares_of_scores_that_are_no_shares_by_themselves(seen_of):
  logits = np.log(np.array([[3.0, 2.0, 1.0]]))
  router = TopP(p=0.7, score="relu", normalize=True)
  seen = seen_of(router, np.exp(logits), num_active=3)
  chosen = router.select(seen)
  np.testing.assert_array_equal(chosen.valid_TA, [[True, True, False]])
  np.testing.assert_allclose(chosen.weight_TA, [[0.6, 0.4, 0.0]], rtol=1e-6)


def test_a_token_that_the_router_is_less_sure_of_goes_to_more_experts(seen_of, skewed):
  means = []
  for sharpness in (4.0, 1.0, 0.25):
    chosen = TopP(p=0.6).select(seen_of(TopP(), sharpness * skewed, num_active=8))
    means.append(float(jnp.sum(chosen.valid_TA) / len(skewed)))
  assert 1 < means[0] < means[1] - 0.5 < means[2] - 1


def test_a_threshold_takes_what_reaches_it_and_the_best_even_where_nothing_does(seen_of):
  logits = np.array([[0.0, 2.0, -1.0], [-3.0, -1.0, -2.0], [1.0, 2.0, 3.0]])
  chosen = Threshold(threshold=0.5).select(seen_of(Threshold(), logits, num_active=2))
  np.testing.assert_array_equal(chosen.expert_TA, [[1, 0], [1, 2], [2, 1]])
  np.testing.assert_array_equal(chosen.valid_TA, [[True, True], [True, False], [True, True]])
  np.testing.assert_allclose(jnp.sum(chosen.weight_TA, axis=1), 1, rtol=1e-6)


@pytest.mark.parametrize("p", [0.0, 1.1])
def test_a_sum_of_shares_that_no_set_or_every_set_has_is_refused(p):
  with pytest.raises(InputError, match=r"p must lie in \(0, 1\]"):
    TopP(p=p)


def test_a_threshold_that_everything_passes_is_refused():
  with pytest.raises(InputError, match="threshold must be above 0"):
    Threshold(threshold=0.0)
