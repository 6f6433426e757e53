"""Where the wall time went sums to what a clock outside measured, over restarts too."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from jaxmoe.train.goodput import goodput
from jaxmoe.train.run_log import read_lines
from tests.faults.runs import ROOT

STEPS = 5000
WITHIN = 0.01


def train(workdir, home, kill_at=None):
  """Runs a process of its own to its end, or until so many lines are written.

  Returns when it printed its last line: what the interpreter does after that nobody can book.
  """
  changes = {
    "train.num_steps": STEPS, "train.checkpoint_every": 400, "evaluation.every": 500,
    "samples.every": 1000,
  }  # fmt: skip
  arguments = [f"--config.{path}={value}" for path, value in changes.items()]
  env = {**os.environ, "XDG_CACHE_HOME": str(home), "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
  process = subprocess.Popen(
    [sys.executable, "-m", "launch.train", "--config=configs/tiny.py", f"--workdir={workdir}",
     *arguments],
    cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
  )  # fmt: skip
  lines = workdir / "metrics.jsonl"
  while kill_at is not None and process.poll() is None:
    if lines.exists() and lines.read_bytes().count(b"\n") >= kill_at:
      process.send_signal(signal.SIGKILL)
      break
    time.sleep(0.05)
  out, last_s = [], 0.0
  with process.stdout:
    for line in process.stdout:
      out.append(line)
      last_s = time.time()
  assert process.wait(timeout=600) == (0 if kill_at is None else -signal.SIGKILL), out
  return last_s


@pytest.mark.slow
@pytest.mark.parametrize("kills", [(), (300, 900, 1500, 2700, 4000)], ids=["undisturbed", "killed"])
def test_seconds_by_category_sum_to_the_wall_time_measured_outside(tmp_path, kills):
  workdir, home = tmp_path / "run", tmp_path / "home"
  start = time.time()
  for kill_at in kills:
    train(workdir, home, kill_at)
  wall_s = train(workdir, home) - start
  found = goodput(read_lines(workdir / "metrics.jsonl"), read_lines(workdir / "events.jsonl"))
  print(f"{wall_s:.1f} s outside, {found}", json.dumps(found.seconds))
  assert abs(sum(found.seconds.values()) - wall_s) <= WITHIN * wall_s
  assert abs(found.seconds["other"]) <= WITHIN * wall_s
  assert (found.seconds["lost"] > 0) == bool(kills) == (found.seconds["down"] > 0)
