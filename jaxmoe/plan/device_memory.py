"""Memory of a device of a layout: of this machine, or of a chip that is not there."""

from __future__ import annotations

from jaxmoe.core.layout import Layout
from jaxmoe.cost import host
from jaxmoe.plan.topology import memory_of


def memory_of_device(layout: Layout, there: bool) -> int | None:
  """Returns the bytes of memory of a device, None where they are not known.

  The processor's devices have each a part of what this process may have. `there`: whether the
  devices are those of this machine, not as if.
  """
  device = layout.mesh.devices.flat[0]
  if not there:
    return memory_of(device)
  if device.platform == "cpu":
    memory = host.memory()
    return memory.limit // layout.mesh.devices.size if memory else None
  return (device.memory_stats() or {}).get("bytes_limit")
