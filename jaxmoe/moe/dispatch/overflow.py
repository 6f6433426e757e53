"""Overflow of capacity: OVERFLOW, functions of (routing, C rows a slot, context) that drop.

Each returns the routing in which only choices with a row are valid, the row's place in its slot,
and how many choices went to another expert. `position` and `spill` fill queues in order of tokens,
all choices of a token together: a later token never takes the place of an earlier one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from jaxmoe.moe.dispatch.dispatcher import DispatchContext
from jaxmoe.moe.dispatch.plan import place_choices
from jaxmoe.moe.routing import Routing

Admitted = tuple[Routing, jax.Array, dict[str, jax.Array]]


def by_position(routing: Routing, capacity: int, context: DispatchContext) -> Admitted:
  """The first tokens stay (Switch, Fedus et al. 2021, section 2.2)."""
  del context
  place_TA, _ = place_choices(routing)
  valid_TA = routing.valid_TA & (place_TA < capacity)
  return dataclasses.replace(routing, valid_TA=valid_TA), place_TA, {}


def by_score(routing: Routing, capacity: int, context: DispatchContext) -> Admitted:
  """The highest weights stay, whatever their place: batch prioritized routing, by choice.

  Riquelme et al. 2021 (arXiv:2106.05974), section 4, order tokens by their largest weight and
  fill choice by choice; here each expert keeps the choices that weigh most.
  """
  del context
  return _ranked(routing, -jax.lax.stop_gradient(routing.weight_TA), capacity)


def at_random(routing: Routing, capacity: int, context: DispatchContext) -> Admitted:
  """Chance decides (random token selection, Kim et al. 2021, arXiv:2109.10465, section 2.3).

  Without keys, in evaluation, the first tokens stay.
  """
  if context.keys is None:
    return by_position(routing, capacity, context)
  chance_TA = jax.random.uniform(context.keys("overflow"), routing.expert_TA.shape)
  return _ranked(routing, chance_TA, capacity)


def _ranked(routing: Routing, rank_TA: jax.Array, capacity: int) -> Admitted:
  """Fills queues in order of rank, lowest first; ties in order of tokens."""
  order_R = jnp.argsort(rank_TA.reshape(-1), stable=True)
  one_by_one = dataclasses.replace(
    routing,
    expert_TA=routing.expert_TA.reshape(-1, 1)[order_R],
    valid_TA=routing.valid_TA.reshape(-1, 1)[order_R],
    scores_TE=jnp.zeros((rank_TA.size, routing.scores_TE.shape[1])),
  )
  place_R1, _ = place_choices(one_by_one)
  place_TA = jnp.zeros_like(place_R1[:, 0]).at[order_R].set(place_R1[:, 0]).reshape(rank_TA.shape)
  valid_TA = routing.valid_TA & (place_TA < capacity)
  return dataclasses.replace(routing, valid_TA=valid_TA), place_TA, {}


def spill(routing: Routing, capacity: int, context: DispatchContext) -> Admitted:
  """A choice whose expert is full goes to the best-scored one with room that its token has not.

  Token after token, O(T) steps, because a spill takes a place from those that come later (cf.
  "No-Token-Left-Behind", Fedus et al. 2021, appendix B, which goes round by round and lets later
  tokens push out earlier spills). The weight shrinks by the ratio of the two scores, never grows.
  """
  num_slots = routing.scores_TE.shape[1]
  expert_S = np.asarray(context.slots or range(num_slots))
  twins_SS = jnp.asarray(expert_S[:, None] == expert_S[None, :])
  slot_S = jnp.arange(num_slots)

  def step(count_S: jax.Array, token: tuple[jax.Array, ...]) -> tuple[jax.Array, tuple]:
    slot_A, valid_A, scores_S = token
    taken = [twins_SS[slot] & valid for slot, valid in zip(slot_A, valid_A)]
    found = []
    for choice, (slot, valid) in enumerate(zip(slot_A, valid_A)):
      elsewhere_S = sum(taken[:choice] + taken[choice + 1 :], jnp.zeros(num_slots, bool))
      wish_S = jnp.where(slot_S == slot, jnp.inf, scores_S)
      wish_S = jnp.where((count_S < capacity) & ~elsewhere_S, wish_S, -jnp.inf)
      best = jnp.argmax(wish_S).astype(jnp.int32)
      has_row = valid & (wish_S[best] > -jnp.inf)
      taken[choice] = twins_SS[best] & has_row
      found.append((best, count_S[best], has_row))
      count_S = count_S + ((slot_S == best) & has_row)
    return count_S, tuple(jnp.stack(field) for field in zip(*found))

  scores_TE = jax.lax.stop_gradient(routing.scores_TE)
  tokens = routing.expert_TA, routing.valid_TA, scores_TE
  _, (slot_TA, place_TA, valid_TA) = jax.lax.scan(step, jnp.zeros(num_slots, jnp.int32), tokens)
  moved_TA = valid_TA & (jnp.asarray(expert_S)[slot_TA] != jnp.asarray(expert_S)[routing.expert_TA])
  old_TA, new_TA = (
    jnp.take_along_axis(routing.scores_TE, at_TA, axis=1) for at_TA in (routing.expert_TA, slot_TA)
  )
  some_TA = old_TA > 1e-20
  ratio_TA = jnp.where(some_TA, jnp.minimum(new_TA / jnp.where(some_TA, old_TA, 1), 1), 1)
  admitted = dataclasses.replace(
    routing,
    expert_TA=slot_TA,
    valid_TA=valid_TA,
    weight_TA=routing.weight_TA * jnp.where(moved_TA, ratio_TA, 1),
  )
  return admitted, place_TA, {"capacity": jnp.sum(moved_TA.astype(jnp.float32))}


OVERFLOW: dict[str, Callable[[Routing, int, DispatchContext], Admitted]] = {
  "position": by_position,
  "score": by_score,
  "random": at_random,
  "spill": spill,
}
