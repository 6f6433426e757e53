"""Devices without work are named, with what would give them some."""

import jax
import pytest

from jaxmoe.parallel import Parallel, idle_line, make_mesh

CASES = {
  (1, 1, 8): "7 of 8 devices are idle (cpu:1 to cpu:7): the degrees make 1; "
             "--config.parallel.data=8 uses all",
  (2, 2, 8): "4 of 8 devices are idle (cpu:4 to cpu:7): the degrees make 4; "
             "--config.parallel.data=4 uses all",
  (2, 2, 6): "4 of 8 devices are idle (cpu:4 to cpu:7): the degrees make 4; "
             "--config.parallel.data=4 uses all, with rows of a microbatch that divide by 4",
  (7, 1, 7): "1 of 8 devices is idle (cpu:7): the degrees make 7; "
             "degrees whose product is 8 use all",
  (4, 2, 8): None,
}  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=str)
def test_idle_devices_are_named(case):
  data, tensor, rows = case
  parallel = Parallel(data=data, tensor=tensor)
  devices = jax.devices()[:8]
  assert idle_line(parallel, make_mesh(parallel, devices), devices, rows) == CASES[case]
