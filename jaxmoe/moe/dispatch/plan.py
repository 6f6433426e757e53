"""A Plan: which rows the experts see, in which order, and how their outputs return to tokens.

A row is one (token, choice) pair; rows stand in order of their slot, and a slot holds one expert.
Every dispatcher is a function from a Routing to a Plan, or a fused form that equals it.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Protocol

import jax
import jax.numpy as jnp

from jaxmoe.core.backends import HERE, Chooser
from jaxmoe.core.weight_formats import Groups
from jaxmoe.moe.routing import Routing
from jaxmoe.ops import combine, grouped_matmul, move

Matmul = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]


@dataclasses.dataclass(frozen=True)
class Ragged:
  """Groups of any sizes, through one of the grouped matmul back ends."""

  sizes_S: jax.Array
  backend: Matmul
  values: Mapping[str, jax.Array] = dataclasses.field(default_factory=dict)

  def matmul(self, rows_RD: jax.Array, weight_SDF: jax.Array) -> jax.Array:
    """Returns (R, F); rows past the sum of the sizes are zero."""
    return self.backend(rows_RD, weight_SDF, self.sizes_S)


@dataclasses.dataclass(frozen=True)
class Uniform:
  """Groups of one size, through one batched matmul."""

  sizes_S: jax.Array
  rows_per_slot: int
  values: Mapping[str, jax.Array] = dataclasses.field(default_factory=dict)

  def matmul(self, rows_RD: jax.Array, weight_SDF: jax.Array) -> jax.Array:
    """Returns (R, F) for R = S * rows_per_slot."""
    return grouped_matmul.uniform(rows_RD, weight_SDF, self.rows_per_slot)


@dataclasses.dataclass(frozen=True)
class Plan:
  """Rows for experts.

  Attributes:
    token_R: int32, the token whose vector a row holds; T for a row that holds zeros.
    row_TA: int32, the row of each choice; R for a choice that has none.
    weight_TA: float32, what the choice's output is multiplied by.
    groups: The rows' slots, for `grouped_dot`.
    dropped: Number of valid choices without a row, float32, by reason.
    spilled: Number of choices with a row of another expert than the chosen, float32, by reason.
    chooser: What chooses back ends.
  """

  token_R: jax.Array
  row_TA: jax.Array
  weight_TA: jax.Array
  groups: Ragged | Uniform
  dropped: dict[str, jax.Array] = dataclasses.field(default_factory=dict)
  spilled: dict[str, jax.Array] = dataclasses.field(default_factory=dict)
  chooser: Chooser = HERE

  @jax.named_scope("move")
  def move(self, values_TD: jax.Array) -> jax.Array:
    """Returns (R, D): per-token values in order of rows, zeros for rows without a token."""
    tokens, size = values_TD.shape[0], math.prod(values_TD.shape[1:])
    sizes = {"T": tokens, "R": self.token_R.size, "D": size}
    backend = self.chooser.choose("move", move.BACKENDS, values_TD.dtype, sizes)
    return backend(values_TD, self.token_R)

  @jax.named_scope("combine")
  def combine(self, rows_RD: jax.Array) -> jax.Array:
    """Returns (T, D) in rows.dtype: each token's rows times their weights, in order of choice.

    The products and their sum are float32.
    """
    sizes = dict(zip("TARD", (*self.row_TA.shape, *rows_RD.shape), strict=True))
    backend = self.chooser.choose("combine", combine.BACKENDS, rows_RD.dtype, sizes)
    return backend(rows_RD, self.row_TA, self.weight_TA)


class ExpertFunction(Protocol):
  """What a dispatcher needs of the experts: rows in, rows out."""

  def __call__(self, rows_RD: jax.Array, groups: Groups) -> jax.Array:
    """Returns (R, D) for rows in order of their slot."""


def through_rows(
  plan: Plan, x_TD: jax.Array, experts: ExpertFunction, values: Mapping[str, jax.Array]
) -> jax.Array:
  """Returns (T, D): move rows and what is known of their tokens, run the experts, combine."""
  rows_RD = plan.move(x_TD)
  known = {name: plan.move(value_T) for name, value_T in values.items()}
  with jax.named_scope("experts"):
    rows_RD = experts(rows_RD, dataclasses.replace(plan.groups, values=known))
  return plan.combine(rows_RD)


def place_choices(routing: Routing) -> tuple[jax.Array, jax.Array]:
  """Returns each choice's place in its expert's queue, and the queues' lengths.

  Queues fill in order of tokens, all choices of a token together, so that no later token moves an
  earlier one (filling choice by choice, as GShard does, leaks the future). A cumulative sum over
  the (T, E) mask, no sort.

  Returns:
    place_TA, int32, meaningless where the choice is not valid; sizes_E, int32.
  """
  tokens, num_experts = routing.scores_TE.shape
  chosen_TA = jnp.where(routing.valid_TA, routing.expert_TA, num_experts)
  rows_T1 = jnp.arange(tokens)[:, None]
  mask_TE = jnp.zeros((tokens, num_experts), jnp.int32).at[rows_T1, chosen_TA].add(1, mode="drop")
  after_TE = jnp.cumsum(mask_TE, axis=0)
  before_TE = after_TE - mask_TE
  return jnp.take_along_axis(before_TE, routing.expert_TA, axis=1), after_TE[-1]


def tokens_of_rows(row_TA: jax.Array, num_rows: int) -> jax.Array:
  """Returns (R,) int32, the inverse of `row_TA`: the token of each row, T where there is none."""
  tokens = row_TA.shape[0]
  token_TA = jnp.broadcast_to(jnp.arange(tokens, dtype=jnp.int32)[:, None], row_TA.shape)
  empty_R = jnp.full(num_rows, tokens, jnp.int32)
  return empty_R.at[row_TA.reshape(-1)].set(token_TA.reshape(-1), mode="drop")
