"""Every expert computes every token: no rows move, nothing is dropped; the reference.

Costs E / A times the work of the others, so it is for oracles and for a handful of experts.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from jaxmoe.moe.dispatch.dispatcher import WHOLE, DispatchContext, Dispatcher
from jaxmoe.moe.dispatch.plan import Plan, Uniform
from jaxmoe.moe.routing import Routing


@dataclasses.dataclass(frozen=True)
class Dense(Dispatcher):
  """All experts on all tokens; R = E * T."""

  @jax.named_scope("plan")
  def plan(self, routing: Routing, context: DispatchContext = WHOLE) -> Plan:
    """Returns the plan whose row e * T + t is token t at expert e."""
    tokens, num_experts = routing.scores_TE.shape
    token_T = jnp.arange(tokens, dtype=jnp.int32)
    row_TA = routing.expert_TA * tokens + token_T[:, None]
    return Plan(
      token_R=jnp.tile(token_T, num_experts),
      row_TA=jnp.where(routing.valid_TA, row_TA, num_experts * tokens),
      weight_TA=routing.weight_TA,
      groups=Uniform(jnp.full(num_experts, tokens, jnp.int32), tokens),
      chooser=context.chooser,
    )
