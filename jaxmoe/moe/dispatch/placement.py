"""Expert placement: which expert each slot holds, several slots for one of many rows.

Rows of an expert with r slots are dealt to them in turn, in order of its queue, so that their
loads differ by at most one. The parameters are the experts', once each: slots read them, and their
gradients add up, so that replicas train to the same numbers as one slot would.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxmoe.core.errors import InputError
from jaxmoe.moe.dispatch.plan import place_choices
from jaxmoe.moe.routing import Routing


def check_placement(slots: Sequence[int], num_experts: int) -> None:
  """Refuses slots that leave out one of the experts that take rows, or name another.

  Raises:
    InputError: what, why and the cure in one line.
  """
  for expert in slots:
    if not 0 <= expert < num_experts:
      raise InputError(
        f"placement names expert {expert}, experts with rows are 0 to {num_experts - 1}: "
        f"placement={tuple(slots)}; leave it out"
      )
  missing = sorted(set(range(num_experts)) - set(slots)) if slots else []
  if missing:
    raise InputError(
      f"placement must give every expert a slot: placement={tuple(slots)}; add expert {missing[0]}"
    )


def deal(routing: Routing, slots: Sequence[int]) -> Routing:
  """Returns the routing over slots: the n-th row of an expert goes to its slot n modulo r."""
  expert_S = np.asarray(slots, np.int32)
  slots_E = [np.flatnonzero(expert_S == expert) for expert in range(expert_S.max() + 1)]
  replicas_E = np.array([len(mine) for mine in slots_E], np.int32)
  slot_EQ = np.array([np.resize(mine, replicas_E.max()) for mine in slots_E], np.int32)
  place_TA, _ = place_choices(routing)
  turn_TA = place_TA % jnp.asarray(replicas_E)[routing.expert_TA]
  return dataclasses.replace(
    routing,
    expert_TA=jnp.asarray(slot_EQ)[routing.expert_TA, turn_TA],
    scores_TE=routing.scores_TE[:, expert_S],
  )


def weights_of_slots(experts: Any, slots: Sequence[int]) -> Any:
  """Returns the module with the weights of each slot's expert, in whatever format they are."""
  graph, state = nnx.split(experts)
  expert_S = np.asarray(slots, np.int32)

  def take(param: Any) -> Any:
    if param.get_metadata("dims")[:1] != ("expert",):
      return param
    return param.replace(jax.tree.map(lambda leaf: leaf[expert_S], param.get_value()))

  is_param = lambda leaf: isinstance(leaf, nnx.Variable)  # noqa: E731
  return nnx.merge(graph, jax.tree.map(take, state, is_leaf=is_param))
