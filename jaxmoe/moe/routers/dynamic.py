"""Dynamic top-k: a token decides how many experts it goes to, `num_active` at most."""

from __future__ import annotations

import dataclasses
from typing import ClassVar, Literal

import jax
import jax.numpy as jnp

from jaxmoe.core.errors import InputError
from jaxmoe.moe.routers.router import Router, RouterInputs, Selection


@dataclasses.dataclass(frozen=True)
class Dynamic(Router):
  """The base: of the A best, those that `keep` keeps; the others weigh nothing."""

  varies: ClassVar[bool] = True

  def select(self, inputs: RouterInputs) -> Selection:
    """Routes each token by itself."""
    expert_TA = inputs.top_k(inputs.scores_TE, inputs.num_active)
    kept_TA = self.keep(jax.lax.stop_gradient(inputs.scores_TE), expert_TA)
    return Selection(expert_TA, self.combine_weights(inputs.scores_TE, expert_TA, kept_TA), kept_TA)

  def keep(self, scores_TE: jax.Array, expert_TA: jax.Array) -> jax.Array:
    """Returns (T, A) bool: which choices count."""
    raise NotImplementedError


@dataclasses.dataclass(frozen=True)
class TopP(Dynamic):
  """The fewest best experts whose shares of a token's scores sum to p or more.

  Huang et al. 2024, arXiv:2403.07652, equations 4 to 6: a token that the router is unsure of goes
  to more experts. Theirs knows no most; where the A best have less than p, it is these.

  Attributes:
    p: The least sum of shares (they: 0.4 of 16 experts).
  """

  normalize: bool = False
  p: float = 0.4

  def __post_init__(self) -> None:
    super().__post_init__()
    if not 0 < self.p <= 1:
      raise InputError(f"p must lie in (0, 1]: p={self.p}")

  def keep(self, scores_TE: jax.Array, expert_TA: jax.Array) -> jax.Array:
    """Keeps the best, and others as long as those before them have less than p."""
    whole_T1 = jnp.maximum(jnp.sum(scores_TE, axis=1, keepdims=True), 1e-20)
    share_TA = jnp.take_along_axis(scores_TE, expert_TA, axis=1) / whole_T1
    before_TA = jnp.pad(jnp.cumsum(share_TA, axis=1)[:, :-1], ((0, 0), (1, 0)))
    # Rounding may bring a sum to 1 before its end.
    return (before_TA < self.p) | (self.p == 1)


@dataclasses.dataclass(frozen=True)
class Threshold(Dynamic):
  """The experts whose scores reach a threshold, each for itself; the best one always.

  Top-any gating (DynMoE, Guo et al. 2024, arXiv:2405.14297, section 3.1) with one threshold that
  is set, not learnt; like theirs in evaluation it leaves no token without an expert.

  Attributes:
    threshold: The least score of an expert beside the best.
  """

  score: Literal["softmax", "sigmoid", "sqrt_softplus", "relu"] = "sigmoid"
  threshold: float = 0.5

  def __post_init__(self) -> None:
    super().__post_init__()
    if self.threshold <= 0:
      raise InputError(f"threshold must be above 0, or all pass it: threshold={self.threshold}")

  def keep(self, scores_TE: jax.Array, expert_TA: jax.Array) -> jax.Array:
    """Keeps the best, and others that reach the threshold."""
    reaches_TA = jnp.take_along_axis(scores_TE, expert_TA, axis=1) >= self.threshold
    return reaches_TA.at[:, 0].set(True)
