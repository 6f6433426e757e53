import types

import pytest

from jaxmoe.models.attention_experts import AttentionExperts
from jaxmoe.moe.balance import Heterogeneous, LoadBalance, NullAveraged, RouterZ, Sparsity
from jaxmoe.moe.experts.null import Null
from jaxmoe.moe.layer import MoEConfig
from jaxmoe.moe.routers import ROUTERS, TopK
from jaxmoe.train.changed_definitions import KEY, MENDED, mended

SIGMOID = TopK(score="sigmoid")


def decoder_with(*layers):
  return types.SimpleNamespace(routed_layers=lambda: {"0": dict(enumerate(layers))})


@pytest.mark.parametrize("term", [LoadBalance(scope="micro"), NullAveraged(), Heterogeneous()])
def test_a_run_of_before_is_told_that_its_scores_are_divided_by_their_sum(term):
  layer = MoEConfig(8, 2, SIGMOID, Null(num_null=1), balance=(term,))
  told = mended({}, decoder_with(MoEConfig(), layer))
  assert set(told) == {"balance_of_shares"}
  assert f"{term.name} of sigmoid scores" in told["balance_of_shares"]
  assert not mended({KEY: list(MENDED)}, decoder_with(layer))


def test_experts_of_attention_have_balance_losses_too():
  assert mended({}, decoder_with(AttentionExperts(router=SIGMOID, balance=(LoadBalance(),))))


@pytest.mark.parametrize("name", ROUTERS)
def test_only_routers_whose_scores_are_no_shares_have_other_losses_than_before(name):
  config = ROUTERS[name][1]
  layer = MoEConfig(8, config.fixed_active or 2, config, balance=(LoadBalance(), RouterZ()))
  assert bool(mended({}, decoder_with(layer))) == (config.score != "softmax")


def test_losses_that_take_no_score_for_a_share_are_as_they_were():
  terms = RouterZ(), Sparsity(adaptive=False)
  assert not mended({}, decoder_with(MoEConfig(8, 2, SIGMOID, balance=terms)))
