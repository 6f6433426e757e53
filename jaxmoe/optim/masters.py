"""Master weights: the dtype a parameter is kept in while it trains, float32 by default.

Half a step of bfloat16 is 0.2% of a weight, and an update is mostly less: added to a bfloat16
weight and rounded to the nearest it is nothing. So what trains has a float32 master, which products
cast to the dtype they are made in. What is frozen keeps the dtype it came in, and so do the buffers
of routers, which no optimizer moves.

In memory layers of a stack share a leaf, which then has the widest of their dtypes; a checkpoint
has the dtype of each. A leaf of which only some experts are frozen trains.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxmoe.core import param_names
from jaxmoe.optim.freeze import Masks

_BUFFERS = "/buffers/"


@dataclasses.dataclass(frozen=True)
class Masters:
  """The dtypes of the parameters of a run.

  Attributes:
    dtype: Of what trains.
    frozen: The canonical names of what is frozen as a whole.
    came: The dtypes it came in, by name; those the model declares where there is no entry.
  """

  dtype: str = "float32"
  frozen: frozenset[str] = frozenset()
  came: Mapping[str, Any] = dataclasses.field(default_factory=dict)

  def of(self, name: str, declared: Any) -> np.dtype:
    """Returns the dtype of a layer's parameter, by its canonical name."""
    if name in self.frozen:
      return jnp.dtype(self.came.get(name, declared))
    return jnp.dtype(declared if _BUFFERS in name else self.dtype)

  def shapes(self, shapes: Any, layer_groups: param_names.LayerGroupSizes) -> Any:
    """Returns the parameters' shapes with the dtypes they have in memory."""

    def kept(path: str, leaf: Any) -> jax.ShapeDtypeStruct:
      several = param_names.layer_names(path, layer_groups) or [path]
      dtypes = [self.of(name, leaf.dtype) for name in several if name]
      return jax.ShapeDtypeStruct(leaf.shape, functools.reduce(jnp.promote_types, dtypes))

    flat = {path: kept(path, leaf) for path, leaf in param_names.flatten(shapes).items()}
    return param_names.unflatten(shapes, flat)


def frozen_names(masks: Masks, layer_groups: param_names.LayerGroupSizes) -> frozenset[str]:
  """Returns the canonical names of the parameters that are frozen as a whole."""
  found: set[str] = set()
  for path, mask in masks.items():
    several = param_names.layer_names(path, layer_groups)
    if several is None:
      found.update([path] if mask.all() else [])
      continue
    rows = np.broadcast_to(mask, (len(several), *mask.shape[1:]))
    found.update(name for name, row in zip(several, rows, strict=True) if name and row.all())
  return frozenset(found)
