"""A recipe holds the table of its pipeline, which its file gave."""

import dataclasses

import pytest

from configs.tiny import get_config
from jaxmoe.core.config_io import from_json, to_json
from jaxmoe.core.errors import InputError
from jaxmoe.parallel import Parallel
from jaxmoe.parallel.pipelines import PIPELINES, write_table
from jaxmoe.parity.cells import layout_key
from jaxmoe.train.experiment import Experiment
from jaxmoe.train.held_table import changed_table, hold_table
from jaxmoe.train.pipeline_stages import table_of


def recipe(pipeline, pipe=2):
  parallel = Parallel(pipe=pipe, pipeline=str(pipeline))
  found = get_config()
  train = dataclasses.replace(found.train, num_micro=4)
  return dataclasses.replace(found, parallel=parallel, train=train)


def test_a_recipe_holds_what_the_file_had(tmp_path):
  path, table = tmp_path / "own.csv", PIPELINES["zb_h1"](2, 4)
  path.write_text(write_table(table).replace(",", " , ,"))  # empty cells mean nothing
  held = hold_table(recipe(path))
  path.unlink()
  assert table_of(held.parallel, 4) == table
  assert from_json(Experiment, to_json(held), "config.json") == held
  assert hold_table(held) is held
  assert layout_key(held.parallel).startswith("pipe/table_")
  with pytest.raises(InputError, match=r"config\.json of a run has its table"):
    hold_table(recipe(path))


def test_a_name_is_held_as_it_is():
  assert hold_table(named := recipe("gpipe")) is named


def test_another_table_of_a_run_is_told(tmp_path):
  held = []
  for name in ("1f1b", "gpipe"):
    (tmp_path / "own.csv").write_text(write_table(PIPELINES[name](2, 4)))
    held.append(hold_table(recipe(tmp_path / "own.csv")))
  assert "another table" in changed_table(*held)
  assert "another table" in changed_table(recipe("1f1b"), held[1])
  assert not changed_table(held[0], held[0])
  assert not changed_table(recipe("1f1b"), recipe("gpipe"))  # which a recipe says by name

