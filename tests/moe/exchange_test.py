"""What a bounded exchange lets through: the first choices for each device, each counted once."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxmoe.moe.dispatch import AllToAll
from jaxmoe.moe.routing import Routing

TOKENS, ACTIVE, EXPERTS, DEVICES = 24, 3, 8, 2


def routing_of(seed):
  rng = np.random.default_rng(seed)
  expert_TA = np.stack([rng.permutation(EXPERTS)[:ACTIVE] for _ in range(TOKENS)]).astype(np.int32)
  return Routing(
    expert_TA=jnp.asarray(expert_TA),
    weight_TA=jnp.ones((TOKENS, ACTIVE)),
    valid_TA=jnp.asarray(rng.random((TOKENS, ACTIVE)) < 0.8),
    scores_TE=jnp.zeros((TOKENS, EXPERTS)),
    log_z_T=jnp.zeros(TOKENS),
  )


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("bound", [0.3, 0.5, 0.7])
def test_no_device_is_sent_more_rows_than_its_buffer_holds_and_every_loss_counts(bound, seed):
  routing, exchange = routing_of(seed), AllToAll(bound=bound)
  room = exchange.rows_per_device(TOKENS * ACTIVE, DEVICES)
  sent, valid_TA = [0] * DEVICES, np.zeros((TOKENS, ACTIVE), bool)
  for token, experts in enumerate(np.asarray(routing.expert_TA)):
    for choice, expert in enumerate(experts):
      device = expert // (EXPERTS // DEVICES)
      if routing.valid_TA[token, choice] and sent[device] < room:
        sent[device] += 1
        valid_TA[token, choice] = True

  admitted, lost = exchange.admit(routing, DEVICES)
  np.testing.assert_array_equal(admitted.valid_TA, valid_TA)
  assert lost["exchange"] == routing.valid_TA.sum() - valid_TA.sum()
  assert max(sent) == room  # or nothing was tried


@pytest.mark.parametrize(
  "bound, choices, rows", [(1.1, 200, 55), (1.2, 50, 15), (0.07, 400, 7), (9.0, 8, 8), (1e-9, 8, 1)]
)
def test_a_buffer_has_the_bound_times_the_mean_rounded_up(bound, choices, rows):
  assert AllToAll(bound=bound).rows_per_device(choices, 4) == rows


def test_without_a_bound_nothing_is_lost():
  routing = routing_of(0)
  admitted, lost = AllToAll().admit(routing, DEVICES)
  assert admitted is routing and lost == {}
