"""First values of parameters: declared leaf by leaf, drawn each by itself or all in one loop.

A number that is drawn depends on its leaf's key and its own place in the leaf alone (Threefry in
counter mode, Salmon et al. 2011; JAX calls it partitionable). So numbers of all leaves can come out
of one loop over blocks of places, and are, bit for bit, what each leaf's own draw gives. One loop
compiles in a fraction of the time; where leaves are spread over devices each is drawn by itself,
so that a device draws its own part.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.random import threefry_2x32

from jaxmoe.core.rng import Keys, name_hash

_CUT = 2.0
_BLOCK_BITS = 15
_BLOCK = 2**_BLOCK_BITS


@dataclasses.dataclass(frozen=True)
class Declared:
  """A leaf that is declared and not made yet.

  Attributes:
    shape: Of one layer's.
    dtype: Of it; draws are float32 first.
    first: What a draw is multiplied by; or the value, or values, that it begins as.
    path: Of its key in the namespace of its layer, or of the model; empty where nothing is drawn.
    layers: The depths of the layers of which it is stacked, in dim 0; None where it is of none. A
      place below 0 is empty: zeros.
  """

  shape: tuple[int, ...]
  dtype: Any
  first: float | np.ndarray
  path: str = ""
  layers: tuple[int, ...] | None = None

  @property
  def draws(self) -> int:
    """How many times it is drawn: once a layer, or never."""
    return (1 if self.layers is None else len(self.layers)) if self.path else 0

  @property
  def like(self) -> jax.ShapeDtypeStruct:
    """Shape and dtype of the leaf in memory."""
    return jax.ShapeDtypeStruct(self.stacked_shape, self.dtype)

  @property
  def stacked_shape(self) -> tuple[int, ...]:
    """The shape with that of the stack."""
    return self.shape if self.layers is None else (len(self.layers), *self.shape)


def first_value(keys: Keys, leaf: Declared) -> jax.Array:
  """Returns the first value of a leaf that is not stacked."""
  return _finished(_normal(keys(leaf.path), leaf.shape), leaf) if leaf.path else _filled(leaf)


def drawn_apart(keys: Keys, leaves: Sequence[Declared]) -> list[jax.Array]:
  """Returns the first values of leaves, each drawn by itself; bits do not depend on shardings."""
  keys_K, begin, found = _keys_of(keys, leaves), 0, []
  for leaf in leaves:
    normal = jax.vmap(functools.partial(_normal, shape=leaf.shape))
    end = begin + leaf.draws
    found.append(_finished(normal(keys_K[begin:end]), leaf) if leaf.draws else _filled(leaf))
    begin = end
  return found


def drawn_together(keys: Keys, leaves: Sequence[Declared]) -> list[jax.Array]:
  """Returns what `drawn_apart` returns, bit for bit, of one loop over all that is drawn."""
  if not (_counts_places(keys.root) and any(leaf.draws for leaf in leaves)):
    return drawn_apart(keys, leaves)
  blocks = [-(-math.prod(leaf.shape) // _BLOCK) for leaf in leaves for _ in range(leaf.draws)]
  of_key = np.repeat(np.arange(len(blocks), dtype=np.int32), blocks)
  number = np.concatenate([np.arange(each, dtype=np.uint32) for each in blocks])
  data_K2 = jax.random.key_data(_keys_of(keys, leaves))
  rows_RP = jax.lax.map(lambda row: _block(data_K2[row[0]], row[1]), (of_key, number))
  found, begin = [], 0
  for leaf in leaves:
    size = math.prod(leaf.shape)
    end = begin + leaf.draws * -(-size // _BLOCK)
    rows = rows_RP[begin:end].reshape(max(leaf.draws, 1), -1)[:, :size]
    found.append(_finished(rows, leaf) if leaf.draws else _filled(leaf))
    begin = end
  return found


def _keys_of(keys: Keys, leaves: Sequence[Declared]) -> jax.Array:
  """Returns the key of each draw, in order of leaves and of their layers."""
  drawn = [(leaf, layer) for leaf in leaves for layer in (leaf.layers or (None,))[: leaf.draws]]
  # What is drawn for an empty place is not used.
  drawn = [(leaf, layer if layer is None else max(layer, 0)) for leaf, layer in drawn]
  layers = sorted({layer for _, layer in drawn if layer is not None})
  roots = keys.root[None]
  if layers:
    at = jax.vmap(jax.random.fold_in, (None, 0))(keys("at"), np.array(layers, np.uint32))
    roots = jnp.concatenate([roots, at])
  of_root = np.array([0 if layer is None else 1 + layers.index(layer) for _, layer in drawn], int)
  names = np.array([name_hash(leaf.path) for leaf, _ in drawn], np.uint32)
  return jax.vmap(jax.random.fold_in)(roots[of_root], names)


def _counts_places(key: jax.Array) -> bool:
  """Whether a number that is drawn depends on the key and on its place alone."""
  threefry = str(jax.random.key_impl(key)) == "threefry2x32"
  return threefry and bool(jax.config.values["jax_threefry_partitionable"])


def _normal(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
  return jax.random.truncated_normal(key, -_CUT, _CUT, shape, jnp.float32)


def _block(data_2: jax.Array, number: jax.Array) -> jax.Array:
  """Returns the numbers of one block of places of a key, as `_normal` has them."""
  low_P = number * np.uint32(_BLOCK) + jnp.arange(_BLOCK, dtype=jnp.uint32)
  high_P = jnp.full(_BLOCK, number >> (32 - _BLOCK_BITS))
  bits_2P = threefry_2x32(data_2, jnp.concatenate([high_P, low_P])).reshape(2, _BLOCK)
  return _cut_normal(bits_2P[0] ^ bits_2P[1])


def _cut_normal(bits: jax.Array) -> jax.Array:
  """Returns float32 normals cut at two deviations, of 32 bits each as `jax.random` takes them."""
  end = jax.lax.erf(np.float32(_CUT) / np.float32(math.sqrt(2)))
  unit = jax.lax.bitcast_convert_type((bits >> 9) | np.uint32(0x3F800000), jnp.float32) - 1
  even = jnp.maximum(-end, unit * (end - -end) + -end)
  inside = np.nextafter(np.float32(_CUT), np.float32(0))
  return jnp.clip(np.float32(math.sqrt(2)) * jax.lax.erf_inv(even), -inside, inside)


def _filled(leaf: Declared) -> jax.Array:
  return _emptied(jnp.broadcast_to(jnp.asarray(leaf.first, leaf.dtype), leaf.stacked_shape), leaf)


def _finished(several: jax.Array, leaf: Declared) -> jax.Array:
  value = (several.reshape(leaf.stacked_shape) * leaf.first).astype(leaf.dtype)
  return _emptied(value, leaf)


def _emptied(value: jax.Array, leaf: Declared) -> jax.Array:
  """Returns a leaf with zeros in its empty places."""
  if leaf.layers is None or min(leaf.layers) >= 0:
    return value
  filled = (np.array(leaf.layers) >= 0).reshape(-1, *[1] * len(leaf.shape))
  return jnp.where(filled, value, jnp.zeros((), leaf.dtype))
