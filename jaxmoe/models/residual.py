"""The residual stream: what all blocks of a model read and add to."""

from __future__ import annotations

import dataclasses
from typing import Literal

import jax

from jaxmoe.core.init import Init
from jaxmoe.models.norm_layers import NORMS, LayerNorm, RMSNorm

NormKind = Literal["rms", "layer"]


@dataclasses.dataclass(frozen=True)
class ResidualStream:
  """The residual stream.

  Attributes:
    dim: D, its width.
    eps: Added to the mean square in every norm.
    norm: What reads it: RMSNorm, or LayerNorm with a bias.
    scale: What a part's output is multiplied by before it is added.
  """

  dim: int
  eps: float
  norm: NormKind = "rms"
  scale: float = 1.0

  def make_norm(self, init: Init) -> RMSNorm | LayerNorm:
    """Returns a norm over the width."""
    return NORMS[self.norm](init, self.dim, self.eps)

  def add(self, x_BLD: jax.Array, y_BLD: jax.Array) -> jax.Array:
    """Returns the stream with a part's output in it."""
    return x_BLD + (y_BLD if self.scale == 1 else y_BLD * self.scale)
