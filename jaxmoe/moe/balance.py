"""Balance losses, as functions of summed counts and scores.

Load balancing (Switch, equation 4): E * sum_i f_i p_i, with f_i the share of choices that went to
expert i and p_i the mean score; 1 at perfect balance. What matters is over which tokens f is
counted (Qiu et al. 2025, "Demons in the Detail"):

- `micro`: the tokens of one microbatch, as most code does; the mean over microbatches.
- `global`: all tokens of the step. Exact: with accumulation, a forward pass of its own counts
  first (about a third more compute), because the loss is linear in p but not in f.
- `global_running`: the microbatches so far. One pass, but early microbatches see partial counts:
  an approximation, whose error is logged.

Padding never counts, choices count before drops, and f carries no gradient.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp

from jaxmoe.core.errors import InputError
from jaxmoe.moe.routing import RouterSums

Scope = Literal["micro", "global", "global_running"]


@dataclasses.dataclass(frozen=True)
class Reference:
  """What a microbatch must know of the whole step to add its exact share of a loss.

  Attributes:
    tokens: float32, the number of valid tokens of the whole step.
    num_micro: The number of microbatches.
    counts_E: float32, the choices of the whole step, or None where no pass counted them.
    running_E: float32, the choices of the earlier microbatches of the step.
  """

  tokens: jax.Array
  num_micro: int
  counts_E: jax.Array | None
  running_E: jax.Array


@dataclasses.dataclass(frozen=True)
class LoadBalance:
  """The load-balancing loss of one MoE layer.

  Attributes:
    weight: Its factor in the training loss.
    scope: The tokens over which f is counted.
  """

  weight: float = 0.01
  scope: Scope = "global"

  def __post_init__(self) -> None:
    if self.weight < 0:
      raise InputError(f"weight must not be negative: weight={self.weight}")

  @property
  def name(self) -> str:
    """What metrics call the loss."""
    return f"load_balance_{self.scope}"

  @property
  def needs_counts(self) -> bool:
    """Whether the counts of the whole step must be known before the gradient pass."""
    return self.scope == "global"

  def loss(self, sums: RouterSums, reference: Reference) -> jax.Array:
    """Returns this microbatch's share of the loss of the step, unweighted, float32."""
    if self.scope == "micro":
      return load_balance(sums.counts_E, sums.scores_E, sums.tokens) / reference.num_micro
    counts_E = sums.counts_E + reference.running_E
    # Without a weight nobody counts first, and only the value is mended afterwards.
    known = reference.counts_E is not None or reference.num_micro == 1 or self.weight == 0
    assert known or self.scope != "global", "the exact scope needs the counts of the whole step"
    if self.scope == "global" and reference.counts_E is not None:
      counts_E = reference.counts_E
    return load_balance(counts_E, sums.scores_E, reference.tokens)


@dataclasses.dataclass(frozen=True)
class RouterZ:
  """The router z-loss: mean squared logsumexp of the logits (ST-MoE, equation 5)."""

  weight: float = 1e-3

  def __post_init__(self) -> None:
    if self.weight < 0:
      raise InputError(f"weight must not be negative: weight={self.weight}")

  @property
  def name(self) -> str:
    """What metrics call the loss."""
    return "router_z"

  @property
  def needs_counts(self) -> bool:
    """Whether the counts of the whole step must be known before the gradient pass."""
    return False

  def loss(self, sums: RouterSums, reference: Reference) -> jax.Array:
    """Returns this microbatch's share of the loss of the step, unweighted, float32."""
    return sums.log_z_squared / jnp.maximum(reference.tokens, 1)


BALANCE = {
  "load_balance": (LoadBalance, LoadBalance()),
  "router_z": (RouterZ, RouterZ()),
}


def load_balance(counts_E: jax.Array, scores_E: jax.Array, tokens: jax.Array) -> jax.Array:
  """Returns E * sum_i f_i p_i from sums; 0 where nothing was routed."""
  share_E = counts_E / jnp.maximum(jnp.sum(counts_E), 1)
  mean_E = scores_E / jnp.maximum(tokens, 1)
  return counts_E.shape[0] * jnp.sum(jax.lax.stop_gradient(share_E) * mean_E)
