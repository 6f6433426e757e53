"""The comparison of two commits finds what differs, wherever it stands."""

import json

import pytest

from jaxmoe.runs.recipe_loading import PREFIX, load_recipe
from tests.same_numbers import CASES, ROOT, difference, written

LINES = [
  {"step": 1, "loss": 2.5, "layers": {"0": {"load": [0.25, 0.75]}}, "time": {"unix_s": 1.0}},
  {"step": 2, "loss": 2.25, "layers": {"0": {"load": [0.5, 0.5]}}, "time": {"unix_s": 2.0}},
]


@pytest.fixture
def run(tmp_path):
  """Returns a function that writes a run and returns what is compared of it."""

  def write(lines=LINES, samples="## step 0\n", digest="abc"):
    for name, objects in (("metrics", lines), ("events", [{"event": "done", "digest": digest}])):
      (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(one) + "\n" for one in objects))
    (tmp_path / "samples.md").write_text(samples)
    return written(tmp_path)

  return write


def test_runs_that_differ_by_the_clock_alone_are_the_same(run):
  later = [{**line, "time": {"unix_s": 9.0}} for line in LINES]
  assert not difference(run(), run(later))


@pytest.mark.parametrize(
  "other, first",
  [
    ({"lines": LINES[:1]}, "step 2: step: 2 -> missing (4 in all)"),
    ({"lines": [LINES[0], {**LINES[1], "loss": 2.2500002}]}, "step 2: loss: 2.25 -> 2.2500002"),
    ({"lines": [LINES[0], {**LINES[1], "dropped": {}, "new": None}]}, "step 2: new: missing"),
    (
      {"lines": [LINES[0], {**LINES[1], "layers": {"0": {"load": [0.5, 0.25]}}}]},
      "step 2: layers/0/load/1: 0.5 -> 0.25",
    ),
    ({"samples": "## step 0\n\n"}, "samples.md"),
    ({"digest": "abd"}, "digest: abc -> abd"),
  ],
)
def test_any_other_difference_is_told(run, other, first):
  assert difference(run(), run(**other)).startswith(first)


@pytest.mark.parametrize("case", CASES)
def test_the_recipe_of_a_case_loads(case):
  config, *fields = CASES[case]
  path = f"{ROOT}/{config.removeprefix('--config=')}"
  assert load_recipe(path, [field for field in fields if field.startswith(PREFIX)])
