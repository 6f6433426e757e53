"""Latency-aware balance: slow experts get fewer tokens (ShiftAddViT, You et al. 2023).

SCV(alpha S) + SCV(alpha Q), with SCV the squared coefficient of variation, S the summed scores of
an expert (importance), Q its expected choices under the router's noise (smooth load) and alpha its
share of all latencies. Both vanish where S and Q are inversely proportional to latency. The
importance alone is blind to hard choices: a router without noise has a load without gradient.
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from jaxmoe.core.errors import InputError
from jaxmoe.moe.balance.aux_loss import AuxLoss
from jaxmoe.moe.routing import RouterSums


@dataclasses.dataclass(frozen=True)
class LatencyAware(AuxLoss):
  """Importance and load in inverse proportion to latency.

  Attributes:
    latency: What a row costs at each expert, in any unit, measured at the batch size it will be
      used at (`jaxmoe bench latency`); a constant, so that all devices agree. Empty: all alike.
  """

  latency: tuple[float, ...] = ()
  kind: ClassVar[str] = "latency_aware"

  def __post_init__(self) -> None:
    super().__post_init__()
    if any(cost <= 0 for cost in self.latency):
      raise InputError(f"latency must be above 0 for every expert: latency={self.latency}")

  def check(self, layer: Any) -> None:
    """Refuses another number of latencies than of experts."""
    if self.latency and len(self.latency) != layer.num_experts:
      raise InputError(
        f"latency needs one number an expert: latency has {len(self.latency)}, "
        f"num_experts={layer.num_experts}"
      )

  def loss(self, sums: RouterSums, layer: Any) -> jax.Array:
    """Returns the sum of both squared coefficients of variation."""
    alpha_E = jnp.asarray(self.latency or (1.0,) * layer.num_experts, jnp.float32)
    alpha_E = alpha_E / jnp.sum(alpha_E)
    return variation_squared(alpha_E * sums.scores_E) + variation_squared(alpha_E * sums.load_E)


def variation_squared(values_E: jax.Array) -> jax.Array:
  """Returns the variance over the squared mean; 0 where all are 0."""
  mean = jnp.mean(values_E)
  return jnp.mean((values_E - mean) ** 2) / jnp.maximum(mean**2, 1e-20)
