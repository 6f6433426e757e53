"""Links between devices, measured: the time of a permute to the next device, and back.

A message of a few bytes shows latency, one of `LARGE` the rate beyond it. All devices send at once,
as in a ring. Of virtual devices of one CPU it shows how fast memory is copied, no link.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jaxmoe.core.errors import InputError
from jaxmoe.cost.links import LinkProfile, LinkRate

SMALL, LARGE = 8, 1 << 22
"""Numbers of a message, float32: 32 bytes, and 16 MiB."""
_AXIS = "ring"


def measure_links(
  devices: Sequence[jax.Device], topology: str, rounds: int, large: int = LARGE
) -> LinkProfile:
  """Returns the profile of these devices as a ring; medians of rounds in which ways take turns.

  Args:
    devices: In the order in which neighbours are to be.
    topology: What the profile says of how they are joined; nothing here can tell.
    rounds: At least 1.
    large: Numbers of the larger message.

  Raises:
    InputError: There is one device.
  """
  if len(devices) < 2:
    raise InputError(
      "links are between devices, and there is one; run where there are more, or with --devices=4 "
      "for virtual ones of this CPU"
    )
  mesh = Mesh(np.array(devices), (_AXIS,), axis_types=(AxisType.Auto,))
  cases = {
    (side, size): _permute(mesh, step, size)
    for side, step in (("right", 1), ("left", -1))
    for size in (SMALL, large)
  }
  times: dict[tuple[str, int], list[float]] = {case: [] for case in cases}
  for _ in range(rounds):
    for case, run in cases.items():
      start = time.perf_counter()
      run()
      times[case].append(time.perf_counter() - start)
  median = {case: statistics.median(found) for case, found in times.items()}
  right, left = (
    _rate(median[side, SMALL], median[side, large], 4 * (large - SMALL))
    for side in ("right", "left")
  )
  return LinkProfile(topology, right, left)


def _rate(small_s: float, large_s: float, more_bytes: int) -> LinkRate:
  """Returns latency and rate; where noise makes the larger message the faster one, of it alone."""
  more_s = large_s - small_s
  return LinkRate(small_s, more_bytes / (more_s if more_s > 0 else large_s))


def _permute(mesh: Mesh, step: int, size: int) -> Callable[[], None]:
  """Returns a compiled permute of a message that has run once, and waits for its end."""
  count = mesh.devices.size
  pairs = [(device, (device + step) % count) for device in range(count)]

  def send(message: jax.Array) -> jax.Array:
    return jax.lax.ppermute(message, _AXIS, pairs)

  spec = PartitionSpec(_AXIS)
  run = jax.jit(jax.shard_map(send, mesh=mesh, in_specs=spec, out_specs=spec))
  message = jax.device_put(jnp.zeros((count, size), jnp.float32), NamedSharding(mesh, spec))
  jax.block_until_ready(run(message))

  def wait() -> None:
    jax.block_until_ready(run(message))

  return wait
