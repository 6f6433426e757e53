"""What a run says is the same when its rows and layers are cut, whatever it is asked for."""

import json
import math

import pytest

import jaxmoe
from jaxmoe.train.experiment import Experiment

BASE = {
  "train.num_steps": 8, "train.batch_size": 8, "train.num_micro": 4, "evaluation.every": 4,
  "samples.every": 8, "model.stack.0.repeats": 3,
}  # fmt: skip
FEATURES = {
  "layers and experts that are frozen": (
    {}, {"optim.frozen": "layers/0/attention/*,layers/*/moe/experts/*@0:2"}
  ),
  "routers that are to treat domains alike": (
    {"router": "tree"}, {"optim.fairness.weight": 0.3}
  ),
  "steps that are skipped": (
    {}, {"train.recovery.spike_window": 3, "train.recovery.spike_factor": 0.01,
         "train.recovery.patience": 9, "optim.learning_rate": 0.1}
  ),
  "biases of routers that follow the counts": ({"router": "aux_free"}, {}),
  "statistics of every token": ({"router": "quantile"}, {}),
}  # fmt: skip
ROWS = {"parallel.context": 2, "parallel.attend": "ring"}
STAGES = {"parallel.pipe": 2, "parallel.pipeline": "zb_h1"}
LAYOUTS = {
  "rows": ROWS,
  "stages": STAGES,
  "rows, stages and shards": {**ROWS, **STAGES, "parallel.fsdp": 2},
}


def lines(named, changes, folder):
  """Returns the lines of metrics.jsonl without times, and the samples."""
  jaxmoe.fit(jaxmoe.recipe("tiny", **named, **changes), folder, allow_unproven=True)
  found = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
  return [{key: of for key, of in line.items() if key != "time"} for line in found]


def check(found, true, where=""):
  """Compares all numbers; choices of experts may differ where scores are alike to the last bit."""
  if isinstance(true, dict):
    assert found.keys() == true.keys(), where
    for key, of in true.items():
      if key not in ("routing", "shuffled_95"):
        check(found[key], of, f"{where}/{key}")
  elif isinstance(true, list):
    assert len(found) == len(true), where
    for at, (one, other) in enumerate(zip(found, true)):
      check(one, other, f"{where}/{at}")
  elif isinstance(true, float):
    assert math.isclose(found, true, rel_tol=1e-4, abs_tol=1e-5), (where, found, true)
  else:
    assert found == true, where


@pytest.mark.slow
@pytest.mark.parametrize("name", FEATURES)
def test_a_run_is_that_of_one_device(name, tmp_path):
  named, asked = FEATURES[name]
  assert isinstance(jaxmoe.recipe("tiny", **named, **asked), Experiment)
  true = lines(named, {**BASE, **asked}, tmp_path / "one")
  assert len(true) == BASE["train.num_steps"]
  if "skipped" in name:
    assert 0 < true[-1]["skipped"] < 8
  for layout, degrees in LAYOUTS.items():
    found = lines(named, {**BASE, **asked, **degrees}, tmp_path / layout)
    check(found, true, layout)
