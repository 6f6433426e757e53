"""At most C rows an expert; what does not fit is dropped and counted (Switch, section 2.2).

C = ceil(factor * T * A / E). Queues fill in order of tokens, all choices of a token together:
a later token never takes the place of an earlier one, so the layer is causal within a row of the
batch. GShard's order (all first choices, then all second ones) is not.
"""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp

from jaxmoe.core.errors import InputError
from jaxmoe.moe.dispatch.plan import (
  Experts,
  Plan,
  Uniform,
  place_choices,
  through_rows,
  tokens_of_rows,
)
from jaxmoe.moe.routing import Routing


@dataclasses.dataclass(frozen=True)
class Capacity:
  """A fixed number of rows an expert.

  Attributes:
    factor: Rows an expert has, as a multiple of the mean; 1.0 drops at the slightest imbalance.
  """

  factor: float = 1.25

  def __post_init__(self) -> None:
    if self.factor <= 0:
      raise InputError(f"factor must be above 0: factor={self.factor}")

  def rows_per_expert(self, tokens: int, num_active: int, num_experts: int) -> int:
    """Returns C, at least 1 and at most T; `num_experts` are those that choices spread over."""
    mean = tokens * num_active / num_experts
    return min(tokens, max(1, math.ceil(self.factor * mean)))

  @jax.named_scope("plan")
  def plan(self, routing: Routing) -> Plan:
    """Returns the plan of E * C rows; choices past place C have none."""
    tokens, num_experts = routing.scores_TE.shape
    capacity = self.rows_per_expert(tokens, routing.expert_TA.shape[1], routing.num_among)
    num_rows = num_experts * capacity
    place_TA, sizes_E = place_choices(routing)
    fits_TA = routing.valid_TA & (place_TA < capacity)
    row_TA = jnp.where(fits_TA, routing.expert_TA * capacity + place_TA, num_rows)
    dropped = jnp.sum((routing.valid_TA & ~fits_TA).astype(jnp.float32))
    return Plan(
      token_R=tokens_of_rows(row_TA, num_rows),
      row_TA=row_TA,
      weight_TA=routing.weight_TA,
      groups=Uniform(jnp.minimum(sizes_E, capacity), capacity),
      dropped={"capacity": dropped},
    )

  def __call__(
    self, x_TD: jax.Array, routing: Routing, experts: Experts
  ) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Returns (T, D) and the number of dropped choices."""
    plan = self.plan(routing)
    return through_rows(plan, x_TD, experts), plan.dropped
