"""Dropless dispatch: every choice is computed at any balance (MegaBlocks, Gale et al. 2022).

Rows are sorted by expert and go through one grouped matmul. For experts whose weights are plain
arrays one function replaces gather, products and combine: a back end of `ops/expert_mlp`.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from jaxmoe.core.backends import Chooser
from jaxmoe.core.weight_formats import multiply
from jaxmoe.moe.dispatch.dispatcher import WHOLE, Counts, DispatchContext, Dispatcher
from jaxmoe.moe.dispatch.plan import ExpertFunction, Plan, Ragged, place_choices, tokens_of_rows
from jaxmoe.moe.routing import Routing
from jaxmoe.ops import expert_mlp, grouped_matmul


@dataclasses.dataclass(frozen=True)
class Dropless(Dispatcher):
  """No capacity, no drops."""

  @jax.named_scope("plan")
  def plan(self, routing: Routing, context: DispatchContext = WHOLE) -> Plan:
    """Returns the plan of T * A rows in order of expert, then of token."""
    num_rows = routing.expert_TA.size
    place_TA, sizes_E = place_choices(routing)
    first_E = jnp.cumsum(sizes_E) - sizes_E
    row_TA = jnp.where(routing.valid_TA, first_E[routing.expert_TA] + place_TA, num_rows)
    return Plan(
      token_R=tokens_of_rows(row_TA, num_rows),
      row_TA=row_TA,
      weight_TA=routing.weight_TA,
      groups=Ragged(sizes_E, _matmul(context.chooser)),
      chooser=context.chooser,
    )

  def run(
    self, x_TD: jax.Array, routing: Routing, experts: ExpertFunction, context: DispatchContext
  ) -> tuple[jax.Array, Counts]:
    """Returns (T, D) and no drops."""
    plain = experts.plain_weights() if hasattr(experts, "plain_weights") else None
    if plain is None:
      return super().run(x_TD, routing, experts, context)
    num_experts = routing.scores_TE.shape[1]
    slot_TA = jnp.where(routing.valid_TA, routing.expert_TA, num_experts)
    # Of many choices that do not count, each slot has its share, too.
    among = round(routing.num_among * slot_TA.shape[1] / routing.num_active)
    sizes = dict(zip("TASDGF", (*slot_TA.shape, *plain.gated_shape), strict=True))
    layer = context.chooser.choose("expert_mlp", expert_mlp.BACKENDS, x_TD.dtype, sizes)
    rest = plain.activation, among, _matmul(context.chooser)

    def products(
      gate_up: jax.Array, down: jax.Array, x_TD: jax.Array, slot_TA: jax.Array, weight_TA: jax.Array
    ) -> jax.Array:
      return layer(x_TD, gate_up.reshape(plain.gated_shape), down, slot_TA, weight_TA, *rest)

    weights = plain.gate_up, plain.down
    return multiply(products, weights, x_TD, slot_TA, routing.weight_TA), Counts({}, {})


def _matmul(chooser: Chooser) -> grouped_matmul.GroupedMatmul:
  """Returns the grouped matmul that is chosen when it is called, for the arrays it is given."""

  def matmul(rows_RD: jax.Array, weight_SDF: jax.Array, sizes_S: jax.Array) -> jax.Array:
    sizes = dict(zip("RSDF", (rows_RD.shape[0], *weight_SDF.shape), strict=True))
    backends = grouped_matmul.BACKENDS
    chosen = chooser.choose("grouped_matmul", backends, rows_RD.dtype, sizes)
    return chosen(rows_RD, weight_SDF, sizes_S)

  return matmul
