"""Choices by place alone, whatever a token holds, so that benchmarks can state their loads.

Weights are alike, 1 / A (1 without `normalize`); their gradient is that of the gate's scores in
their stead, so that a backward pass costs what it costs elsewhere and the gate learns. The n-th
place is that of slot n % L of row n // L, for rows of L tokens: padding takes its own and no more.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from jaxmoe.core.errors import InputError
from jaxmoe.moe.routers.router import Router, RouterInputs, Selection

STEPS = 2**16
"""In how many equal parts the share of an expert that every token goes to is counted."""


@dataclasses.dataclass(frozen=True)
class Forced(Router):
  """The base: a rule overrides `experts_at`."""

  draws: ClassVar[bool] = True

  def experts_at(self, place_T: jax.Array, num_experts: int, num_active: int) -> jax.Array:
    """Returns (T, A) int32, distinct experts for the n-th places, uint32."""
    raise NotImplementedError

  def select(self, inputs: RouterInputs) -> Selection:
    """Routes each place by itself."""
    rows, length = inputs.tokens.slot.shape[0], inputs.tokens.row_length
    place_BL = inputs.tokens.slot + length * jnp.arange(rows, dtype=jnp.int32)[:, None]
    place_T = place_BL.reshape(-1).astype(jnp.uint32)
    expert_TA = self.experts_at(place_T, inputs.scores_TE.shape[1], inputs.num_active)
    expert_TA = expert_TA.astype(jnp.int32)
    return Selection(expert_TA, self.combine_weights(inputs.scores_TE, expert_TA))

  def combine_weights(
    self, scores_TE: jax.Array, expert_TA: jax.Array, valid_TA: jax.Array | None = None
  ) -> jax.Array:
    """Returns weights alike, with the gradient of weights by score."""
    alike_TA = super().combine_weights(jnp.ones_like(scores_TE), expert_TA, valid_TA)
    by_score_TA = super().combine_weights(scores_TE, expert_TA, valid_TA)
    return alike_TA + (by_score_TA - jax.lax.stop_gradient(by_score_TA))


@dataclasses.dataclass(frozen=True)
class Balanced(Forced):
  """Experts in turn: without padding no load is more than 1 above another."""

  def experts_at(self, place_T: jax.Array, num_experts: int, num_active: int) -> jax.Array:
    """Returns n A, n A + 1, ... modulo E."""
    turn_A = jnp.arange(num_active, dtype=jnp.uint32)
    return (place_T[:, None] * num_active + turn_A[None]) % num_experts


@dataclasses.dataclass(frozen=True)
class Skewed(Forced):
  """Loads by Zipf's law: expert e, from 0, is as likely as 1 / (e + 1)^exponent.

  No token has an expert twice, so an expert's load ends at one choice a token, and what the law
  gives it above that goes to the others in proportion. Places are spread evenly (multiples of the
  golden ratio modulo 1), A choices 1 apart (systematic sampling): loads are those of the law to a
  few choices at any number of tokens.

  Attributes:
    exponent: 0 for even loads, 1 for Zipf's law proper.
  """

  exponent: float = 1.0

  def __post_init__(self) -> None:
    super().__post_init__()
    if not 0 <= self.exponent <= 100:
      raise InputError(f"exponent must lie between 0 and 100: exponent={self.exponent}")

  def experts_at(self, place_T: jax.Array, num_experts: int, num_active: int) -> jax.Array:
    """Returns the hottest first."""
    ends_E = np.round(np.cumsum(self.loads(num_experts, num_active)) * STEPS).astype(np.int32)
    start_T = (place_T * jnp.uint32(2654435769) >> 16).astype(jnp.int32)
    point_TA = start_T[:, None] + STEPS * jnp.arange(num_active, dtype=jnp.int32)[None]
    return jnp.searchsorted(jnp.asarray(ends_E), point_TA, side="right")

  def loads(self, num_experts: int, num_active: int) -> np.ndarray:
    """Returns (E,) float64, how many choices a token makes of each expert; the sum is A."""
    law_E = (1.0 + np.arange(num_experts)) ** -self.exponent
    loads_E = np.ones(num_experts)
    for full in range(num_active):
      rest = (num_active - full) * law_E[full:] / law_E[full:].sum()
      if rest[0] <= 1:
        loads_E[full:] = rest
        break
    return loads_E


@dataclasses.dataclass(frozen=True)
class Listed(Forced):
  """A list of experts, read A at a time, and again from its start when it ends.

  Attributes:
    experts: Their ids; the A choices of a token must be distinct.
  """

  experts: tuple[int, ...] = (0, 1)

  def check(self, num_experts: int, num_active: int) -> None:
    """Refuses ids outside of the layer, and an expert that a token would have twice."""
    super().check(num_experts, num_active)
    if not self.experts or not all(0 <= expert < num_experts for expert in self.experts):
      raise InputError(
        f"experts must be ids from 0 to {num_experts - 1}, at least one: experts={self.experts}"
      )
    for tokens in range(len(self.experts)):
      chosen = np.resize(np.roll(self.experts, -tokens * num_active), num_active)
      if len(set(chosen.tolist())) < num_active:
        raise InputError(
          f"the {num_active} choices of a token must be distinct, not {chosen.tolist()}: "
          f"experts={self.experts}; repeat an expert only after {num_active} others"
        )

  def experts_at(self, place_T: jax.Array, num_experts: int, num_active: int) -> jax.Array:
    """Returns entries n A, n A + 1, ... of the list."""
    del num_experts
    turn_A = jnp.arange(num_active, dtype=jnp.uint32)
    at_TA = (place_T[:, None] * num_active + turn_A[None]) % len(self.experts)
    return jnp.asarray(self.experts, jnp.int32)[at_TA]
