"""Capacity: at most C rows an expert; the rest is dropped and counted (Switch, section 2.2).

C = ceil(factor * T * A / E). Queues fill in order of tokens, all choices of a token together:
a later token never takes the place of an earlier one, so the layer is causal within a row of the
batch. GShard's order (all first choices, then all second ones) is not; nor are the policies
`score` and `random`, which a causal model must allow by name.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Literal

import jax
import jax.numpy as jnp

from jaxmoe.core.config_io import added
from jaxmoe.core.decimals import decimal
from jaxmoe.core.errors import InputError
from jaxmoe.moe.dispatch.dispatcher import WHOLE, Counts, DispatchContext, Dispatcher
from jaxmoe.moe.dispatch.overflow import OVERFLOW
from jaxmoe.moe.dispatch.plan import Plan, Uniform, tokens_of_rows
from jaxmoe.moe.routing import Routing


@dataclasses.dataclass(frozen=True)
class Limited(Dispatcher):
  """A fixed number of rows an expert.

  Attributes:
    factor: Rows an expert has, as a multiple of the mean; 1.0 drops at the slightest imbalance.
    idle_share: The load of an expert that takes rows over that of one that takes none, which a
      layer with such experts aims at (tau of MoE++, Jin et al. 2024, arXiv:2410.07348, eq. 8).
    max_drop_rate: Share of a layer's choices above which drops end the run; 0 allows none.
    exact: Whether C is that of the decimals as they are written; else that of float products, which
      may be one row more, as in runs of before.
  """

  factor: float = 1.25
  idle_share: float = 1.0
  max_drop_rate: float = 1.0
  exact: bool = added(True, before=False)

  def __post_init__(self) -> None:
    for name in ("factor", "idle_share"):
      if getattr(self, name) <= 0:
        raise InputError(f"{name} must be above 0: {name}={getattr(self, name)}")
    if not 0 <= self.max_drop_rate <= 1:
      raise InputError(f"max_drop_rate must lie in [0, 1]: max_drop_rate={self.max_drop_rate}")

  @property
  def depends_on_shard(self) -> bool:
    """Whether a token's rows differ with the tokens that lie on one device with it."""
    return True

  @property
  def drop_limit(self) -> float:
    """The share of a layer's choices above which drops end the run."""
    return self.max_drop_rate

  def rows_per_expert(self, tokens: int, num_active: float, num_experts: int, idle: int = 0) -> int:
    """Returns C, at least 1 and at most T; `idle` more experts take no rows."""
    read = decimal if self.exact else float
    active, share, factor = read(num_active), read(self.idle_share), read(self.factor)
    mean = tokens * active * share / (share * num_experts + idle)
    return min(tokens, max(1, math.ceil(factor * mean)))

  @property
  def policy(self) -> str:
    """Which choices of a full expert lose, a key of OVERFLOW."""
    return "position"

  def admit(self, routing: Routing, context: DispatchContext = WHOLE) -> tuple[Routing, Counts]:
    """Returns the routing in which just the choices that get a row are valid, and the counts."""
    admitted, _, counts = self._admit(routing, context)
    return admitted, counts

  def _admit(self, routing: Routing, context: DispatchContext) -> tuple[Routing, jax.Array, Counts]:
    """Returns the same, with each choice's place among its expert's rows."""
    capacity = self.rows_for(routing, context)
    admitted, place_TA, spilled = OVERFLOW[self.policy](routing, capacity, context)
    wanted, kept = (jnp.sum(r.valid_TA.astype(jnp.float32)) for r in (routing, admitted))
    return admitted, place_TA, Counts({"capacity": wanted - kept}, spilled)

  def rows_for(self, routing: Routing, context: DispatchContext) -> int:
    """Returns C for the experts of a part of the layer."""
    tokens, num_slots = routing.scores_TE.shape
    return self.rows_per_expert(
      tokens, routing.num_active, num_slots + context.others, context.idle
    )


@dataclasses.dataclass(frozen=True)
class Capacity(Limited):
  """A fixed number of rows an expert, and a policy for what does not fit.

  Attributes:
    overflow: Which choices of a full expert lose; see `overflow.py`.
    allow_future: Whether a causal model may have a policy that looks at later tokens, so that
      training sees what generation cannot.
  """

  overflow: Literal["position", "score", "random", "spill"] = "position"
  allow_future: bool = False

  @property
  def policy(self) -> str:
    """Which choices of a full expert lose."""
    return self.overflow

  @property
  def looks_ahead(self) -> bool:
    """Whether a later token may take away the row of an earlier one."""
    return self.overflow in ("score", "random")

  @jax.named_scope("plan")
  def plan(self, routing: Routing, context: DispatchContext = WHOLE) -> Plan:
    """Returns the plan of S * C rows; choices that the policy leaves out have none."""
    num_slots, capacity = routing.scores_TE.shape[1], self.rows_for(routing, context)
    num_rows = num_slots * capacity
    admitted, place_TA, counts = self._admit(routing, context)
    row_TA = jnp.where(admitted.valid_TA, admitted.expert_TA * capacity + place_TA, num_rows)
    token_R = tokens_of_rows(row_TA, num_rows)
    used_SC = (token_R < routing.expert_TA.shape[0]).reshape(num_slots, capacity)
    return Plan(
      token_R=token_R,
      row_TA=row_TA,
      weight_TA=admitted.weight_TA,
      groups=Uniform(jnp.sum(used_SC, axis=1, dtype=jnp.int32), capacity),
      dropped=counts.dropped,
      spilled=counts.spilled,
      chooser=context.chooser,
    )
