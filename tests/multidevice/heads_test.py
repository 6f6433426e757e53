"""Norms over all heads of a token, whose heads lie on several devices, some as copies."""

import pytest

from jaxmoe.parallel import Parallel
from jaxmoe.parity import Cell, cell_errors, is_green


@pytest.mark.slow
@pytest.mark.parametrize(
  "parallel", [Parallel(tensor=2, sequence=True), Parallel(fsdp=2, tensor=4)], ids=str
)
def test_a_norm_over_all_heads_is_that_of_one_device(parallel):
  """Of two key heads over four devices each has a copy of one."""
  found = cell_errors(Cell(parallel, attention="qk_norm"))
  assert is_green(found), found
