"""On which device of `pipe` each stage lies, and which way its messages go.

A straight placement puts stage s on device s mod p; of p stages that is one each, of more the
interleaved one (Narayanan et al. 2021). A V puts stages s and 2p-1-s on device s (Qi et al. 2024),
so that first and last stage are neighbours and the turn is a handover within a device.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

from jaxmoe.core.errors import InputError

Route = Literal["right", "left", "here"]


@dataclasses.dataclass(frozen=True)
class Placement:
  """The device of each stage.

  Attributes:
    device_of: By stage, along the layers. All devices hold equally many, and neighbours in the
      order of layers lie on one device or on neighbours of the ring.
  """

  device_of: tuple[int, ...]

  def __post_init__(self) -> None:
    counts = [self.device_of.count(device) for device in range(self.num_devices)]
    if len(set(counts)) > 1:
      raise InputError(
        f"every device must hold equally many stages: devices 0 to {self.num_devices - 1} hold "
        f"{counts}; give each stage's device so that they do"
      )
    for stage in range(self.num_stages - 1):
      self.route(stage, stage + 1)

  @property
  def num_stages(self) -> int:
    """Stages of all devices."""
    return len(self.device_of)

  @property
  def num_devices(self) -> int:
    """Devices along `pipe`."""
    return max(self.device_of) + 1

  @property
  def num_local(self) -> int:
    """Stages a device holds."""
    return self.num_stages // self.num_devices

  def stages_on(self, device: int) -> tuple[int, ...]:
    """Returns a device's stages in the order of layers: its local slots 0, 1, ..."""
    return tuple(stage for stage, place in enumerate(self.device_of) if place == device)

  def local(self, stage: int) -> int:
    """Returns a stage's slot on its device."""
    return self.device_of[:stage].count(self.device_of[stage])

  def route(self, sender: int, receiver: int) -> Route:
    """Returns which way a message between two stages goes: to device + 1, - 1, or not at all.

    Of two devices each is the other's right and left; where both would do it is right for the next
    stage of a straight placement and left for the one before, as with more devices.
    """
    here, there = self.device_of[sender], self.device_of[receiver]
    if here == there:
      return "here"
    step = (there - here) % self.num_devices
    if self.num_devices == 2:
      return self._route_of_two(sender, receiver)
    if step == 1:
      return "right"
    if step == self.num_devices - 1:
      return "left"
    raise InputError(
      f"stages {sender} and {receiver} lie on devices {here} and {there}, which are no neighbours; "
      "messages go from a device to the next or the one before"
    )

  def _route_of_two(self, sender: int, receiver: int) -> Route:
    """Returns the way that more devices would take: a V's second half runs in reverse."""
    forward = receiver > sender
    descends = self.is_v and min(sender, receiver) >= self.num_devices
    return "right" if forward != descends else "left"

  @property
  def is_v(self) -> bool:
    """Whether it is a V: two stages a device, the second half in reverse."""
    return self.device_of == (*range(self.num_devices), *reversed(range(self.num_devices)))


def straight(num_devices: int, num_local: int = 1) -> Placement:
  """Returns stage s on device s mod p, `num_local` rounds of it."""
  return Placement(tuple(range(num_devices)) * num_local)


def v_shape(num_devices: int) -> Placement:
  """Returns stages s and 2p-1-s on device s."""
  return Placement((*range(num_devices), *reversed(range(num_devices))))
