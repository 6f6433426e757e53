import jax
import numpy as np
import pytest
from scipy.optimize import linear_sum_assignment

from jaxmoe.core.errors import InputError
from jaxmoe.models.block import BlockConfig
from jaxmoe.moe.layer import MoEConfig
from jaxmoe.moe.routers import TopK
from jaxmoe.moe.routers.assignment import Auction, Sinkhorn


def loads(chosen, valid=None, num_experts=8):
  expert = np.asarray(chosen.expert_TA)
  expert = expert if valid is None else expert[valid]
  return np.bincount(expert.reshape(-1), minlength=num_experts)


@pytest.mark.parametrize("router", [Sinkhorn(), Auction()], ids=["sinkhorn", "base"])
def test_a_causal_model_is_served_only_if_the_future_is_allowed(router):
  config = {"num_experts": 4, "num_active": router.fixed_active or 2}
  with pytest.raises(InputError, match="set allow_future=true"):
    BlockConfig(ffn=MoEConfig(router=router, **config))
  BlockConfig(ffn=MoEConfig(router=type(router)(allow_future=True), **config))


def test_sinkhorn_evens_out_a_skewed_batch(seen_of, skewed):
  share = loads(Sinkhorn().select(seen_of(Sinkhorn(), skewed, num_active=1))) / 50
  top = loads(TopK().select(seen_of(TopK(), skewed, num_active=1))) / 50
  assert top.max() > 3 and share.max() < 1.3 and share.min() > 0.7


def test_sinkhorn_is_blind_to_what_a_tokens_logits_have_in_common(seen_of, skewed):
  """exp of the logits as they are would overflow at 89."""
  level = np.random.default_rng(1).uniform(-200, 200, size=(len(skewed), 1)).astype(np.float32)
  plain, moved = (Sinkhorn().select(seen_of(Sinkhorn(), x)) for x in (skewed, skewed + level))
  assert np.mean(np.asarray(plain.expert_TA) == np.asarray(moved.expert_TA)) > 0.99


def test_sinkhorn_stops_after_its_iterations_or_where_it_has_converged(seen_of, skewed):
  many, one, loose = (
    loads(router.select(seen_of(router, skewed, num_active=1)))
    for router in (Sinkhorn(), Sinkhorn(iterations=1), Sinkhorn(tolerance=1e3))
  )
  assert many.max() < one.max()
  np.testing.assert_array_equal(one, loose)


@pytest.mark.parametrize("fields", [{"tolerance": 0.0}, {"iterations": 0}])
def test_sinkhorn_that_never_stops_or_never_starts_is_refused(fields):
  with pytest.raises(InputError, match="tolerance must be above 0 and iterations at least 1"):
    Sinkhorn(**fields)


@pytest.mark.parametrize("slack", [0.0, 2.0])
def test_a_slack_that_never_ends_or_says_nothing_is_refused(slack):
  with pytest.raises(InputError, match="slack must lie between 1e-4 and 1"):
    Auction(slack=slack)


@pytest.mark.parametrize("num_tokens", [1, 3, 8, 41, 400])
@pytest.mark.parametrize("slack", [1e-4, 0.01, 1.0])
def test_the_auction_is_even_and_as_close_to_the_largest_sum_as_it_says(
  seen_of, skewed, num_tokens, slack
):
  router, logits = Auction(slack=slack), skewed[:num_tokens]
  chosen = router.select(seen_of(router, logits, num_active=1))
  load = loads(chosen)
  assert load.sum() == num_tokens and load.max() - load.min() <= 1
  owner = np.repeat(np.arange(8), load)
  rows, columns = linear_sum_assignment(-logits[:, owner])
  best = logits[rows, owner[columns]].mean()
  found = np.take_along_axis(logits, np.asarray(chosen.expert_TA), 1).mean()
  spread = (logits.max(1) - logits.min(1)).max()
  assert best - slack * spread - 1e-4 <= found <= best + 1e-5


def test_the_experts_that_are_wanted_most_take_what_is_left_over(seen_of, skewed):
  router = Auction()
  chosen = router.select(seen_of(router, skewed[:11], num_active=1))
  np.testing.assert_array_equal(loads(chosen), [2, 2, 2, 1, 1, 1, 1, 1])
  alone = router.select(seen_of(router, skewed[:1, ::-1], num_active=1))
  np.testing.assert_array_equal(alone.expert_TA, [[np.argmax(skewed[0, ::-1])]])


HARD = {
  "equal logits": np.zeros((50, 8)),
  "one token over and over": np.tile(np.arange(8.0), (50, 1)),
  "far apart": np.random.default_rng(0).normal(size=(50, 8)) * 1e6,
  "high up and close together": 3e4 + 1e-3 * np.random.default_rng(0).normal(size=(50, 8)),
  "infinite": np.where(np.random.default_rng(0).random((50, 8)) < 0.3, np.inf, 0.0),
  "not a number": np.full((50, 8), np.nan),
  "one expert": np.zeros((5, 1)),
}


@pytest.mark.parametrize("logits", HARD.values(), ids=HARD.keys())
def test_the_auction_ends_with_even_loads_whatever_the_logits(seen_of, logits):
  router = Auction(slack=1e-4)
  chosen = jax.jit(lambda: router.select(seen_of(router, logits, num_active=1)).expert_TA)()
  load = np.bincount(np.asarray(chosen)[:, 0], minlength=logits.shape[1])
  assert load.sum() == len(logits) and load.max() - load.min() <= 1


@pytest.mark.parametrize("num_valid", [0, 1, 5, 20])
def test_padding_takes_no_place(seen_of, skewed, num_valid):
  valid = np.random.default_rng(3).permutation(40) < num_valid
  logits = np.where(valid[:, None], skewed[:40], 50.0)
  router = Auction()
  chosen = router.select(seen_of(router, logits, num_active=1, valid=valid))
  load = loads(chosen, valid)
  assert load.sum() == num_valid and load.max() - load.min() <= 1
  alone = router.select(seen_of(router, skewed[:40][valid], num_active=1)) if num_valid else None
  if alone:
    np.testing.assert_array_equal(np.asarray(chosen.expert_TA)[valid], alone.expert_TA)


def test_without_keys_each_token_takes_its_best_expert(seen_of, skewed):
  for router in (Sinkhorn(), Auction()):
    chosen = router.select(seen_of(router, skewed, num_active=1, seed=None))
    np.testing.assert_array_equal(chosen.expert_TA[:, 0], np.argmax(skewed, axis=1))
