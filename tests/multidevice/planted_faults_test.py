"""Every planted fault turns its cell of the parity table red; see `tests/planted_faults.py`."""

import pytest

from jaxmoe.parity import all_cells
from tests.planted_faults import FAULTS, shown


def test_every_fault_names_a_cell_of_the_table():
  assert len(FAULTS) >= 15
  keys = {cell.key for cell in all_cells()}
  assert {fault.cell.key for fault in FAULTS.values()} <= keys


def test_every_fault_stands_in_the_place_of_what_is_there():
  gone = [name for name, fault in FAULTS.items() if not hasattr(fault.owner, fault.name)]
  assert not gone


@pytest.mark.slow
@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_turns_its_cell_red(name):
  assert shown(name)
