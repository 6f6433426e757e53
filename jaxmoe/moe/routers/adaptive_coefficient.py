"""Routers that steer their balance losses: a factor grows while a measure lies above its target.

ReMoE (Wang et al. 2024, arXiv:2412.14711, section 3.2): after a step the factor is times
rate^sign(measure - target). It is a buffer of the router, by which losses that are `adaptive` are
multiplied; each layer has its own, where the paper has one for all.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from jaxmoe.core.errors import InputError
from jaxmoe.moe.routers.dynamic import Dynamic
from jaxmoe.moe.routers.router import Buffers, Router, RouterStatistics
from jaxmoe.moe.routers.topk import TopK
from jaxmoe.moe.routing import RouterSums


@dataclasses.dataclass(frozen=True)
class Adaptive(Router):
  """The base; a rule says by `measure` what is held down.

  Attributes:
    target: What the measure of a step should be.
    rate: What the factor is multiplied or divided by each step (alpha; ReMoE: 1.2).
    first: The factor of the first step (lambda_0; ReMoE: 1e-8).
  """

  target: float = 1.0
  rate: float = 1.2
  first: float = 1e-8

  def __post_init__(self) -> None:
    super().__post_init__()
    if self.rate < 1 or self.first <= 0 or self.target <= 0:
      raise InputError(
        "rate must be at least 1, first and target above 0: "
        f"rate={self.rate}, first={self.first}, target={self.target}"
      )

  def buffers(self, num_experts: int) -> dict[str, np.ndarray]:
    """Returns the first factor."""
    del num_experts
    return {"pressure": np.full(1, self.first, np.float32)}

  def update(
    self, buffers: Buffers, sums: RouterSums, statistics: RouterStatistics | None
  ) -> Buffers:
    """Returns the factor after a step; the same if it had no token."""
    del statistics
    sign = jnp.where(sums.tokens > 0, jnp.sign(self.measure(sums) - self.target), 0)
    return {"pressure": buffers["pressure"] * self.rate**sign}

  def measure(self, sums: RouterSums) -> jax.Array:
    """Returns a number of all tokens of a step."""
    raise NotImplementedError


@dataclasses.dataclass(frozen=True)
class ReLU(Adaptive, Dynamic):
  """The experts whose score is above 0, which is their weight; a token may go to none.

  ReMoE, equations 5 to 9. Weights have no jumps: an expert comes and goes at weight 0, unless a
  token has more than num_active of them, which the paper lets it have (num_active = E). The loss
  `sparsity` brings the mean number of a token's experts to `target`, above which nothing else
  keeps it down.
  """

  score: Literal["softmax", "sigmoid", "sqrt_softplus", "relu"] = "relu"
  normalize: bool = False

  def check(self, num_experts: int, num_active: int) -> None:
    """Refuses a target that the number of experts cannot exceed."""
    super().check(num_experts, num_active)
    if self.target >= num_active:
      raise InputError(
        "target, a token's mean number of experts, must lie below num_active, the most: "
        f"target={self.target}, num_active={num_active}; raise num_active"
      )

  def keep(self, scores_TE: jax.Array, expert_TA: jax.Array) -> jax.Array:
    """Keeps what is above 0."""
    return jnp.take_along_axis(scores_TE, expert_TA, axis=1) > 0

  def measure(self, sums: RouterSums) -> jax.Array:
    """Returns the mean number of a token's experts."""
    return jnp.sum(sums.counts_E) / jnp.maximum(sums.tokens, 1)


@dataclasses.dataclass(frozen=True)
class AdaptiveTopK(Adaptive, TopK):
  """Top-k whose balance losses press harder while the fullest expert has more than its target.

  Attributes:
    target: The load of the fullest expert over the mean load.
  """

  target: float = 1.2
  first: float = 1e-2

  def measure(self, sums: RouterSums) -> jax.Array:
    """Returns the largest load over the mean load, before drops."""
    return jnp.max(sums.counts_E) / jnp.maximum(jnp.mean(sums.counts_E), 1e-20)
