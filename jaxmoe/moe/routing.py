"""What a router decides for each token, and the sums everything else is computed from."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, Protocol

import jax
import jax.numpy as jnp

from jaxmoe.core.rng import Keys
from jaxmoe.core.tokens import Tokens


@functools.partial(
  jax.tree_util.register_dataclass,
  data_fields=["expert_TA", "weight_TA", "valid_TA", "scores_TE", "log_z_T"],
  meta_fields=[],
)
@dataclasses.dataclass(frozen=True)
class Routing:
  """A router's decision for T tokens, A choices each, over E experts.

  Attributes:
    expert_TA: int32, the chosen experts, distinct within a token, best first.
    weight_TA: float32, what the expert's output is multiplied by; gradients reach the gate here.
    valid_TA: bool, whether the choice counts at all; False throughout for padding.
    scores_TE: float32, what the router scored every expert with (a softmax sums to 1).
    log_z_T: float32, logsumexp of the router's logits, for the z-loss.
  """

  expert_TA: jax.Array
  weight_TA: jax.Array
  valid_TA: jax.Array
  scores_TE: jax.Array
  log_z_T: jax.Array


@functools.partial(
  jax.tree_util.register_dataclass,
  data_fields=["counts_E", "scores_E", "tokens", "log_z_squared", "counts_BE"],
  meta_fields=[],
)
@dataclasses.dataclass(frozen=True)
class RouterSums:
  """Sums over valid tokens; they add up over microbatches and devices.

  Attributes:
    counts_E: float32, how often each expert was chosen, before any drop; no gradient.
    scores_E: float32, summed scores; differentiable.
    tokens: float32, the number of valid tokens; no gradient.
    log_z_squared: float32, summed squared logsumexp of the logits; differentiable.
    counts_BE: The counts row by row, where `Tokens.by_row` asks for them; they do not add up.
  """

  counts_E: jax.Array
  scores_E: jax.Array
  tokens: jax.Array
  log_z_squared: jax.Array
  counts_BE: jax.Array | None = None


class Router(Protocol):
  """What a router's record builds: a gate with parameters, then a pure rule on its scores."""

  def __call__(
    self, x_TD: jax.Array, tokens: Tokens, carry: Any, keys: Keys | None
  ) -> tuple[Routing, Any]:
    """Returns the routing of T = B * L tokens and the carry of the next layer."""


def sum_routing(routing: Routing, valid_T: jax.Array, rows: int | None = None) -> RouterSums:
  """Returns the sums of a routing over the tokens with `valid_T`. O(T * (A + E)).

  Args:
    routing: Of T tokens, row after row.
    valid_T: Which tokens count.
    rows: B, to count choices row by row as well.
  """
  num_experts = routing.scores_TE.shape[1]
  # An index of E lies outside and is dropped by the scatter.
  chosen_TA = jnp.where(routing.valid_TA, routing.expert_TA, num_experts)
  counts_BE = None
  if rows is None:
    counts_E = jnp.zeros(num_experts, jnp.float32).at[chosen_TA.reshape(-1)].add(1, mode="drop")
  else:
    zeros_BE = jnp.zeros((rows, num_experts), jnp.float32)
    row_B1 = jnp.arange(rows)[:, None]
    counts_BE = zeros_BE.at[row_B1, chosen_TA.reshape(rows, -1)].add(1, mode="drop")
    counts_E = jnp.sum(counts_BE, axis=0)
  return RouterSums(
    counts_E=counts_E,
    scores_E=jnp.sum(jnp.where(valid_T[:, None], routing.scores_TE, 0), axis=0),
    tokens=jnp.sum(valid_T.astype(jnp.float32)),
    log_z_squared=jnp.sum(jnp.where(valid_T, routing.log_z_T**2, 0)),
    counts_BE=counts_BE,
  )
