"""Whole runs on one device, eight virtual ones, two and four processes; killed and stopped."""

import json
import os
import pathlib
import signal
import time

import numpy as np
import pytest

pytestmark = pytest.mark.slow

LAYOUTS = {"1": (1, 1), "8 virtual": (1, 8), "2 x 4": (2, 4), "4": (4, 1)}
HEARTBEAT_S = 10  # that of `start_on`
LONG = ("train.num_steps=50", "train.batch_size=8", "evaluation.every=25")

KILLER = """
import os, runpy, signal, sys, threading, time

point, sys.argv = sys.argv[1], ["launch/train.py", *sys.argv[2:]]

def shoot(*ignored):
  os.kill(os.getpid(), signal.SIGKILL)

def wrap(owner, name, wanted, after=False, delay_s=0.0):
  real, calls = getattr(owner, name), [0]
  def wrapped(*args, **options):
    calls[0] += 1
    if calls[0] == wanted and delay_s:
      threading.Timer(delay_s, shoot).start()
    elif calls[0] == wanted and not after:
      shoot()
    result = real(*args, **options)
    if calls[0] == wanted and after and not delay_s:
      shoot()
    return result
  setattr(owner, name, wrapped)

from jaxmoe.checkpoint.orbax_store import OrbaxStore
from jaxmoe.train import hooks
from jaxmoe.train.trainer import Trainer

POINTS = {
  "compile": lambda: wrap(Trainer, "compiled_step", 1, delay_s=0.3),
  "line_2": lambda: wrap(Trainer, "log_step", 2, after=True),
  "evaluation": lambda: wrap(hooks.EvaluationHook, "__call__", 1, delay_s=0.01),
  "save": lambda: wrap(OrbaxStore, "write", 1, after=True),
  "after_save": lambda: wrap(OrbaxStore, "wait", 2, after=True),
}
if os.environ["JAXMOE_PROCESS"] == "VICTIM":
  POINTS[point]()
runpy.run_module("launch.train", run_name="__main__", alter_sys=True)
"""


def lines(workdir):
  """Returns the lines of a run without what depends on the clock."""
  found = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
  return [{name: value for name, value in line.items() if name != "time"} for line in found]


def events(workdir, kind):
  found = map(json.loads, (workdir / "events.jsonl").read_text().splitlines())
  return [event for event in found if event["event"] == kind]


def left_behind(workdir):
  return {
    "lines": lines(workdir),
    "digest": events(workdir, "done")[-1]["digest"],
    "samples": (workdir / "samples.md").read_bytes(),
    "half done": [path.name for path in (workdir / "checkpoints").glob("*tmp*")],
  }


@pytest.fixture(scope="module")
def long_runs(train_on, tmp_path_factory):
  """Returns the workdirs of 50 steps on each of the layouts."""
  folder = tmp_path_factory.mktemp("long")
  for name, (processes, devices) in LAYOUTS.items():
    code, _, err = train_on(processes, devices, folder / name, changes=LONG)
    assert code == 0, (name, err)
  return folder


@pytest.fixture(scope="module")
def four(train_on, tmp_path_factory):
  """Returns the workdir of an undisturbed run of four processes."""
  workdir = tmp_path_factory.mktemp("four") / "run"
  code, _, err = train_on(4, 1, workdir)
  assert code == 0, err
  return workdir


@pytest.mark.parametrize("name", list(LAYOUTS)[1:])
def test_losses_are_those_of_one_device(long_runs, name):
  one, other = (np.array([line["loss"] for line in lines(long_runs / of)]) for of in ("1", name))
  np.testing.assert_allclose(other[:5], one[:5], rtol=1e-5)
  np.testing.assert_allclose(other[49], one[49], rtol=2e-3)


@pytest.mark.parametrize("turn", [1, -1])
@pytest.mark.parametrize("name", LAYOUTS)
def test_any_layout_restores_every_bit_that_another_saved(long_runs, train_on, name, turn):
  names = list(LAYOUTS)
  reader = names[(names.index(name) + turn) % len(names)]
  saved = events(long_runs / name, "done")[0]["digest"]
  code, out, err = train_on(*LAYOUTS[reader], long_runs / name, changes=LONG)
  assert code == 0, err
  assert "nothing to do" in out
  assert events(long_runs / name, "done")[-1]["digest"] == saved


def test_a_run_stopped_on_two_processes_goes_on_on_eight_devices(
  long_runs, train_on, start_on, tmp_path
):
  workdir = tmp_path / "run"
  process = start_on(2, 1, workdir, changes=(*LONG, "train.checkpoint_every=20"))
  while not (workdir / "checkpoints" / "20").is_dir():
    assert process.poll() is None, process.communicate()
  process.send_signal(signal.SIGTERM)
  process.communicate(timeout=300)
  code, _, err = train_on(1, 8, workdir, changes=LONG)
  assert code == 0, err
  expected = [line["loss"] for line in lines(long_runs / "1")]
  found = [line["loss"] for line in lines(workdir)]
  np.testing.assert_allclose(found, expected, rtol=2e-3)


@pytest.mark.parametrize(
  ("point", "victim"),
  [("compile", 2), ("line_2", 0), ("evaluation", 3), ("save", 0), ("after_save", 1)],
)
def test_one_of_four_is_killed_and_the_rerun_ends_up_undisturbed(
  train_on, four, tmp_path, point, victim
):
  workdir = tmp_path / "run"
  killer = ("python", "-c", KILLER.replace("VICTIM", str(victim)), point)
  code, _, err = train_on(4, 1, workdir, program=killer)
  assert code == 43, err
  assert f"process {victim} was ended by SIGKILL" in err
  code, _, err = train_on(4, 1, workdir)
  assert code == 0, err
  assert left_behind(workdir) == left_behind(four)


def test_sigterm_to_launch_local_saves_on_all_and_ends_with_42(
  train_on, start_on, four, tmp_path
):
  workdir = tmp_path / "run"
  process = start_on(4, 1, workdir, changes=["train.log_every=1"])
  while not process.stdout.readline().startswith("step 1/"):
    assert process.poll() is None
  process.send_signal(signal.SIGTERM)
  _, err = process.communicate(timeout=300)
  assert process.returncode == 42, err
  assert err.count("stopping: finishing the step") == 1, err
  stopped = events(workdir, "stopped")[-1]["step"]
  assert (workdir / "checkpoints" / str(stopped)).is_dir()
  code, out, err = train_on(4, 1, workdir)
  assert code == 0, err
  assert f"going on from step {stopped}" in out
  assert left_behind(workdir) == left_behind(four)


@pytest.mark.parametrize("frozen", [0, 1])
def test_a_frozen_process_ends_the_others_within_the_heartbeat_and_five_seconds(
  start_on, tmp_path, frozen
):
  changes = ["train.log_every=1", "train.num_steps=9999"]
  process = start_on(2, 1, tmp_path / "run", changes=changes)
  while not process.stdout.readline().startswith("step 1/"):
    assert process.poll() is None
  children = pathlib.Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
  os.kill(int(children[frozen]), signal.SIGSTOP)
  started = time.monotonic()
  _, err = process.communicate(timeout=120)
  took = time.monotonic() - started
  assert process.returncode == 43, err
  assert took < HEARTBEAT_S + 5 + 1, took  # one for the launcher itself
