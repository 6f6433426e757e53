"""Layers of stages as arrays of their own and back, without any device holding another's.

A leaf that is stacked over layers and cut over the stages of a pipeline is, on each device, a stack
of that device's layers. A layer by itself lies on the devices of its stage alone: what is written
to a file, and read, is taken row by row out of what lies there. Of the layers of a stage on which
a process has no device it holds arrays without shards.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec


def is_staged(sharding: Any) -> bool:
  """Whether a stacked leaf's layers are cut over devices."""
  return (
    isinstance(sharding, NamedSharding) and len(sharding.spec) > 0 and sharding.spec[0] is not None
  )


def layer_shardings(sharding: NamedSharding, rows: int) -> list[NamedSharding]:
  """Returns where each row of a stacked leaf lies by itself: on its stage's devices."""
  mesh, axis = sharding.mesh, sharding.spec[0]
  at = mesh.axis_names.index(axis)
  names = tuple(name for name in mesh.axis_names if name != axis)
  kinds = tuple(kind for name, kind in zip(mesh.axis_names, mesh.axis_types) if name != axis)
  degree = mesh.shape[axis]
  rest = PartitionSpec(*tuple(sharding.spec)[1:])
  places = [
    NamedSharding(Mesh(np.take(mesh.devices, stage, axis=at), names, axis_types=kinds), rest)
    for stage in range(degree)
  ]
  return [places[row * degree // rows] for row in range(rows)]


def take_apart(leaf: jax.Array, names: Sequence[str]) -> Iterator[tuple[str, jax.Array]]:
  """Yields the layers of a stacked leaf by name, each where its stage is, but for empty places."""
  assert isinstance(leaf.sharding, NamedSharding)
  rows = leaf.shape[0]
  parts = {shard.device: shard.data for shard in leaf.addressable_shards}
  here = layer_shardings(leaf.sharding, rows)
  for row, (name, sharding) in enumerate(zip(names, here, strict=True)):
    if name:
      own = [
        _row(parts[device], row % parts[device].shape[0])
        for device in sharding.mesh.devices.flat
        if device in parts
      ]
      shape, dtype = leaf.shape[1:], leaf.dtype
      yield name, jax.make_array_from_single_device_arrays(shape, sharding, own, dtype=dtype)


def put_together(
  named: Mapping[str, jax.Array], names: Sequence[str], like: jax.ShapeDtypeStruct,
  sharding: NamedSharding,
) -> jax.Array:  # fmt: skip
  """Returns the stacked leaf of layers that lie where `layer_shardings` says; zeros where empty."""
  rows = len(names)
  here = layer_shardings(sharding, rows)
  parts: dict[jax.Device, list[jax.Array | None]] = {}
  for name, place in zip(names, here, strict=True):
    found = {}
    if name:
      found = {shard.device: shard.data for shard in named[name].addressable_shards}
    for device in place.mesh.devices.flat:
      if device in place.addressable_devices:
        parts.setdefault(device, []).append(found.get(device))
  shape = sharding.shard_shape(like.shape)[1:]
  stacked = []
  for device, several in parts.items():
    with jax.default_device(device):
      own = [jnp.zeros(shape, like.dtype) if one is None else one for one in several]
      stacked.append(jax.device_put(_stack(own, like.dtype), device))
  return jax.make_array_from_single_device_arrays(like.shape, sharding, stacked, dtype=like.dtype)


@jax.jit
def _row(part: jax.Array, row: int) -> jax.Array:
  return jax.lax.dynamic_index_in_dim(part, row, keepdims=False)


@functools.partial(jax.jit, static_argnums=1)
def _stack(rows: list[jax.Array], dtype: Any) -> jax.Array:
  return jnp.stack([row.astype(dtype) for row in rows])
