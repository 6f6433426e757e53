import dataclasses

import jax
import pytest

from jaxmoe.core.errors import InputError
from jaxmoe.parallel import Parallel, make_layout, share_of_rows


def test_one_device_holds_all_rows():
  layout = make_layout(Parallel(), jax.devices()[:1])
  assert share_of_rows(layout, 6) == (0, 1)


@dataclasses.dataclass(frozen=True)
class Rows:
  """A layout of which only the rows of this process's devices are known."""

  bounds: tuple

  def sharding(self, role, dims, shape):
    return self

  def addressable_devices_indices_map(self, shape):
    return {i: (slice(*bound),) for i, bound in enumerate(self.bounds)}


def test_a_process_holds_the_rows_of_its_devices_each_once():
  assert share_of_rows(Rows(((4, 6), (6, 8))), 8) == (1, 2)
  # Devices of the same tensor group see the same tokens.
  assert share_of_rows(Rows(((2, 4), (2, 4))), 8) == (1, 4)
  assert share_of_rows(Rows(((None, None),)), 8) == (0, 1)


def test_rows_in_uneven_parts_are_refused():
  for bounds in [((0, 2), (4, 6)), ((2, 5),)]:
    with pytest.raises(InputError, match="one even part"):
      share_of_rows(Rows(bounds), 8)
