"""A look ahead: devices of a TPU slice or of GPU hosts that are not there, to compile for.

libtpu compiles for a slice without a chip, XLA's CUDA plugin for a kind of GPU without one. That
shows whether a step compiles, what memory it takes and what it sends; never how fast it is or what
numbers it makes.
"""

from __future__ import annotations

import re
from typing import Any

import jax
from jax.experimental import topologies

from jaxmoe.core.errors import InputError
from jaxmoe.plan.gpu_targets import GPU_TARGETS

HBM_GIB = {"TPU v4": 32, "TPU v5 lite": 16, "TPU v5": 95, "TPU v6 lite": 32}
"""Memory of a chip by its kind (cloud.google.com/tpu/docs/system-architecture-tpu-vm)."""
_EXAMPLES = "give a slice such as v5e:4x4, or GPUs such as h200:1x1x8"


def topology_devices(name: str) -> list[jax.Device]:
  """Returns the devices of a slice such as `v5e:4x4`, or of GPUs such as `h200:1x2x8`.

  Of GPUs the shape is partitions (joined by a network alone) x hosts x devices of a host.

  Raises:
    InputError: What compiles for them is not installed, or there are no such devices.
  """
  kind = name.partition(":")[0]
  found: Any
  try:
    found = _gpus(name) if kind in GPU_TARGETS else _slice(name)
  except jax.errors.JaxRuntimeError as error:
    raise InputError(f"--topology={name}: {str(error).splitlines()[0]}; {_EXAMPLES}") from None
  return list(found.devices)


def _slice(name: str) -> Any:
  try:
    return topologies.get_topology_desc(platform="tpu", topology_name=name)
  except jax.errors.JaxRuntimeError:
    raise
  except RuntimeError:
    raise InputError(
      f"--topology={name} needs libtpu, which is not installed; pip install 'jaxmoe[tpu]'"
    ) from None


def _gpus(name: str) -> Any:
  kind, _, shape = name.partition(":")
  if not re.fullmatch(r"[1-9]\d*x[1-9]\d*x[1-9]\d*", shape):
    raise InputError(
      f"--topology={name}: {shape or 'nothing'} is no shape of GPUs, which is partitions x hosts x "
      f"devices of a host; {_EXAMPLES}"
    )
  target = GPU_TARGETS[kind].text
  try:
    return topologies.get_topology_desc(platform="cuda", target_config=target, topology=shape)
  except NotImplementedError:
    raise InputError(
      f"--topology={name} needs JAX's CUDA plugin, which is not installed; pip install "
      "'jaxmoe[cuda]'"
    ) from None


def memory_of(device: jax.Device) -> int | None:
  """Returns the bytes of memory of a device, None where its kind is not known."""
  gpus = {target.kind: target.memory for target in GPU_TARGETS.values()}
  gib = HBM_GIB.get(device.device_kind)
  return gpus.get(device.device_kind) if gib is None else gib * 2**30
