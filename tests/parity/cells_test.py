"""The table of cells has what is promised, and its keys say what a recipe stands on."""

import collections
import itertools

import pytest

from jaxmoe.core.errors import InputError
from jaxmoe.moe.dispatch import DISPATCHERS, EXCHANGES
from jaxmoe.moe.experts import EXPERTS
from jaxmoe.moe.routers import ROUTERS
from jaxmoe.parallel import Parallel
from jaxmoe.parity import Cell, Results, Row, all_cells, cells_of, check_proven, smoke_cells
from jaxmoe.parity import results as results_file
from jaxmoe.parity.cells import RAGGED, cell_called
from jaxmoe.parity.refused import refused
from jaxmoe.runs.recipe_loading import load_recipe

AXES = ("data", "fsdp", "expert", "tensor")


def test_the_table_has_at_least_150_cells_each_once():
  keys = [cell.key for cell in all_cells()]
  assert len(keys) >= 150
  assert not [key for key, times in collections.Counter(keys).items() if times > 1]
  assert {cell.key for cell in smoke_cells()} <= set(keys)


def test_every_set_of_axes_is_in_the_table():
  found = {
    tuple(axis for axis in AXES if cell.parallel.axis_sizes[axis] > 1)
    for cell in all_cells()
    if not cell.parallel.fold and not cell.parallel.sequence
  }
  for size in range(1, len(AXES) + 1):
    assert set(itertools.combinations(AXES, size)) <= found
  stages = {cell.parallel.zero for cell in all_cells() if cell.parallel.fsdp > 1}
  assert stages == {0, 1, 2, 3}


@pytest.mark.parametrize(
  "field, family", [("router", ROUTERS), ("dispatch", DISPATCHERS), ("experts", EXPERTS)]
)
def test_every_member_is_tried_with_data_and_with_experts_spread(field, family):
  for name in family:
    cells = [cell.parallel for cell in all_cells() if getattr(cell, field) == name]
    assert any(parallel.data > 1 for parallel in cells), name
    assert any(parallel.expert > 1 for parallel in cells), name


def test_every_exchange_is_tried():
  assert {cell.exchange for cell in all_cells()} == {*EXCHANGES, RAGGED}


def test_a_recipe_stands_on_the_cells_of_its_components_whatever_the_degrees():
  degrees = ("parallel.data=4", "parallel.expert=2", "train.batch_size=8")
  changes = [f"--config.{change}" for change in degrees]
  recipe = load_recipe("configs/tiny.py:router=aux_free,dispatch=capacity", changes)
  assert cells_of(recipe) == ["data+expert/aux_free/swiglu/capacity/all_to_all"]
  assert cells_of(load_recipe("configs/tiny.py", [])) == []


def test_settings_of_one_class_are_told_apart():
  recipe = load_recipe(
    "configs/tiny.py:router=group_limited,dispatch=capacity_spill", ["--config.parallel.data=2"]
  )
  assert cells_of(recipe) == ["data/group_limited/swiglu/capacity_spill/none"]


def test_a_key_has_no_degrees_and_no_exchange_where_experts_are_not_spread():
  assert Cell(Parallel(data=2)).key == Cell(Parallel(data=8), exchange="all_gather").key
  assert Cell(Parallel(fsdp=2, zero=1)).key != Cell(Parallel(fsdp=2, zero=2)).key


def test_every_cell_of_the_table_is_found_by_its_key():
  for cell in all_cells():
    found = cell_called(cell.key)
    assert found is not None and found.key == cell.key
  folded = Parallel(expert=2, tensor=2, fold=("tensor",), sequence=True)
  other = Cell(folded, exchange="all_gather")
  assert cell_called(other.key) == other


@pytest.mark.parametrize(
  "key",
  [
    "topk/swiglu/dropless/none", "row/topk/swiglu/dropless/none", "data/topk/swiglu/dropless/sinks",
    "data/topk/swiglu/dropless/all_to_all", "data/zero2/topk/swiglu/dropless/none",
    "expert/fold_row/topk/swiglu/dropless/all_to_all", "data/quickly/topk/swiglu/dropless/none", "",
  ],
)  # fmt: skip
def test_what_is_no_key_is_told_from_one(key):
  assert cell_called(key) is None


def table(status, sources="other"):
  key = "data/topk/swiglu/dropless/none"
  return Results({key: Row(key, status, {}, "abc", sources)})


def test_a_layout_that_is_not_green_is_refused_and_old_sources_are_told():
  recipe = load_recipe("configs/tiny.py", ["--config.parallel.data=2"])
  with pytest.raises(InputError, match=r"is not tried.*--allow_unproven") as caught:
    check_proven(recipe, Results({}))
  assert "\n" not in str(caught.value)
  with pytest.raises(InputError, match="is red"):
    check_proven(recipe, table("red"))
  assert "sources have changed" in check_proven(recipe, table("green"))[0]


def test_a_table_has_the_cells_asked_for_and_no_other():
  both = table("green").also(Row("other", "red", {"loss": 0.5}, "abc", "other", "loss 5.0e-01"))
  assert len(both.table(both.rows).splitlines()) == 3
  _, row = both.table(["other", "not run yet"]).splitlines()
  assert row.split() == ["5.0e-01", "-", "0.0e+00", "-", "other", "RED", "loss", "5.0e-01"]


def test_a_source_that_moved_is_missed_aloud(monkeypatch):
  monkeypatch.setattr(results_file, "_SOURCES", ("core/layout.py", "core/gone.py"))
  with pytest.raises(AssertionError, match=r"no source matches 'core/gone\.py'"):
    results_file.source_digest()


def test_results_survive_a_file(tmp_path):
  path = tmp_path / "results.json"
  table("green").write(path)
  assert Results.read(path) == table("green")
  path.write_text("{}[")
  with pytest.raises(InputError, match="remove it"):
    Results.read(path)


def test_what_is_refused_says_why_in_one_line():
  rows = refused()
  assert len(rows) >= 7
  assert not [row for row in rows if "\n" in row["reason"] or "set" not in row["reason"]]
