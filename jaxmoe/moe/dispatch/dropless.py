"""Dropless dispatch: every choice is computed at any balance (MegaBlocks, Gale et al. 2022).

Rows are sorted by expert and go through one grouped matmul. For experts whose weights are plain
arrays the `fused` back end replaces gather, products and combine by one function with a backward
pass of its own; it equals the unfused form and is the fastest on CPU.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp

from jaxmoe.moe.dispatch.dispatcher import WHOLE, Counts, DispatchContext, Dispatcher
from jaxmoe.moe.dispatch.plan import ExpertFunction, Plan, Ragged, place_choices, tokens_of_rows
from jaxmoe.moe.routing import Routing
from jaxmoe.ops import expert_mlp, grouped_matmul


@dataclasses.dataclass(frozen=True)
class Dropless(Dispatcher):
  """No capacity, no drops.

  Attributes:
    backend: `fused` runs plain weights in one function and any other format through `blocks`;
      the rest are grouped matmuls. `auto` is `ragged` on TPU, where XLA has a kernel for it, and
      `fused` elsewhere.
  """

  backend: Literal["auto", "fused", "blocks", "ragged", "loop"] = "auto"

  @jax.named_scope("plan")
  def plan(self, routing: Routing, context: DispatchContext = WHOLE) -> Plan:
    """Returns the plan of T * A rows in order of expert, then of token."""
    del context
    num_rows = routing.expert_TA.size
    place_TA, sizes_E = place_choices(routing)
    first_E = jnp.cumsum(sizes_E) - sizes_E
    row_TA = jnp.where(routing.valid_TA, first_E[routing.expert_TA] + place_TA, num_rows)
    name = self._backend()
    matmul = grouped_matmul.BACKENDS["blocks" if name == "fused" else name]
    return Plan(
      token_R=tokens_of_rows(row_TA, num_rows),
      row_TA=row_TA,
      weight_TA=routing.weight_TA,
      groups=Ragged(sizes_E, matmul),
    )

  def run(
    self, x_TD: jax.Array, routing: Routing, experts: ExpertFunction, context: DispatchContext
  ) -> tuple[jax.Array, Counts]:
    """Returns (T, D) and no drops."""
    plain = experts.plain_weights() if hasattr(experts, "plain_weights") else None
    if self._backend() != "fused" or plain is None:
      return super().run(x_TD, routing, experts, context)
    num_experts = routing.scores_TE.shape[1]
    slot_TA = jnp.where(routing.valid_TA, routing.expert_TA, num_experts)
    # Of many choices that do not count, each slot has its share, too.
    among = round(routing.num_among * slot_TA.shape[1] / routing.num_active)
    y_TD = expert_mlp.fused(
      x_TD, plain.gate_up, plain.down, slot_TA, routing.weight_TA, plain.activation,
      among,
    )
    return y_TD, Counts({}, {})

  def _backend(self) -> str:
    if self.backend != "auto":
      return self.backend
    return "ragged" if jax.default_backend() == "tpu" else "fused"
