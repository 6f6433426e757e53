"""Parameter initialisation: name, shape, logical dims and fan-in of a weight, in one line.

Products cast a weight to the dtype of the activation (`core/weight_formats.py`).
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxmoe.core.first_values import Declared, first_value
from jaxmoe.core.layout import Dims
from jaxmoe.core.rng import Keys


@dataclasses.dataclass(frozen=True)
class Init:
  """Makes the parameters of one module; `init / 'attention'` is the namespace of a child.

  Attributes:
    keys: Where the draws come from.
    dtype: Of the weights.
    num_layers: How many blocks add to the residual stream.
    declares: Whether nothing is made, and a `Declared` stands in the place of each value.
  """

  keys: Keys
  dtype: Any = jnp.float32
  num_layers: int = 1
  declares: bool = False

  @classmethod
  def declaring(cls, dtype: Any = jnp.float32, num_layers: int = 1) -> Init:
    """Returns what declares parameters and makes none: it needs no key."""
    nowhere: Any = None
    return cls(Keys(nowhere), dtype, num_layers, declares=True)

  def __truediv__(self, name: str) -> Init:
    return dataclasses.replace(self, keys=self.keys / name)

  def at(self, layer: jax.Array | int) -> Init:
    """Returns the namespace of one layer of a stack; `layer` may be traced."""
    return dataclasses.replace(self, keys=self.keys.at(layer))

  def weight(self, name: str, shape: tuple[int, ...], dims: Dims, fan_in: int) -> nnx.Param:
    """Returns a weight drawn from a normal cut at two deviations, variance 1 / fan_in."""
    # 0.8796 is the standard deviation of a unit normal cut at two deviations.
    scale = 1 / (math.sqrt(fan_in) * 0.87962566103423978)
    return self._param(Declared(shape, self.dtype, scale, (self.keys / name).path), dims)

  def residual(self, name: str, shape: tuple[int, ...], dims: Dims, fan_in: int) -> nnx.Param:
    """Returns a weight whose product is added to the residual stream.

    Each block adds two such products; dividing by the root of their number keeps the variance of
    the stream's end independent of depth (GPT-2, Radford et al. 2019, section 2.3).
    """
    return self.weight(name, shape, dims, fan_in * 2 * self.num_layers)

  def ones(self, shape: tuple[int, ...], dims: Dims) -> nnx.Param:
    """Returns a weight of ones, such as the scale of a norm."""
    return self.full(shape, 1.0, dims)

  def zeros(self, shape: tuple[int, ...], dims: Dims) -> nnx.Param:
    """Returns a weight of zeros, such as a bias."""
    return self.full(shape, 0.0, dims)

  def full(self, shape: tuple[int, ...], value: float, dims: Dims) -> nnx.Param:
    """Returns a weight that is `value` everywhere."""
    return self._param(Declared(shape, self.dtype, value), dims)

  def buffer(self, value: np.ndarray) -> nnx.Param:
    """Returns what is no weight and begins as `value`, in its own dtype."""
    return self._param(Declared(value.shape, value.dtype, value), (None,) * value.ndim)

  def _param(self, declared: Declared, dims: Dims) -> nnx.Param:
    if self.declares:
      return nnx.Param(declared, dims=dims)
    return nnx.Param(first_value(Keys(self.keys.root), declared), dims=dims)
