"""Applying updates to parameters in their master dtype, and counting those that move nothing."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxmoe.core.param_names import LayerGroupSizes
from jaxmoe.core.rng import Keys
from jaxmoe.models.transformer import Params
from jaxmoe.optim import Masters, Optim, apply_updates

_SAFE_RATE = 1e-6


def may_underflow(optim: Optim) -> bool:
  """Whether updates of a recipe could be too small to change most of what they are added to.

  Bfloat16 masters are 2**-9 apart, float32 ones 2**-25: at a learning rate of 1e-6 and above only
  weights beyond 10 stand still in float32, and nothing is counted.
  """
  return optim.master_dtype != "float32" or optim.learning_rate < _SAFE_RATE


@dataclasses.dataclass(frozen=True)
class ParamUpdate:
  """How updates reach the parameters.

  Attributes:
    shards: Lays parameters like gradients and moments, so that each device updates its shards of
      what is whole elsewhere (ZeRO 1 and 2).
    masters: In which dtypes parameters are kept.
    layer_groups: How layers are grouped in memory; None where there is no stack of them.
    counts: Whether entries that stay as they were are counted.
  """

  constrain: Callable[[Params], Params] = lambda params: params
  masters: Masters = Masters()
  layer_groups: LayerGroupSizes | None = None
  counts_unmoved: bool = False

  def apply(self, params: Params, updates: Any, seed: int, step: jax.Array) -> Params:
    """Returns the parameters after updates; where these are rounded by chance, by seed and step."""
    if self.masters.dtype == "float32":
      return optax.apply_updates(params, updates)
    keys = (Keys.from_seed(seed) / "rounding").at(step)
    return apply_updates(self.masters, params, updates, keys, self.layer_groups)


def count_unmoved(before: Params, updates: Any, after: Params) -> dict[str, jax.Array]:
  """Returns how many entries had an update that is not zero, and how many of them did not move."""

  def counted(mask: jax.Array) -> jax.Array:
    # An int32 row by row: neither type holds the number of entries of a large leaf.
    rows = jnp.sum(jnp.atleast_1d(mask), axis=-1, dtype=jnp.int32)
    return jnp.sum(rows.astype(jnp.float32))

  def of_leaf(old: jax.Array, update: jax.Array, new: jax.Array) -> jax.Array:
    updated = update != 0
    return jnp.stack([counted(updated), counted(updated & (new == old))])

  found = jax.tree.leaves(jax.tree.map(of_leaf, before, updates, after))
  updated, unmoved = sum(found, jnp.zeros(2))
  return {"updated": updated, "unmoved": unmoved}
