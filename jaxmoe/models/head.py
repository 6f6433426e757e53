"""The projection to logits."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
from flax import nnx

from jaxmoe.core.init import Init
from jaxmoe.core.weight_formats import dot


class Head(nnx.Module):
  """The weight of an untied model, and a bias where it has one."""

  def __init__(self, init: Init, vocab_size: int, dim: int, tied: bool, bias: bool):
    shape, dims = (dim, vocab_size), ("embed", "vocab")
    self.weight = None if tied else init.weight("weight", shape, dims, fan_in=dim)
    self.bias = init.zeros((vocab_size,), ("vocab",)) if bias else None


@functools.partial(
  jax.tree_util.register_dataclass, data_fields=["weight", "bias_V"], meta_fields=[]
)
@dataclasses.dataclass(frozen=True)
class BiasedWeight:
  """A weight format: another weight, and a bias of what is made with it."""

  weight: Any
  bias_V: jax.Array

  def dot(self, x: jax.Array, spec: str) -> jax.Array:
    """Returns the einsum `spec` of (x, weight), (T, V), plus the bias, in x.dtype."""
    return dot(self.weight, x, spec) + self.bias_V.astype(x.dtype)[None]
