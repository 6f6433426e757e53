"""The L1 norm of scores, which makes a ReLU router sparse (ReMoE, Wang et al. 2024)."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from jaxmoe.moe.balance.aux_loss import AuxLoss
from jaxmoe.moe.routing import RouterSums


@dataclasses.dataclass(frozen=True)
class Sparsity(AuxLoss):
  """A token's mean sum of scores, those of loaded experts more (arXiv:2412.14711, eq. 7 and 10).

  Its weight is the router's factor, for which constants of the paper (k, the number of layers)
  make no difference.

  Attributes:
    by_load: Whether an expert's scores are multiplied by its load, 1 where all have A / E choices
      a token; otherwise sparsity says nothing of balance.
  """

  weight: float = 1.0
  adaptive: bool = True
  by_load: bool = True
  kind: ClassVar[str] = "sparsity"

  def loss(self, sums: RouterSums, layer: Any) -> jax.Array:
    """Returns sum_i f_i p_i, f of the counts and without a gradient."""
    tokens = jnp.maximum(sums.tokens, 1)
    load_E = jnp.ones_like(sums.counts_E)
    if self.by_load:
      rows = tokens * layer.num_active / load_E.shape[0]
      load_E = jax.lax.stop_gradient(sums.counts_E) / rows
    return jnp.sum(load_E * sums.scores_E) / tokens
