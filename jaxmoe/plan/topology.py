"""A look ahead: the devices of a TPU slice that is not there, which programs compile for.

libtpu compiles for a topology without a chip. That shows whether a step compiles, what memory it
takes and what it sends; never how fast it is or what numbers it makes.
"""

from __future__ import annotations

from typing import Any

import jax
from jax.experimental import topologies

from jaxmoe.core.errors import InputError

HBM_GIB = {"TPU v4": 32, "TPU v5 lite": 16, "TPU v5": 95, "TPU v6 lite": 32}
"""Memory of a chip by its kind (cloud.google.com/tpu/docs/system-architecture-tpu-vm)."""


def topology_devices(name: str) -> list[jax.Device]:
  """Returns the devices of a slice such as `v5e:4x4`.

  Raises:
    InputError: libtpu is not installed, or does not know the slice.
  """
  try:
    found: Any = topologies.get_topology_desc(platform="tpu", topology_name=name)
  except jax.errors.JaxRuntimeError as error:
    raise InputError(
      f"--topology={name}: {str(error).splitlines()[0]}; give a slice such as v5e:4x4"
    ) from None
  except RuntimeError:
    raise InputError(
      f"--topology={name} needs libtpu, which is not installed; pip install 'jaxmoe[tpu]'"
    ) from None
  return list(found.devices)


def memory_of(device: jax.Device) -> int | None:
  """Returns the bytes of memory of a chip, None where its kind is not known."""
  gib = HBM_GIB.get(device.device_kind)
  return None if gib is None else gib * 2**30
