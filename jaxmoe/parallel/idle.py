"""Devices that a layout leaves without work."""

from __future__ import annotations

from collections.abc import Sequence

import jax
from jax.sharding import Mesh

from jaxmoe.parallel.degrees import Parallel


def idle_line(
  parallel: Parallel, mesh: Mesh, devices: Sequence[jax.Device], rows: int
) -> str | None:
  """Returns which devices have nothing to do and what would use them, None where all have.

  Args:
    parallel: The degrees.
    mesh: Made of them.
    devices: Those there are.
    rows: Of a microbatch; devices share them out.
  """
  busy = {device.id for device in mesh.devices.flat}
  idle = [device for device in devices if device.id not in busy]
  if not idle:
    return None
  names = [f"{device.platform}:{device.id}" for device in (idle[0], idle[-1])]
  shown = " to ".join(dict.fromkeys(names))
  more, rest = divmod(len(devices), parallel.num_devices)
  cure = f"degrees whose product is {len(devices)} use all"
  if not rest:
    cure = f"--config.parallel.data={parallel.data * more} uses all"
    if rows % (parallel.num_row_groups * more):
      cure += f", with rows of a microbatch that divide by {parallel.num_row_groups * more}"
  are = "is" if len(idle) == 1 else "are"
  return (
    f"{len(idle)} of {len(devices)} devices {are} idle ({shown}): the degrees make "
    f"{parallel.num_devices}; {cure}"
  )
