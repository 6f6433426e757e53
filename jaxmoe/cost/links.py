"""Link profiles: latency and bytes a second each way between devices, and how they are joined.

A JSON file, by hand or measured:

    {"topology": "ring", "right": {"latency_s": 2e-6, "bytes_per_s": 5e10},
     "left": {"latency_s": 2e-6, "bytes_per_s": 5e10}}

`full_mesh`: every two devices have links of their own, one each way. `ring`: a device has links to
the next and the one before. `torus`: a ring along each dim of `shape`, such as [4, 4]. Right is
towards the next device, left back; both carry at once.
"""

from __future__ import annotations

import dataclasses
import json
import math
import pathlib
from typing import Any

import numpy as np

from jaxmoe.core.errors import InputError

TOPOLOGIES = ("full_mesh", "ring", "torus")
_NUMBERS = ("latency_s", "bytes_per_s")


@dataclasses.dataclass(frozen=True)
class LinkRate:
  """One way of a link: seconds before the first byte, and bytes a second from then on."""

  latency_s: float
  bytes_per_s: float

  def seconds(self, bytes_sent: float) -> float:
    """Returns the time of one message."""
    return self.latency_s + bytes_sent / self.bytes_per_s


@dataclasses.dataclass(frozen=True)
class LinkProfile:
  """How devices are joined.

  Attributes:
    topology: One of TOPOLOGIES.
    right: Towards the next device.
    left: Towards the one before.
    shape: Devices along each dim of a torus; of others none.
  """

  topology: str
  right: LinkRate
  left: LinkRate
  shape: tuple[int, ...] = ()

  def check_size(self, num_devices: int) -> None:
    """Checks that a torus has room for so many devices.

    Raises:
      InputError: It has other ones.
    """
    if self.topology == "torus" and math.prod(self.shape) != num_devices:
      raise InputError(
        f"a torus of shape {list(self.shape)} has {math.prod(self.shape)} devices, the recipe "
        f"spreads rows over {num_devices}; give a shape of {num_devices} in the link profile"
      )

  def hops(self, distance: int, num_devices: int) -> int:
    """Returns over how many links a message goes when every device sends `distance` places on."""
    distance %= num_devices
    if distance == 0 or self.topology == "full_mesh":
      return min(distance, 1)
    shape = self.shape if self.topology == "torus" else (num_devices,)
    here = np.array(np.unravel_index(np.arange(num_devices), shape))
    there = np.array(np.unravel_index((np.arange(num_devices) + distance) % num_devices, shape))
    apart = (there - here) % np.array(shape)[:, None]
    return int(np.minimum(apart, np.array(shape)[:, None] - apart).sum(axis=0).max())

  def shift_s(self, bytes_sent: float, distance: int, num_devices: int) -> float:
    """Returns the time in which every device's message goes `distance` places on, by the short way.

    A link on the way carries the messages of all devices that go over it, one after the other.
    """
    way = self.right if self.goes_right(distance, num_devices) else self.left
    return self.hops(distance, num_devices) * way.seconds(bytes_sent)

  def goes_right(self, distance: int, num_devices: int) -> bool:
    """Returns whether so many places on are fewer to the right than back to the left."""
    return 2 * (distance % num_devices) <= num_devices

  def exchange_s(self, bytes_held: float, num_devices: int) -> float:
    """Returns the time of an all-to-all in which a device keeps 1 / n of `bytes_held`."""
    each = bytes_held / num_devices
    return self._to_all_s(each, num_devices)

  def gather_s(self, bytes_held: float, num_devices: int) -> float:
    """Returns the time in which each device gets what every other holds."""
    if self.topology == "full_mesh":
      return self._to_all_s(bytes_held, num_devices)
    steps = num_devices - 1  # around the ring, each passes on what it got
    return steps * max(self.right.seconds(bytes_held / 2), self.left.seconds(bytes_held / 2))

  def _to_all_s(self, each: float, num_devices: int) -> float:
    """Returns the time in which a device sends `each` bytes to every other.

    On a full mesh all at once; else the hops of all messages, spread over a device's links.
    """
    if num_devices == 1:
      return 0.0
    slower = max(self.right.seconds(each), self.left.seconds(each))
    if self.topology == "full_mesh":
      return slower
    dims = max(1, len(self.shape))
    total = sum(self.hops(distance, num_devices) for distance in range(1, num_devices))
    return math.ceil(total / (2 * dims)) * slower


def read_links(path: str) -> LinkProfile:
  """Returns the profile of a JSON file.

  Raises:
    InputError: One line: the file cannot be read, or which field is missing or no such number.
  """
  try:
    record = json.loads(pathlib.Path(path).read_text("utf-8"))
  except (OSError, ValueError) as error:
    raise InputError(f"--links={path} cannot be read ({error}); give a JSON file") from None
  topology = _field(path, record, "topology")
  if topology not in TOPOLOGIES:
    raise InputError(f"{path}: topology={topology!r} is none of {', '.join(TOPOLOGIES)}; give one")
  right, left = (
    LinkRate(*(_positive(path, _field(path, record, side), f"{side}.{name}") for name in _NUMBERS))
    for side in ("right", "left")
  )
  shape = _field(path, record, "shape") if topology == "torus" else []
  if not isinstance(shape, list) or not all(type(size) is int and size > 0 for size in shape):
    raise InputError(f"{path}: shape={shape!r} gives no devices along each dim; give some: [4, 4]")
  return LinkProfile(topology, right, left, tuple(shape))


def write_links(profile: LinkProfile) -> str:
  """Returns a profile as `read_links` reads it."""
  record = dataclasses.asdict(profile)
  if not profile.shape:
    del record["shape"]
  return json.dumps(record, indent=1) + "\n"


def _field(path: str, record: Any, name: str) -> Any:
  """Returns a field of a record; its last word is the key."""
  key = name.rpartition(".")[2]
  if not isinstance(record, dict) or key not in record:
    raise InputError(
      f"{path} has no {name}; a link profile has topology, and right and left with latency_s and "
      "bytes_per_s each"
    )
  return record[key]


def _positive(path: str, record: Any, name: str) -> float:
  """Returns a number: a rate above 0, a latency of 0 or more."""
  found = _field(path, record, name)
  least = 0.0 if name.endswith("latency_s") else math.ulp(0.0)
  if type(found) not in (int, float) or not least <= found < math.inf:
    raise InputError(f"{path}: {name}={found!r} is no number that a link can have; give seconds, "
                     "or bytes a second above 0")  # fmt: skip
  return float(found)
