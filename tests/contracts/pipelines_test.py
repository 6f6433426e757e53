"""Every pipeline of PIPELINES: placed, free of deadlocks, lowered to columns that find things."""

import collections

import pytest

from jaxmoe.core.errors import InputError
from jaxmoe.parallel.pipelines import PIPELINES, lower
from jaxmoe.parallel.pipelines.columns_replay import replay
from jaxmoe.parallel.pipelines.table_checks import check_table

SOME = [(2, 2), (2, 5), (3, 3), (3, 7), (4, 4), (4, 9), (5, 12)]
ALL = [(size, micro) for size in range(2, 9) for micro in range(size, 4 * size + 1)]


def check(name, num_devices, num_micro, keep):
  """Checks one table and what its columns do, pass by pass."""
  table = PIPELINES[name](num_devices, num_micro)
  check_table(table)
  done = collections.Counter((one.stage, one.kind, one.micro) for one in replay(lower(table, keep)))
  assert set(done.values()) == {1}
  for stage in range(table.placement.num_stages):
    for micro in range(num_micro):
      assert done[stage, "F", micro] == 1
      both, parts = done[stage, "BW", micro], done[stage, "B", micro] + done[stage, "W", micro]
      assert (both, parts) in ((1, 0), (0, 2))


@pytest.mark.parametrize("keep", ["input", "residuals"])
@pytest.mark.parametrize("size", SOME, ids=lambda size: f"{size[0]}x{size[1]}")
@pytest.mark.parametrize("name", PIPELINES)
def test_every_pass_is_done_once_and_finds_what_it_needs(name, size, keep):
  check(name, *size, keep)


@pytest.mark.slow
@pytest.mark.parametrize("keep", ["input", "residuals"])
@pytest.mark.parametrize("num_devices", range(2, 9))
@pytest.mark.parametrize("name", PIPELINES)
def test_every_pass_is_done_once_for_all_sizes(name, num_devices, keep):
  for num_micro in range(num_devices, 4 * num_devices + 1):
    check(name, num_devices, num_micro, keep)


@pytest.mark.parametrize("name", PIPELINES)
def test_slots_do_not_grow_with_microbatches_but_for_gpipe(name):
  few, many = (lower(PIPELINES[name](4, num), "residuals").slots for num in (12, 32))
  assert (few == many) == (name != "gpipe")


@pytest.mark.parametrize("name", ["interleaved", "zb_v", "v_half", "dualpipe_v"])
def test_too_few_microbatches_are_told_with_what_works(name):
  with pytest.raises(InputError, match=f"{name} over 4 devices.*there are 3; take") as found:
    PIPELINES[name](4, 3)
  assert "\n" not in str(found.value)
