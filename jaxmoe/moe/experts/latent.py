"""Experts in a smaller space: one projection down before dispatch, one up after the combine.

LatentMoE (Elango et al. 2026, arXiv:2601.18089): rows that move and experts' matrices are D / K
times as small, so that there can be as many more experts, and more of them a token, for the same
traffic and compute. The router and the shared expert see all of x.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax

from jaxmoe.core.config_io import choice
from jaxmoe.core.errors import InputError
from jaxmoe.core.init import Init
from jaxmoe.core.weight_formats import dot
from jaxmoe.moe.experts.family import ExpertFamily, ExpertGroup, Experts
from jaxmoe.moe.experts.homogeneous import NETWORKS
from jaxmoe.moe.experts.swiglu import SwiGLU


@dataclasses.dataclass(frozen=True)
class Latent(Experts):
  """A network's experts over K numbers a token.

  Attributes:
    network: What experts compute.
    dim: K, the width of what is dispatched.
  """

  network: Any = choice(NETWORKS, SwiGLU(mlp_dim=128))
  dim: int = 64

  def __post_init__(self) -> None:
    if self.dim < 1:
      raise InputError(f"dim must be at least 1: dim={self.dim}")

  def expert_params(self, dim: int, num_experts: int) -> tuple[int, ...]:
    """Returns those of the network in the smaller space."""
    return self.network.expert_params(self.dim, num_experts)

  def shared_params(self, dim: int) -> int:
    """Returns those of the two projections."""
    return 2 * dim * self.dim

  def build(self, init: Init, dim: int, num_experts: int) -> LatentExperts:
    """Returns the module with the weights of all experts and of the projections."""
    return LatentExperts(self, init, dim, num_experts)


class LatentExperts(ExpertFamily):
  """The projections and the weights of the experts between them."""

  def __init__(self, config: Latent, init: Init, dim: int, num_experts: int):
    small = config.dim
    self.down = init.weight("down", (dim, small), ("embed", "latent"), fan_in=dim)
    self.up = init.weight("up", (small, dim), ("latent", "embed"), fan_in=small)
    self.network = config.network.build(init / "network", small, num_experts)

  def groups(self, num_experts: int) -> tuple[ExpertGroup, ...]:
    """Returns the experts of the network."""
    return (ExpertGroup(0, num_experts, self.network),)

  def project_in(self, x_TD: jax.Array) -> jax.Array:
    """Returns (T, K)."""
    return dot(self.down.get_value(), x_TD, "td,dk->tk")

  def project_out(self, y_TD: jax.Array) -> jax.Array:
    """Returns (T, D) of (T, K)."""
    return dot(self.up.get_value(), y_TD, "tk,kd->td")
