"""The load-balancing loss E * sum_i f_i p_i and its kin for experts of several kinds.

f_i is the share of choices that went to expert i, p_i its mean share of a token's scores. Scores
that are no shares, such as sigmoids, are divided by their sum over all experts (DeepSeek-V3,
arXiv:2412.19437, equations 17 to 20), or the loss would push down all of them. Papers that divide
choices by tokens have an f, and so a loss, A times as large.
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
class LoadBalance(AuxLoss):
  """The load-balancing loss (Switch, Fedus et al. 2021, equation 4); 1 at perfect balance."""

  kind: ClassVar[str] = "load_balance"

  def loss(self, sums: RouterSums, layer: Any) -> jax.Array:
    """Returns E * sum_i f_i p_i."""
    del layer
    share_E = shares(sums)
    mean_E = sums.summed_shares_E / jnp.maximum(sums.tokens, 1)
    return share_E.shape[0] * jnp.sum(share_E * mean_E)


@dataclasses.dataclass(frozen=True)
class NullAveraged(AuxLoss):
  """Load balance that leaves idle experts free among themselves (AdaMoE, equation 7).

  Null experts are interchangeable: the f of each is the mean over all of them.
  """

  kind: ClassVar[str] = "null_averaged"

  def check(self, layer: Any) -> None:
    """Refuses a layer without idle experts."""
    _needs_zero_compute(self, layer)

  def loss(self, sums: RouterSums, layer: Any) -> jax.Array:
    """Returns E * sum_i f~_i p_i."""
    share_E = shares(sums)
    num_experts = share_E.shape[0]
    idle_E = is_zero_compute(layer)
    mean = jnp.sum(share_E * idle_E) / jnp.sum(idle_E)
    averaged_E = jnp.where(idle_E, mean, share_E)
    return num_experts * jnp.sum(averaged_E * sums.summed_shares_E) / jnp.maximum(sums.tokens, 1)


@dataclasses.dataclass(frozen=True)
class Heterogeneous(AuxLoss):
  """Load balance in which idle experts weigh less (MoE++, Jin et al. 2024, equation 9).

  At its optimum an idle expert is chosen 1 / `idle` times as often as one that computes.

  Attributes:
    idle: tau, the weight of an idle expert beside 1.
  """

  idle: float = 0.75
  kind: ClassVar[str] = "heterogeneous"

  def __post_init__(self) -> None:
    super().__post_init__()
    if self.idle <= 0:
      raise InputError(f"idle must be above 0: idle={self.idle}")

  def check(self, layer: Any) -> None:
    """Refuses a layer without idle experts."""
    _needs_zero_compute(self, layer)

  def loss(self, sums: RouterSums, layer: Any) -> jax.Array:
    """Returns E * sum_i eta_i f_i p_i."""
    eta_E = jnp.where(is_zero_compute(layer), self.idle, 1.0)
    mean_E = sums.summed_shares_E / jnp.maximum(sums.tokens, 1)
    return eta_E.shape[0] * jnp.sum(eta_E * shares(sums) * mean_E)


def is_zero_compute(layer: Any) -> jax.Array:
  """Returns (E,) bool: the experts that compute nothing or next to nothing, the last ones."""
  first = layer.num_experts - layer.experts.num_zero_compute(layer.num_experts)
  return jnp.arange(layer.num_experts) >= first


def _needs_zero_compute(aux_loss: AuxLoss, layer: Any) -> None:
  if not layer.experts.num_zero_compute(layer.num_experts):
    raise InputError(
      f"{aux_loss.kind} is about experts that compute nothing, and {type(layer.experts).__name__} "
      "has none; use load_balance, or experts with idle ones"
    )


def shares(sums: RouterSums) -> jax.Array:
  """Returns (E,) float32, the share of choices that went to each expert; no gradient."""
  counts_E = jax.lax.stop_gradient(sums.counts_E)
  return counts_E / jnp.maximum(jnp.sum(counts_E), 1)
