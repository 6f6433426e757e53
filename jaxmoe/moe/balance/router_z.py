"""The router z-loss: mean squared logsumexp of the logits (ST-MoE, Zoph et al. 2022, eq. 5)."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from jaxmoe.moe.balance.aux_loss import AuxLoss
from jaxmoe.moe.routing import RouterSums


@dataclasses.dataclass(frozen=True)
class RouterZ(AuxLoss):
  """The z-loss, a mean over tokens: every scope but `sequence` and `micro` is the same."""

  weight: float = 1e-3
  kind: ClassVar[str] = "router_z"
  additive: ClassVar[bool] = True

  @property
  def name(self) -> str:
    """What metrics call the loss."""
    return self.kind if self.scope == "global" else f"{self.kind}_{self.scope}"

  def loss(self, sums: RouterSums, layer: Any) -> jax.Array:
    """Returns the mean squared logsumexp."""
    del layer
    return sums.log_z_squared / jnp.maximum(sums.tokens, 1)
