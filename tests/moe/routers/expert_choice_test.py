import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmoe.core.config_io import from_plain
from jaxmoe.core.errors import InputError
from jaxmoe.moe.dispatch import Capacity, Dropless, Einsum
from jaxmoe.moe.layer import MoEConfig
from jaxmoe.moe.routers.expert_choice import CausalExpertChoice, ExpertChoice
from jaxmoe.moe.routers.router import RouterStatistics
from jaxmoe.moe.routing import Routing

E, A = 8, 2


def loads(chosen, valid=None):
  """Returns how many tokens each expert takes, and how many experts each token has."""
  counts = np.asarray(chosen.valid_TA)
  counts = counts if valid is None else counts & valid[:, None]
  expert = np.asarray(chosen.expert_TA)[counts]
  return np.bincount(expert, minlength=E), counts.sum(1)


def test_every_expert_takes_its_share_however_skewed_the_scores(seen_of, skewed):
  of_expert, of_token = loads(ExpertChoice(factor=1.5).select(seen_of(ExpertChoice(), skewed)))
  np.testing.assert_array_equal(of_expert, 1.5 * 400 * A / E)
  assert of_token.min() < A and of_token.max() > 3


def test_a_token_has_at_most_so_many_experts_and_these_are_its_best(seen_of, skewed):
  seen = seen_of(ExpertChoice(), skewed)
  free, limited = (ExpertChoice(factor=2.0, most=most).select(seen) for most in (0, 4))
  assert free.expert_TA.shape[1] == E and limited.expert_TA.shape[1] == 4
  np.testing.assert_array_equal(free.expert_TA[:, :4], limited.expert_TA)
  assert (loads(free)[1] > 4).any() and loads(limited)[1].max() == 4


def test_padding_takes_no_place_and_makes_none(seen_of, skewed):
  valid = np.random.default_rng(1).random(400) < 0.4
  router = ExpertChoice()
  among = router.select(seen_of(router, np.where(valid[:, None], skewed, 50), valid=valid))
  alone = router.select(seen_of(router, skewed[valid]))
  np.testing.assert_array_equal(loads(among)[0], np.ceil(valid.sum() * A / E))
  assert not np.asarray(among.valid_TA)[~valid].any()
  for name in ("expert_TA", "weight_TA", "valid_TA"):
    np.testing.assert_array_equal(getattr(among, name)[valid], getattr(alone, name))


def test_without_keys_a_token_takes_its_best_unless_experts_always_choose(seen_of, skewed):
  seen = seen_of(ExpertChoice(), skewed, seed=None)
  alone = ExpertChoice().select(seen)
  best = np.argsort(-np.asarray(seen.scores_TE), axis=1, kind="stable")[:, :A]
  np.testing.assert_array_equal(alone.expert_TA, best)
  always = ExpertChoice(always=True).select(seen)
  trained = ExpertChoice().select(seen_of(ExpertChoice(), skewed))
  jax.tree.map(np.testing.assert_array_equal, vars(always), vars(trained))


def test_a_causal_model_is_refused_unless_the_future_is_allowed():
  with pytest.raises(InputError, match="routes a token by later ones"):
    MoEConfig(router=ExpertChoice()).check_causal()
  MoEConfig(router=ExpertChoice(allow_future=True)).check_causal()
  MoEConfig(router=CausalExpertChoice()).check_causal()


@pytest.mark.parametrize("tokens, factor", [(400, 1.0), (41, 1.25), (41, 0.3), (1, 1.0)])
def test_a_capacity_factor_of_1_has_room_for_what_experts_choose_and_no_more(
  seen_of, skewed, tokens, factor
):
  router = ExpertChoice(factor=factor)
  chosen = router.select(seen_of(router, skewed[:tokens]))
  routing = Routing(
    chosen.expert_TA, chosen.weight_TA, chosen.valid_TA, jnp.zeros((tokens, E)),
    jnp.zeros(tokens), active=router.mean_active(A),
  )
  plan = Capacity(factor=1.0).plan(routing)
  assert float(plan.dropped["capacity"]) == 0
  assert plan.token_R.size == loads(chosen)[0].sum()
  assert Einsum(factor=1.0).masks(routing)[0].shape[2] * E == plan.token_R.size
  assert Dropless().plan(routing).groups.sizes_S.sum() == plan.token_R.size


@pytest.mark.parametrize("exact, places", [(True, 15), (False, 16)])
def test_places_are_those_of_the_factor_as_it_is_written_but_in_runs_of_before(
  seen_of, skewed, exact, places
):
  router = ExpertChoice(factor=0.6, exact=exact)  # 0.6 * 100 * 2 / 8
  of_expert, _ = loads(router.select(seen_of(router, skewed[:100])))
  np.testing.assert_array_equal(of_expert, places)
  assert from_plain(ExpertChoice, {"factor": 0.6}) == ExpertChoice(factor=0.6, exact=False)


def update(router, threshold, scores, valid=None, active=A):
  valid = np.ones(len(scores), bool) if valid is None else valid
  statistics = RouterStatistics(jnp.asarray(scores), jnp.asarray(valid), active)
  buffers = {"threshold": jnp.asarray(threshold)}
  return np.asarray(router.update(buffers, None, statistics)["threshold"])


def test_thresholds_let_each_expert_take_its_share_of_the_step_they_came_from(seen_of, skewed):
  router = CausalExpertChoice(factor=1.5)
  before = router.select(seen_of(router, skewed))
  of_expert, of_token = loads(before)
  assert of_expert.max() > 200 and (of_token == 3).all(), "without thresholds: the best of a token"
  threshold = update(router, np.zeros(E, np.float32), before.margins_TE, active=3.0)
  after = router.select(seen_of(router, skewed, buffers={"threshold": jnp.asarray(threshold)}))
  of_expert, of_token = loads(after)
  np.testing.assert_array_equal(of_expert, 150)
  assert of_token.min() < 3 < of_token.max()


def test_loads_come_near_their_share_on_tokens_not_seen_before(seen_of, skewed):
  router, threshold = CausalExpertChoice(), np.zeros(E, np.float32)
  for part in np.split(skewed[:300], 3):
    threshold = update(router, threshold, seen_of(router, part).scores_TE)
  fresh = seen_of(router, skewed[300:], buffers={"threshold": jnp.asarray(threshold)})
  of_expert, _ = loads(router.select(fresh))
  # A share of 1/4 of 100 tokens has a standard deviation of 4.3 tokens, thresholds of 2.5 more.
  assert np.abs(of_expert - 25).max() < 15


def test_a_threshold_goes_a_part_of_the_way_and_stays_where_there_is_nothing_to_learn():
  scores = np.random.default_rng(0).random((40, E)).astype(np.float32)
  new = np.sort(scores, axis=0)[-11]  # 10 of 40 tokens lie above it.
  router, old = CausalExpertChoice(rate=0.25), np.linspace(0, 1, E, dtype=np.float32)
  np.testing.assert_array_equal(update(router, 0 * old, scores), new)
  np.testing.assert_allclose(update(router, old, scores), old + 0.25 * (new - old), rtol=1e-6)
  np.testing.assert_array_equal(update(router, old, scores, np.zeros(40, bool)), old)
  assert router.update({"threshold": old}, None, None)["threshold"] is old
  every = update(router, 0 * old, scores, active=float(E))
  np.testing.assert_array_equal(every, 0)


def test_padding_tells_thresholds_nothing():
  rng = np.random.default_rng(0)
  scores, valid = rng.random((40, E)).astype(np.float32), rng.random(40) < 0.5
  filled = np.where(valid[:, None], scores, np.nan)
  router, old = CausalExpertChoice(), np.zeros(E, np.float32)
  np.testing.assert_array_equal(
    update(router, old, filled, valid), update(router, old, scores[valid])
  )


@pytest.mark.parametrize("cls", [ExpertChoice, CausalExpertChoice])
@pytest.mark.parametrize(
  "options, words",
  [({"factor": 0.0}, "factor must be"), ({"factor": 5.0}, "10 experts in the mean"),
   ({"most": 1}, "most=1"), ({"most": 9}, "most=9")],
)  # fmt: skip
def test_numbers_that_make_no_sense_are_refused(cls, options, words):
  with pytest.raises(InputError, match=words):
    MoEConfig(num_experts=E, num_active=A, router=cls(**options))


@pytest.mark.parametrize("rate", [0.0, 1.5])
def test_a_rate_outside_of_its_bounds_is_refused(rate):
  with pytest.raises(InputError, match="rate must lie"):
    CausalExpertChoice(rate=rate)
