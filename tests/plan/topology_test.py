"""Devices that are not there: what XLA is told of them, and what is wrong in one line."""

import importlib.util

import pytest

from jaxmoe.core.errors import InputError
from jaxmoe.plan.gpu_targets import GPU_TARGETS
from jaxmoe.plan.topology import memory_of, topology_devices

PLUGIN = importlib.util.find_spec("jax_cuda13_plugin") is not None
NEEDS_PLUGIN = pytest.mark.skipif(not PLUGIN, reason="the CUDA plugin is missing: make look-ahead")


def test_xla_is_told_what_a_hopper_has():
  text = GPU_TARGETS["h200"].text
  for line in (
    "core_count: 132", "shared_memory_per_block_optin: 232448",
    "cuda_compute_capability { major: 9 minor: 0 }", 'device_description_str: "NVIDIA H200"',
  ):  # fmt: skip
    assert line in text
  assert text.count("{") == text.count("}")


@pytest.mark.parametrize("name", ("h200", "h200:", "h200:8", "h200:1x8", "h200:0x1x8", "h100:axb"))
def test_a_shape_that_is_none_is_one_line(name):
  with pytest.raises(InputError, match=r"is no shape of GPUs.*h200:1x1x8") as caught:
    topology_devices(name)
  assert "\n" not in str(caught.value)


@pytest.mark.skipif(PLUGIN, reason="the CUDA plugin is installed")
def test_without_the_plugin_the_extra_is_named():
  with pytest.raises(InputError, match=r"needs JAX's CUDA plugin.*jaxmoe\[cuda\]"):
    topology_devices("h200:1x1x8")


@NEEDS_PLUGIN
def test_there_are_as_many_devices_as_asked_for_on_as_many_hosts():
  devices = topology_devices("h200:1x2x4")
  assert len(devices) == 8 and {device.process_index for device in devices} == {0, 1}
  assert {device.platform for device in devices} == {"gpu"}
  assert memory_of(devices[0]) == 139 * 2**30
