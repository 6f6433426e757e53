"""Arrays that only some processes have a part of, as those of the layers of a pipeline's stage.

JAX lets the others hold an array without any shard. Orbax does not, and refuses one that lies on
devices of a single process; so it is shown a wider array, whose first replica is the real one.
"""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, Sharding

from jaxmoe.core import multihost

_ELSEWHERE = "elsewhere"


def on_all_processes(sharding: Sharding) -> bool:
  """Whether every process has a device of a sharding. Alone, and with no mesh, always."""
  if not multihost.is_multi_process() or not isinstance(sharding, NamedSharding):
    return True
  return len(_processes(sharding)) == jax.process_count()


def is_first_holder(sharding: Sharding) -> bool:
  """Whether this is the first of the processes that have a device of a sharding."""
  return min(_processes(sharding)) == jax.process_index()


def has_part(sharding: Sharding) -> bool:
  """Whether this process has a device of a sharding."""
  return bool(sharding.addressable_devices)


def part_of_none(like: jax.ShapeDtypeStruct) -> jax.Array:
  """Returns the array as a process has it that has no part of it."""
  return jax.make_array_from_single_device_arrays(like.shape, like.sharding, [], dtype=like.dtype)


def widened(arrays: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
  """Returns arrays on all processes, whose replica 0 is what was given and all others zeros.

  To be written by what writes replica 0 alone. The zeros are those of one array for each shape.
  """
  zeros: dict[tuple[object, ...], jax.Array] = {}

  def wide(x: jax.Array) -> jax.Array:
    if on_all_processes(x.sharding):
      return x
    sharding = _wider(x.sharding)
    shape, own = sharding.shard_shape(x.shape), {s.device: s.data for s in x.addressable_shards}
    for device in sharding.addressable_devices:
      if device not in own:
        key = (device, shape, x.dtype)
        if key not in zeros:
          zeros[key] = jax.device_put(np.zeros(shape, x.dtype), device)
        own[device] = zeros[key]
    parts = [own[device] for device in sharding.mesh.devices.flat if device in own]
    return jax.make_array_from_single_device_arrays(x.shape, sharding, parts)

  return {name: wide(x) for name, x in arrays.items()}


def _processes(sharding: Any) -> set[int]:
  return {device.process_index for device in sharding.device_set}


def _wider(sharding: Sharding) -> NamedSharding:
  """Returns a sharding over all devices whose first replica lies where the given one does.

  A pipeline has as many devices in each stage, so that theirs divide those of all.
  """
  assert isinstance(sharding, NamedSharding)
  mesh = sharding.mesh
  rest = [device for device in jax.devices() if device not in sharding.device_set]
  others = np.array(rest, dtype=object).reshape(-1, *mesh.devices.shape)
  devices = np.concatenate([mesh.devices[None], others])
  types = (AxisType.Auto, *mesh.axis_types)
  return NamedSharding(
    Mesh(devices, (_ELSEWHERE, *mesh.axis_names), axis_types=types), sharding.spec
  )
