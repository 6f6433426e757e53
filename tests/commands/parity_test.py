"""`launch.parity` as a command: which cells a user can name, and what it leaves behind."""

import json

import pytest

from jaxmoe.parity import all_cells

OTHER = "data+fsdp/zero2/threshold/gelu/capacity/none/sinks"


@pytest.mark.slow
def test_a_layout_that_the_table_has_not_is_tried_and_written_down(started, tmp_path):
  assert OTHER not in [cell.key for cell in all_cells()]
  out = tmp_path / "results.json"
  process = started("parity", f"--cells={OTHER}", f"--out={out}")
  said, err = process.communicate(timeout=500)
  assert process.returncode == 0, (said, err)
  assert "1/1 green" in said and "1 of 1 green: 0 kept, 1 run" in said
  (row,) = json.loads(out.read_text())
  assert (row["cell"], row["status"]) == (OTHER, "green") and 0 < row["errors"]["grads"] < 1e-5
  process = started("parity", f"--cells={OTHER}", f"--out={out}")
  said, err = process.communicate(timeout=100)
  assert said.splitlines()[-1] == "1 of 1 green: 1 kept, 0 run", (said, err)
  process = started("parity", "--cells=data/nothing", f"--out={out}")
  _, err = process.communicate(timeout=100)
  assert process.returncode == 2
  assert err.startswith("error: --cells=data/nothing: no cell") and len(err.splitlines()) == 1
