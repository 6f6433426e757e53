"""Parameter initialisation: name, shape, logical dims and fan-in of a weight, in one line.

Products cast a weight to the dtype of the activation (`core/weight_formats.py`).
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jaxmoe.core.layout import Dims
from jaxmoe.core.rng import Keys


@dataclasses.dataclass(frozen=True)
class Init:
  """Makes the parameters of one module; `init / 'attention'` is the namespace of a child.

  Attributes:
    keys: Where the draws come from.
    dtype: Of the weights.
    num_layers: How many blocks add to the residual stream.
  """

  keys: Keys
  dtype: Any = jnp.float32
  num_layers: int = 1

  def __truediv__(self, name: str) -> Init:
    return dataclasses.replace(self, keys=self.keys / name)

  def at(self, layer: jax.Array | int) -> Init:
    """Returns the namespace of one layer of a stack; `layer` may be traced."""
    return dataclasses.replace(self, keys=self.keys.at(layer))

  def weight(self, name: str, shape: tuple[int, ...], dims: Dims, fan_in: int) -> nnx.Param:
    """Returns a weight drawn from a normal cut at two deviations, variance 1 / fan_in."""
    # 0.8796 is the standard deviation of a unit normal cut at two deviations.
    scale = 1 / (math.sqrt(fan_in) * 0.87962566103423978)
    drawn = jax.random.truncated_normal(self.keys(name), -2, 2, shape, jnp.float32) * scale
    return nnx.Param(drawn.astype(self.dtype), dims=dims)

  def residual(self, name: str, shape: tuple[int, ...], dims: Dims, fan_in: int) -> nnx.Param:
    """Returns a weight whose product is added to the residual stream.

    Each block adds two such products; dividing by the root of their number keeps the variance of
    the stream's end independent of depth (GPT-2, Radford et al. 2019, section 2.3).
    """
    return self.weight(name, shape, dims, fan_in * 2 * self.num_layers)

  def ones(self, shape: tuple[int, ...], dims: Dims) -> nnx.Param:
    """Returns a weight of ones, such as the scale of a norm."""
    return nnx.Param(jnp.ones(shape, self.dtype), dims=dims)

  def zeros(self, shape: tuple[int, ...], dims: Dims) -> nnx.Param:
    """Returns a weight of zeros, such as a bias."""
    return nnx.Param(jnp.zeros(shape, self.dtype), dims=dims)
