"""`launch.parity` as a command: which cells a user can name, and what it leaves behind."""

import json

import pytest

from jaxmoe.parallel import Parallel
from jaxmoe.parity import Cell, all_cells
from launch import parity

OTHER = "data+fsdp/zero2/threshold/gelu/capacity/none/sinks"


def test_every_cell_of_the_table_is_found_by_its_key():
  for cell in all_cells():
    found = parity.called(cell.key)
    assert found is not None and found.key == cell.key
  folded = Parallel(expert=2, tensor=2, fold=("tensor",), sequence=True)
  other = Cell(folded, exchange="all_gather")
  assert parity.called(other.key) == other


@pytest.mark.parametrize(
  "key",
  [
    "topk/swiglu/dropless/none", "row/topk/swiglu/dropless/none", "data/topk/swiglu/dropless/sinks",
    "data/topk/swiglu/dropless/all_to_all", "data/zero2/topk/swiglu/dropless/none",
    "expert/fold_row/topk/swiglu/dropless/all_to_all", "data/quickly/topk/swiglu/dropless/none", "",
  ],
)  # fmt: skip
def test_what_is_no_key_is_told_from_one(key):
  assert parity.called(key) is None


def test_a_layout_that_the_table_has_not_is_tried_and_written_down(started, tmp_path):
  assert OTHER not in [cell.key for cell in all_cells()]
  out = tmp_path / "results.json"
  process = started("parity", f"--cells={OTHER}", f"--out={out}")
  said, err = process.communicate(timeout=500)
  assert process.returncode == 0, (said, err)
  assert "1/1 green" in said and "1 of 1 green" in said
  (row,) = json.loads(out.read_text())
  assert (row["cell"], row["status"]) == (OTHER, "green") and 0 < row["errors"]["grads"] < 1e-5
  process = started("parity", "--cells=data/nothing", f"--out={out}")
  _, err = process.communicate(timeout=100)
  assert process.returncode == 2
  assert err.startswith("error: --cells=data/nothing: no cell") and len(err.splitlines()) == 1
