"""Routing: a router's decision for each token, and the sums all else is computed from."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping

import jax
import jax.numpy as jnp

from jaxmoe.ops.soft_tree import TreeSums


@functools.partial(
  jax.tree_util.register_dataclass,
  data_fields=[
    "expert_TA",
    "weight_TA",
    "valid_TA",
    "scores_TE",
    "log_z_T",
    "load_TE",
    "margins_TE",
    "adaptive_coefficient_T",
    "domain_sums",
    "values",
  ],
  meta_fields=["among", "active", "sum_to_1"],
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
    load_TE: float32, how probably each expert is chosen under the router's noise, differentiable;
      None from a router without noise.
    margins_TE: float32, what the buffers of the router are updated from; None for most.
    adaptive_coefficient_T: float32, what adaptive balance losses are multiplied by, the same for
      all tokens;
      None from a router that keeps no such factor.
    domain_sums: What each domain sees of a gate that is a tree, where `Tokens.compare` asks.
    values: What weights of the experts ask of each token, (T, ...) by name.
    among: Over how many experts the choices are spread: more than E in a part of a layer, None
      for E. Buffers are sized by it.
    active: How many choices of a token count in the mean; None for A. Buffers are sized by it.
    sum_to_1: Whether scores are shares as they are, as those of a softmax.
  """

  expert_TA: jax.Array
  weight_TA: jax.Array
  valid_TA: jax.Array
  scores_TE: jax.Array
  log_z_T: jax.Array
  load_TE: jax.Array | None = None
  margins_TE: jax.Array | None = None
  adaptive_coefficient_T: jax.Array | None = None
  domain_sums: TreeSums | None = None
  values: Mapping[str, jax.Array] = dataclasses.field(default_factory=dict)
  among: int | None = None
  active: float | None = None
  sum_to_1: bool = True

  @property
  def num_among(self) -> int:
    """Over how many experts the choices are spread."""
    return self.scores_TE.shape[1] if self.among is None else self.among

  @property
  def num_active(self) -> float:
    """How many choices of a token count in the mean."""
    return self.expert_TA.shape[1] if self.active is None else self.active

  def part(self, start: int, stop: int) -> Routing:
    """Returns the choices of experts start..stop-1, numbered from 0; others are not valid."""
    inside_TA = self.valid_TA & (self.expert_TA >= start) & (self.expert_TA < stop)
    return dataclasses.replace(
      self,
      expert_TA=jnp.where(inside_TA, self.expert_TA - start, 0),
      valid_TA=inside_TA,
      scores_TE=self.scores_TE[:, start:stop],
      among=self.num_among,
    )


@functools.partial(
  jax.tree_util.register_dataclass,
  data_fields=[
    "counts_E",
    "scores_E",
    "tokens",
    "log_z_squared",
    "entropy",
    "load_E",
    "adaptive_coefficient",
    "shares_E",
  ],
  meta_fields=[],
)
@dataclasses.dataclass(frozen=True)
class RouterSums:
  """Sums over valid tokens; they add up over rows, microbatches and devices.

  Attributes:
    counts_E: float32, how often each expert was chosen, before any drop; no gradient.
    scores_E: float32, summed scores; differentiable.
    tokens: float32, the number of valid tokens; no gradient.
    log_z_squared: float32, summed squared logsumexp of the logits; differentiable.
    entropy: float32, summed entropy of each token's scores over their sum, in nats;
      differentiable.
    load_E: float32, how often each expert is chosen in expectation over the router's noise,
      differentiable; the counts where there is no noise.
    adaptive_coefficient: float32, the router's factor of adaptive balance losses times `tokens`; no
      gradient.
      None from a router that keeps no such factor.
    shares_E: float32, summed scores of which each token's are divided by their sum over all
      experts; differentiable. None where they are that already (`Routing.sum_to_1`).
  """

  counts_E: jax.Array
  scores_E: jax.Array
  tokens: jax.Array
  log_z_squared: jax.Array
  entropy: jax.Array
  load_E: jax.Array
  adaptive_coefficient: jax.Array | None = None
  shares_E: jax.Array | None = None

  @property
  def summed_shares_E(self) -> jax.Array:
    """Each expert's summed shares of tokens' scores, whatever function made these."""
    return self.scores_E if self.shares_E is None else self.shares_E


@jax.named_scope("sums")
def sum_routing(routing: Routing, valid_T: jax.Array) -> RouterSums:
  """Returns the sums of a routing over the tokens with `valid_T`. O(T * (A + E))."""
  per_sequence = sum_rows(routing, valid_T, 1)
  return jax.tree.map(lambda leaf: leaf[0], per_sequence)


def sum_rows(routing: Routing, valid_T: jax.Array, rows: int) -> RouterSums:
  """Returns the sums of each of `rows` equal parts of T tokens, in dim 0 of every leaf."""
  num_experts = routing.scores_TE.shape[1]
  # An index of E lies outside and is dropped by the scatter.
  chosen_TA = jnp.where(routing.valid_TA, routing.expert_TA, num_experts)
  row_B1 = jnp.arange(rows)[:, None]
  counts_BE = jnp.zeros((rows, num_experts), jnp.float32)
  counts_BE = counts_BE.at[row_B1, chosen_TA.reshape(rows, -1)].add(1, mode="drop")

  def total(leaf: jax.Array) -> jax.Array:
    valid = valid_T.reshape(-1, *[1] * (leaf.ndim - 1))
    return jnp.sum(jnp.where(valid, leaf, 0).reshape(rows, -1, *leaf.shape[1:]), axis=1)

  tokens_B = total(jnp.ones(valid_T.shape, jnp.float32))
  return RouterSums(
    counts_E=counts_BE,
    scores_E=total(routing.scores_TE),
    tokens=tokens_B,
    log_z_squared=total(routing.log_z_T**2),
    entropy=total(entropy_of(routing.scores_TE)),
    load_E=counts_BE if routing.load_TE is None else total(routing.load_TE),
    adaptive_coefficient=None
    if routing.adaptive_coefficient_T is None
    else total(routing.adaptive_coefficient_T),
    shares_E=None if routing.sum_to_1 else total(shares_of(routing.scores_TE)),
  )


def shares_of(scores_TE: jax.Array) -> jax.Array:
  """Returns (T, E) float32, each token's scores over their sum; zeros where all are 0."""
  # Shares know no scale, so the best score may be held still as one: the sum lies between 1 and E,
  # and neither it nor its square, by which gradients are divided, leaves float32.
  best_T1 = jax.lax.stop_gradient(jnp.max(scores_TE, axis=1, keepdims=True))
  some_T1 = best_T1 > 1e-35
  scaled_TE = jnp.where(some_T1, scores_TE / jnp.where(some_T1, best_T1, 1), 0)
  return scaled_TE / jnp.where(some_T1, jnp.sum(scaled_TE, axis=1, keepdims=True), 1)


def entropy_of(scores_TE: jax.Array) -> jax.Array:
  """Returns (T,) float32, the entropy in nats of each token's scores over their sum."""
  share_TE = scores_TE / jnp.maximum(jnp.sum(scores_TE, axis=1, keepdims=True), 1e-20)
  # The floor keeps the gradient finite where a share is 0.
  return -jnp.sum(share_TE * jnp.log(jnp.maximum(share_TE, 1e-20)), axis=1)
