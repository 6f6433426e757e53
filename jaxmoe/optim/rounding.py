"""Adds updates to masters; to bfloat16 ones with stochastic rounding, so that none is lost.

A sum between two bfloat16 numbers becomes the upper one as often as it lies near it: its mean is
the sum (Gupta et al. 2015, arXiv:1502.02551, section 3.1). Of the 16 bits that bfloat16 lacks a
float32 has the distance from the lower neighbour, so 16 random bits are added and what is below
them is cut off.

The random bits of an entry depend on the seed, the step, the name of the layer's parameter and
the entry's place in it, and on nothing else: neither on how layers are stacked nor on where parts
of a leaf lie.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxmoe.core import param_names
from jaxmoe.core.rng import Keys, name_hash
from jaxmoe.optim.masters import Masters


def apply_updates(
  masters: Masters,
  params: Any,
  updates: Any,
  keys: Keys,
  layer_groups: param_names.LayerGroupSizes | None,
) -> Any:
  """Returns the parameters after float32 updates, each in its dtype.

  Args:
    masters: The dtypes; nothing is drawn for what is frozen.
    params: The parameters.
    updates: A tree like them.
    keys: Of this step.
    layer_groups: How layers are grouped in memory; None for a tree that has no stack of layers.
  """
  flat, moves = param_names.flatten(params), param_names.flatten(updates)
  moved = {}
  for path, leaf in flat.items():
    wide = leaf.astype(jnp.float32) + moves[path]
    trains = set(_layers(path, layer_groups) or [path]) - masters.frozen
    if leaf.dtype == jnp.bfloat16 and trains:
      moved[path] = round_by_chance(wide, draw_bits(keys, path, leaf.shape, layer_groups))
    else:
      moved[path] = wide.astype(leaf.dtype)
  return param_names.unflatten(params, moved)


def draw_bits(
  keys: Keys, path: str, shape: tuple[int, ...], layer_groups: param_names.LayerGroupSizes | None
) -> jax.Array:
  """Returns uint16 random bits for a leaf, stacked over layers or not."""
  several = _layers(path, layer_groups)
  hashes = jnp.asarray([name_hash(name) for name in several or [path]], jnp.uint32)
  one = shape if several is None else shape[1:]

  def of_layer(name: jax.Array) -> jax.Array:
    return jax.random.bits(jax.random.fold_in(keys.root, name), one, jnp.uint16)

  # Otherwise the bits of an entry would depend on the shape, and every device would draw all.
  with jax.threefry_partitionable(True):
    bits = jax.vmap(of_layer)(hashes)
  return bits[0] if several is None else bits


def round_by_chance(wide: jax.Array, bits: jax.Array) -> jax.Array:
  """Returns float32 numbers as bfloat16, up or down by uint16 random bits.

  What bfloat16 has stays as it is, and so does what is not finite.
  """
  words = jax.lax.bitcast_convert_type(wide, jnp.uint32) + bits.astype(jnp.uint32)
  cut = jax.lax.bitcast_convert_type(words & np.uint32(0xFFFF0000), jnp.float32)
  # Past the largest of bfloat16 there is no neighbour.
  return jnp.where(jnp.isfinite(wide) & jnp.isfinite(cut), cut, wide).astype(jnp.bfloat16)


def _layers(path: str, layer_groups: param_names.LayerGroupSizes | None) -> list[str] | None:
  """Returns the names of the layers that are stacked in a leaf, None if it holds none."""
  return None if layer_groups is None else param_names.layer_names(path, layer_groups)
