"""Devices of this machine share its memory; those that are not there have a chip's, or none."""

import jax

from jaxmoe.core.layout import one_device
from jaxmoe.cost.host import HostMemory
from jaxmoe.parallel import Parallel, make_layout
from jaxmoe.plan import device_memory


def test_devices_of_a_processor_share_what_the_process_may_have(monkeypatch):
  monkeypatch.setattr(
    device_memory.host, "memory", lambda: HostMemory(600 << 20, 100 << 20, grouped=True)
  )
  two = make_layout(Parallel(data=2), jax.devices())
  assert device_memory.memory_of_device(one_device(), there=True) == 600 << 20
  assert device_memory.memory_of_device(two, there=True) == 300 << 20
  there = device_memory.memory_of_device(two, there=False)
  assert there is None, "what is as if has no memory of this machine"
