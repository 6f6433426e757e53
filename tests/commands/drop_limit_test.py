"""A layer that drops more than its recipe allows ends the run in one line, with code 5."""

import json

import pytest

from tests.commands.conftest import TINY, run_here

CAPACITY = "model.stack.0.pattern.0.ffn.dispatch"


@pytest.mark.parametrize("allowed, code", [(0.05, 5), (0.95, 0)])
def test_drops_over_the_limit_end_the_run_and_those_below_do_not(allowed, code, tmp_path):
  done = run_here(
    "train", f"{TINY}:dispatch=capacity", f"--workdir={tmp_path}/run", "--config.train.num_steps=3",
    f"--config.{CAPACITY}.factor=0.5", f"--config.{CAPACITY}.max_drop_rate={allowed}",
    "--config.samples.every=0", "--config.evaluation.every=0",
  )
  assert done.code == code, done.err
  lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
  assert min(layer["drop_rate"] for layer in lines[0]["layers"].values()) > 0.05
  if code:
    assert [line["step"] for line in lines] == [1]
    told = [line for line in done.err.splitlines() if "dropped" in line]
    assert len(told) == 1 and "step 1: layer" in told[0] and "5.00% are allowed" in told[0], told
    events = (tmp_path / "run/events.jsonl").read_text().splitlines()
    assert [e["code"] for e in map(json.loads, events) if e["event"] == "failed"] == [5]
  else:
    assert len(lines) == 3
