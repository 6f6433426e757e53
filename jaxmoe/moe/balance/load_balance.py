"""The load-balancing loss E * sum_i f_i p_i (Switch, Fedus et al. 2021, equation 4).

f_i is the share of choices that went to expert i, p_i the mean score; 1 at perfect balance.
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from jaxmoe.moe.balance.term import Term
from jaxmoe.moe.routing import RouterSums


@dataclasses.dataclass(frozen=True)
class LoadBalance(Term):
  """The load-balancing loss of one MoE layer; linear in scores, so no scores travel."""

  kind: ClassVar[str] = "load_balance"

  def loss(self, sums: RouterSums, layer: Any) -> jax.Array:
    """Returns E * sum_i f_i p_i."""
    del layer
    share_E = shares(sums)
    mean_E = sums.scores_E / jnp.maximum(sums.tokens, 1)
    return share_E.shape[0] * jnp.sum(share_E * mean_E)


def shares(sums: RouterSums) -> jax.Array:
  """Returns (E,) float32, the share of choices that went to each expert; no gradient."""
  counts_E = jax.lax.stop_gradient(sums.counts_E)
  return counts_E / jnp.maximum(jnp.sum(counts_E), 1)
