import dataclasses

import pytest

from jaxmoe.core.errors import InputError
from jaxmoe.parallel.pipelines import PIPELINES, Action, named_table
from jaxmoe.parallel.pipelines.csv_notation import read_table, write_table
from jaxmoe.parallel.pipelines.table_checks import check_table

GOOD = "0F0,0F1,,0B0,0B1\n1F0,1I0,1W0,1F1,1I1,1W1\n"


def written(tmp_path, text):
  path = tmp_path / "table.csv"
  path.write_text(text)
  return str(path)


@pytest.mark.parametrize("name", PIPELINES)
def test_a_table_that_is_written_is_read_again(tmp_path, name):
  table = PIPELINES[name](3, 6)
  text = write_table(table)
  assert len(text.splitlines()) == 3
  assert read_table(written(tmp_path, text)) == table


def test_the_notation_is_that_of_torch(tmp_path):
  assert write_table(PIPELINES["1f1b"](2, 2)) == "0F0,0F1,0B0,0B1\n1F0,1B0,1F1,1B1\n"
  assert "(5F3;0B0)OVERLAP_F_B" in write_table(PIPELINES["dualpipe_v"](3, 6))
  assert "0I0,0W0" in write_table(PIPELINES["zb_h1"](2, 2))
  table = read_table(written(tmp_path, GOOD))
  assert table.orders[1][1:3] == (Action(1, "B", 0), Action(1, "W", 0))
  assert table.orders[0][2] == Action(0, "BW", 0)


def test_a_pass_that_makes_residuals_again_is_read(tmp_path):
  table = read_table(written(tmp_path, "0F0,0R0,0B0\n1F0,1B0\n"))
  assert table.orders[0][1] == Action(0, "R", 0)


@pytest.mark.parametrize(
  "text, message",
  [
    (GOOD.replace("0B0", "0X0"), r"line 1, column 4: '0X0' is no pass"),
    (GOOD.replace("1W1", "1w1"), r"line 2, column 6: '1w1' is no pass"),
    (GOOD.replace("1W1", "(1F1;1I1)OVERLAP_F_B"), r"line 2, column 6: .*is no F beside a B"),
    (GOOD.replace(",1W0", ""), r"line 2, column 2: 1W0 is missing"),
    (GOOD.replace(",1I1,1W1", ""), r"line 2, column 4: 1B1 is missing"),
    (GOOD.replace("0F0,0F1,,0B0", "0F0,,0B0,0F1").replace("1F0", "1F1,1F0", 1).replace(
      "1F1,1I1", "1I1"), r"line 1, column 3: a deadlock: it waits for 1B0"),
    (GOOD.replace("0B1", "0B1,0B1"), r"line 1, column 6: it is done before, as pass 4"),
    (GOOD.replace("1W1", "1W1,0F1"), r"line 2, column 7: stage 0 has passes in line 1 too"),
    (GOOD.replace("1F", "2F"), r"line 2, column 2: 1F0 is missing|equally many"),
    (GOOD.replace("1", "2"), r"no pass of stage 1"),
    ("0F0,1F0\n2F0\n", r"equally many stages"),
    ("\n,,\n", r"has no passes"),
    ("S0,0F0\n", r"set the head so"),
  ],
)  # fmt: skip
def test_a_file_that_is_no_table_is_told_with_line_and_column(tmp_path, text, message):
  path = written(tmp_path, text)
  with pytest.raises(InputError, match=message) as found:
    read_table(path)
  assert "\n" not in str(found.value) and "table.csv" in str(found.value)


def test_a_file_that_is_not_there_or_of_other_degrees_is_told_in_one_line(tmp_path):
  path = written(tmp_path, GOOD)
  assert named_table(path, 2, 2, PIPELINES) == read_table(path)
  with pytest.raises(InputError, match=r"of 2 devices and 2 microbatches, the recipe of 2 and 4"):
    named_table(path, 2, 4, PIPELINES)
  with pytest.raises(InputError, match="see that it is there"):
    named_table(str(tmp_path / "none.csv"), 2, 4, PIPELINES)
  with pytest.raises(InputError, match=r"must be one of gpipe, 1f1b.*parallel.pipeline=2f2b"):
    named_table("2f2b", 2, 4, PIPELINES)


def test_a_missing_weight_gradient_of_any_pipeline_is_seen():
  table = PIPELINES["zb_v"](3, 6)
  for device, order in enumerate(table.orders):
    for place, action in enumerate(order):
      if action.kind == "W":
        cut = (*order[:place], *order[place + 1 :])
        orders = (*table.orders[:device], cut, *table.orders[device + 1 :])
        with pytest.raises(InputError, match=f"{action} is missing"):
          check_table(dataclasses.replace(table, orders=orders))
        break
