import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmoe.core.errors import InputError
from jaxmoe.core.tokens import Tokens
from jaxmoe.moe.layer import MoEConfig
from jaxmoe.moe.routers import RouterInputs
from jaxmoe.moe.routers.forced import Balanced, Listed, Skewed
from tests.contracts.oracles.batch_routing import inclusion


def choose(router, shape=(3, 7), num_experts=5, num_active=2, scores=None):
  """Returns the choices of all tokens of a full batch."""
  tokens = Tokens.of_ids(jnp.zeros(shape, jnp.int32))
  scores = jnp.full((tokens.id.size, num_experts), 0.1) if scores is None else scores
  return router.select(RouterInputs(scores, scores, tokens, num_active, {}, None, None, {}))


def loads(chosen, num_experts=5):
  return np.bincount(np.ravel(chosen.expert_TA), minlength=num_experts)


@pytest.mark.parametrize("num_active", [1, 2, 4])
@pytest.mark.parametrize("shape", [(3, 7), (1, 1), (4, 10), (10, 1)])
def test_balanced_loads_differ_by_at_most_one(shape, num_active):
  of_expert = loads(choose(Balanced(), shape, num_active=num_active))
  assert of_expert.sum() == np.prod(shape) * num_active
  assert of_expert.max() - of_expert.min() <= 1


@pytest.mark.parametrize("num_active", [1, 2, 4])
@pytest.mark.parametrize("exponent", [0.0, 0.5, 1.0, 2.0, 50.0])
def test_skewed_loads_are_those_of_the_law_and_no_token_has_an_expert_twice(exponent, num_active):
  router = Skewed(exponent=exponent)
  chosen = choose(router, (4, 500), 16, num_active)
  right = inclusion(exponent, 16, num_active)
  np.testing.assert_allclose(router.loads(16, num_active), right, atol=1e-9)
  # A golden-ratio sequence strays by less than log2(T) choices from each end of an interval.
  assert np.abs(loads(chosen, 16) - 2000 * right).max() < 2 * np.log2(2000)
  ranked = np.sort(chosen.expert_TA, axis=1)
  assert (np.diff(ranked, axis=1) > 0).all()


def test_a_given_list_is_read_over_and_over_in_order_of_places():
  chosen = choose(Listed(experts=(4, 0, 2)), (2, 3))
  np.testing.assert_array_equal(
    chosen.expert_TA, [[4, 0], [2, 4], [0, 2], [4, 0], [2, 4], [0, 2]]
  )


@pytest.mark.parametrize("router", [Balanced(), Skewed(), Listed()])
def test_weights_are_alike_to_the_bit_and_have_the_gradient_of_the_scores(router):
  scores = jax.random.uniform(jax.random.key(0), (21, 5), minval=0.1)
  chosen = choose(router, scores=scores)
  np.testing.assert_array_equal(chosen.weight_TA, 0.5)
  way = jax.random.normal(jax.random.key(1), (21, 2))

  def by_score(scores):
    score_TA = jnp.take_along_axis(scores, chosen.expert_TA, axis=1)
    return jnp.sum(way * score_TA / jnp.sum(score_TA, axis=1, keepdims=True))

  grad = jax.grad(lambda scores: jnp.sum(way * choose(router, scores=scores).weight_TA))(scores)
  np.testing.assert_allclose(grad, jax.grad(by_score)(scores), rtol=1e-5, atol=1e-6)
  assert np.abs(grad).max() > 0.1


@pytest.mark.parametrize(
  "experts, words",
  [((), "at least one"), ((0, 5), "from 0 to 4"), ((-1, 2), "from 0 to 4"), ((1,), "distinct"),
   ((0, 1, 1, 2, 3), "distinct"), ((0, 1, 0), "distinct")],
)  # fmt: skip
def test_a_list_that_no_layer_could_follow_is_refused(experts, words):
  with pytest.raises(InputError, match=words):
    MoEConfig(num_experts=5, num_active=2, router=Listed(experts=experts))


def test_a_list_may_repeat_an_expert_where_no_token_has_it_twice():
  MoEConfig(num_experts=5, num_active=2, router=Listed(experts=(0, 1, 0, 2)))


@pytest.mark.parametrize("exponent", [-1.0, 101.0])
def test_an_exponent_out_of_bounds_is_refused(exponent):
  with pytest.raises(InputError, match="exponent must lie"):
    Skewed(exponent=exponent)


@pytest.mark.parametrize("router", [Balanced(), Skewed(), Listed()])
def test_gradients_are_finite_where_the_forced_experts_have_no_score(router):
  scores = jnp.full((21, 5), 1e-25)
  grad = jax.grad(lambda scores: jnp.sum(choose(router, scores=scores).weight_TA))(scores)
  assert np.isfinite(grad).all()
