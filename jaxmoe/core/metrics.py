"""Means as (sum, weight), so that they add up over tokens, microbatches, devices and processes.

A mean of means is wrong as soon as the parts differ in size; sums and weights are not.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp


@functools.partial(
  jax.tree_util.register_dataclass, data_fields=["sum", "weight"], meta_fields=[]
)
@dataclasses.dataclass(frozen=True)
class Mean:
  """A weighted mean in two numbers. `a + b` is the mean over both sets; 0 / 0 counts as 0."""

  sum: jax.Array
  weight: jax.Array

  @classmethod
  def zero(cls) -> Mean:
    """Returns the mean of nothing, the neutral element of `+`."""
    return cls(jnp.zeros((), jnp.float32), jnp.zeros((), jnp.float32))

  @classmethod
  def of(cls, values: jax.Array, weights: jax.Array) -> Mean:
    """Returns the mean of `values`; `weights` has the same shape. Sums are taken in float32."""
    weights = weights.astype(jnp.float32)
    # A value of weight 0 may be inf or NaN (padding): it must not poison the sum.
    used = jnp.where(weights == 0, 0, values.astype(jnp.float32))
    return cls(jnp.sum(used * weights), jnp.sum(weights))

  def __add__(self, other: Mean) -> Mean:
    return Mean(self.sum + other.sum, self.weight + other.weight)

  @property
  def value(self) -> jax.Array:
    """The mean itself, 0 where nothing was counted."""
    return jnp.where(self.weight == 0, 0.0, self.sum / jnp.where(self.weight == 0, 1, self.weight))
