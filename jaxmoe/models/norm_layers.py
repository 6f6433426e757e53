"""Norms as modules: RMSNorm, LayerNorm, and RMSNorm over all heads."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jaxmoe.core.init import Init
from jaxmoe.core.layout import Dims
from jaxmoe.core.parallel_context import ParallelContext
from jaxmoe.ops.norm import layer_norm, rms_norm


class RMSNorm(nnx.Module):
  """Divides by the root mean square and multiplies by a learnt scale (Zhang, Sennrich 2019)."""

  def __init__(self, init: Init, dim: int, eps: float, dim_name: str = "embed"):
    self.eps = eps
    self.scale = init.ones((dim,), (dim_name,))

  def __call__(self, x: jax.Array) -> jax.Array:
    """Returns x normalised over its last dim, in x.dtype."""
    return rms_norm(x, self.scale.get_value(), self.eps)


class HeadsNorm(nnx.Module):
  """RMSNorm over all heads of a token, which may lie on several devices of a tensor group.

  Where devices hold copies of key heads every head has as many, and the mean is the same.
  """

  def __init__(
    self, init: Init, shape: tuple[int, int], dims: Dims, eps: float, parallel: ParallelContext
  ):
    self.eps, self.parallel = eps, parallel
    self.scale = init.ones(shape, dims)

  def __call__(self, x_BLMH: jax.Array) -> jax.Array:
    """Returns x normalised over each N heads that follow one another, in x.dtype."""
    scale_NH = self.scale.get_value()
    x_BLANH = x_BLMH.reshape(*x_BLMH.shape[:2], -1, *scale_NH.shape)
    normed_BLANH = rms_norm(x_BLANH, scale_NH, self.eps, self._mean)
    return normed_BLANH.reshape(x_BLMH.shape)

  def _mean(self, x_BLANH: jax.Array) -> jax.Array:
    total_BLA11 = self.parallel.psum_tensor(jnp.sum(x_BLANH, axis=(-2, -1), keepdims=True))
    return total_BLA11 / (self.scale.size * self.parallel.tensor_size)


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
