"""Norms as modules."""

from __future__ import annotations

from typing import Any

import jax
from flax import nnx

from jaxmoe.core.parameters import Init
from jaxmoe.ops.norm import layer_norm, rms_norm


class RMSNorm(nnx.Module):
  """Divides by the root mean square and multiplies by a learnt scale (Zhang, Sennrich 2019)."""

  def __init__(self, init: Init, dim: int, eps: float, dim_name: str = "embed"):
    self.eps = eps
    self.scale = init.ones((dim,), (dim_name,))

  def __call__(self, x: jax.Array) -> jax.Array:
    """Returns x normalised over its last dim, in x.dtype."""
    return rms_norm(x, self.scale.get_value(), self.eps)


class LayerNorm(nnx.Module):
  """Takes the mean away, divides by the deviation; a learnt scale and bias (Ba et al. 2016)."""

  def __init__(self, init: Init, dim: int, eps: float, dim_name: str = "embed"):
    self.eps = eps
    self.scale = init.ones((dim,), (dim_name,))
    self.bias = init.zeros((dim,), (dim_name,))

  def __call__(self, x: jax.Array) -> jax.Array:
    """Returns x normalised over its last dim, in x.dtype."""
    return layer_norm(x, self.scale.get_value(), self.bias.get_value(), self.eps)


NORMS: dict[str, Any] = {"rms": RMSNorm, "layer": LayerNorm}
