"""Suites take turns, check before they time, and say who is missing; sides are fakes here."""

import json
import os
import sys

import jax.numpy as jnp
import pytest

from jaxmoe.bench import suite as suite_module
from jaxmoe.bench.race import Seconds, race
from jaxmoe.bench.results import RowFile
from jaxmoe.bench.rival_operations import rivals_of
from jaxmoe.bench.sides import process
from jaxmoe.bench.sides.process import Rival
from jaxmoe.bench.suite import Asked
from jaxmoe.bench.suites import decode

FAKE = "tests.bench.fake_side"
ROWS = jnp.arange(6.0).reshape(3, 2)


def quiet(line):
  """Says nothing."""


def asked(rivals=(), shapes=("tiny",)):
  return Asked(
    shapes, rivals, count=False, rounds=3, pythons=(sys.executable, sys.executable),
    env=dict(os.environ), peaks=lambda: (1e11, 1e10), say=quiet,
  )  # fmt: skip


@pytest.fixture
def fakes(monkeypatch):
  """Lets fakes stand for us and for rivals: one that is right, wrong, absent, or ends."""
  settings = {
    "right": (), "wrong": (("FAKE_IDS", "1"),), "absent": (("FAKE_NEEDS", "no_such_package"),),
    "ends": (("FAKE_ENDS", "yes"),),
  }  # fmt: skip
  monkeypatch.setattr(suite_module, "OWN", FAKE)
  rivals = {name: Rival(FAKE, "make it", env) for name, env in settings.items()}
  monkeypatch.setattr(suite_module, "RIVALS", rivals)


def test_contestants_take_turns_and_the_first_round_warms_up():
  order, clock = [], {"a": iter([9, 1, 2, 3]), "b": iter([9, 4, 4, 4])}

  def of(name):
    def run():
      order.append(name)
      return Seconds(1.0, next(clock[name]))

    return run

  rows = race({name: of(name) for name in "ab"}, "a", 3)
  assert order == list("ab" * 4)
  found = {row["name"]: row for row in rows}
  assert found["a"]["cpu_seconds"] == 2 and found["a"]["ratio"] == 1
  # Of rounds, not of medians: 4/1, 4/2, 4/3.
  assert found["b"]["ratio"] == 2 and found["b"]["wall_ratio"] == 1
  assert found["a"]["cpu_quartiles"] == [1.5, 2.5]


def test_a_rival_is_timed_once_it_writes_our_tokens_and_else_says_why_not(fakes):
  results = RowFile(None, {}, quiet)
  decode.run(asked(("right", "wrong", "absent")), results)
  for race_name in ("tiny, 1 row", "tiny, 16 rows", "tiny, prefill 480"):
    rows = {row["name"]: row for row in results.rows if row["race"] == race_name}
    assert set(rows) == {"jaxmoe", "right", "wrong", "absent"}
    assert rows["right"]["ratio"] == 1 and rows["jaxmoe"]["seconds"] == 2
    assert "differs from ours at token 0" in rows["wrong"]["wrong"]
    assert rows["absent"]["missing"] == "no_such_package: make it"
    assert not {"seconds", "ratio"} & {*rows["wrong"], *rows["absent"]}


def test_a_rival_of_one_operation_is_timed_once_it_finds_our_values(fakes):
  rivals = asked(("right", "wrong", "absent"))
  args, right = (ROWS, ROWS + 1), (2 * ROWS, 2 * (ROWS + 1))
  with rivals_of(rivals, "twice", {}, args, right) as (runs, rows):
    assert {*runs} == {"right"} and runs["right"]() == Seconds(2.0, 1.0)
  rows = {row["name"]: row for row in rows}
  assert "error" in rows["wrong"]["wrong"] and rows["absent"]["missing"]


def test_a_side_that_ends_says_its_error_though_a_library_has_the_last_word(fakes):
  side = process.Side(FAKE, sys.executable, {**os.environ, "FAKE_ENDS": "yes"})
  with side, pytest.raises(process.SideError, match="out of luck"):
    side.ask("seconds", prompts=[[1]], max_tokens=1)


def test_a_suite_that_was_killed_goes_on_with_whole_rows(tmp_path):
  path, said = tmp_path / "rows.json", []
  about = {"suite": "step"}
  first = RowFile(str(path), about, quiet)
  first.add("a", [{"name": "jaxmoe"}, {"name": "torch"}])  # and no more
  assert json.loads(path.read_text())["rows"] == first.rows
  second = RowFile(str(path), about, said.append)
  assert second.has("a") and not second.has("b") and "2 rows" in said[0]
  second.add("b", [{"name": "jaxmoe"}])
  second.finish()
  assert [row["race"] for row in json.loads(path.read_text())["rows"]] == ["a", "a", "b"]
  assert not RowFile(str(path), about, quiet).rows  # a finished file is made anew


@pytest.mark.parametrize(
  "text", ["", "{", "[]", '{"rows": 3}', '{"about": {}, "finished": false, "rows": [{}]}']
)
def test_a_file_of_something_else_is_made_anew(tmp_path, text):
  path = tmp_path / "rows.json"
  path.write_text(text)
  assert not RowFile(str(path), {}, quiet).rows


def test_rows_of_another_machine_or_code_are_made_anew(tmp_path):
  path = tmp_path / "rows.json"
  RowFile(str(path), {"code": "1"}, quiet).add("a", [{"name": "jaxmoe"}])
  assert not RowFile(str(path), {"code": "2"}, quiet).rows
