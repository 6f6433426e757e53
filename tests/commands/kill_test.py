"""A run that is killed and started again ends up as if nothing had happened.

The process kills itself, with a real SIGKILL, at a point named on its command line, so that no test
waits for the right moment.
"""

import json
import signal

import pytest

KILLER = """
import os, pathlib, runpy, signal, sys, threading, time

point, number, sys.argv = sys.argv[1], getattr(signal, sys.argv[2]), sys.argv[2:]
workdir = pathlib.Path(sys.argv[-1].removeprefix("--workdir="))
sys.argv[0] = "launch/train.py"

def shoot(*ignored):
  os.kill(os.getpid(), number)

def soon(seconds):
  threading.Timer(seconds, shoot).start()

def wrap(owner, name, before=None, after=None):
  real, calls = getattr(owner, name), [0]
  def wrapped(*args, **options):
    calls[0] += 1
    if before: before(calls[0], args)
    result = real(*args, **options)
    if after: after(calls[0], args)
    return result
  setattr(owner, name, wrapped)

from jaxmoe.train import trainer
from jaxmoe.train import run_log

def at(wanted, act=shoot):
  return lambda call, args: act() if call == wanted else None

def wait_for(step):
  while not (workdir / "checkpoints" / str(step)).is_dir():
    time.sleep(0.01)
  shoot()

def stay():
  print("here", flush=True)
  time.sleep(600)

RunLog, Trainer = run_log.RunLog, trainer.Trainer
{
  "compile": lambda: wrap(Trainer, "compiled_step", at(1, lambda: soon(0.2))),
  "line_2": lambda: wrap(RunLog, "step", after=at(2)),
  "line_5_saved": lambda: wrap(RunLog, "step", after=at(5, lambda: wait_for(4))),
  "stay": lambda: wrap(RunLog, "step", after=at(2, stay)),
}[point]()
runpy.run_module("launch.train", run_name="__main__", alter_sys=True)
"""

@pytest.fixture
def end_at(started, again, tmp_path):
  """Returns a function that runs until a point where the process gets a signal."""

  def run(point, number="SIGKILL", workdir=tmp_path / "run"):
    process = started(
      "train", point, number, *again, f"--workdir={workdir}", program=("-c", KILLER)
    )
    out, err = process.communicate(timeout=300)
    return process.returncode, out, err

  return run


@pytest.fixture
def go_on(here, again, tmp_path):
  """Returns a function that runs the same command in the same workdir again, to its end."""

  def run():
    result = here("train", *again, f"--workdir={tmp_path}/run")
    assert result.code == 0, result
    return result

  return run


def events(workdir, kind):
  lines = (workdir / "events.jsonl").read_text().splitlines()
  return [event for event in map(json.loads, lines) if event["event"] == kind]


def left_behind(workdir):
  """Returns what must not depend on the clock or on what happened on the way."""
  lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
  for line in lines:
    assert line.pop("time")
  return {
    "metrics": [json.dumps(line) for line in lines],
    "digest": events(workdir, "done")[-1]["digest"],
    "samples": (workdir / "samples.md").read_bytes(),
    "config": (workdir / "config.json").read_bytes(),
    "names": sorted(path.name for path in workdir.iterdir()),
    "steps": sorted(path.name for path in (workdir / "checkpoints").iterdir()),
  }


def test_a_run_killed_after_a_checkpoint_ends_up_undisturbed(end_at, go_on, trained, tmp_path):
  code, _, err = end_at("line_5_saved")
  assert code == -signal.SIGKILL, err
  result = go_on()
  assert "going on from step 4" in result.out
  assert [event["step"] for event in events(tmp_path / "run", "resume")] == [4]
  assert left_behind(tmp_path / "run") == left_behind(trained)


def test_sigterm_finishes_the_step_and_saves_and_the_run_ends_up_undisturbed(
  end_at, go_on, trained, tmp_path
):
  code, out, err = end_at("line_2", "SIGTERM")
  assert code == 42, err
  assert "stopping: finishing the step, then saving" in err
  stopped = events(tmp_path / "run", "stopped")[-1]["step"]
  # The line of step 2 is written while step 3 runs.
  assert stopped == 3
  assert f"stopped at step {stopped}, saved" in out
  assert (tmp_path / "run" / "checkpoints" / str(stopped)).is_dir()
  assert f"going on from step {stopped}" in go_on().out
  assert {**left_behind(tmp_path / "run"), "steps": []} == {**left_behind(trained), "steps": []}


@pytest.mark.slow
def test_a_terminal_that_hangs_up_takes_its_reader_along_and_the_run_saves(
  started, again, tmp_path
):
  workdir = tmp_path / "run"
  before = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # the tests may run under nohup
  process = started(
    "train", "line_2", "SIGHUP", *again, f"--workdir={workdir}", program=("-c", KILLER)
  )
  signal.signal(signal.SIGHUP, before)
  process.stdout.close()
  err = process.stderr.read()
  process.stderr.close()
  assert (process.wait(timeout=300), len(err.split("\n", 2))) == (42, 3), err
  assert "stopping: finishing the step, then saving" in err
  assert events(workdir, "stopped")[-1]["step"] == 3
  assert (workdir / "checkpoints" / "3").is_dir()
  assert [event["why"] for event in events(workdir, "output_lost")] == ["Broken pipe"]


@pytest.mark.slow
def test_the_same_command_twice_leaves_the_same_numbers(alone, again, trained, tmp_path):
  for name in ("a", "b"):
    result = alone("train", *again, f"--workdir={tmp_path / name}")
    assert result.code == 0, result
  assert left_behind(tmp_path / "a") == left_behind(tmp_path / "b") == left_behind(trained)


@pytest.mark.slow
@pytest.mark.parametrize(("number", "expected"), [("SIGTERM", 42), ("SIGINT", 130)])
def test_a_signal_before_the_first_step_ends_at_once_without_a_traceback(
  end_at, go_on, trained, tmp_path, number, expected
):
  code, _, err = end_at("compile", number)
  assert code == expected
  assert len(err.splitlines()) == 1, err
  assert not (tmp_path / "run" / "metrics.jsonl").read_bytes()
  go_on()
  assert left_behind(tmp_path / "run") == left_behind(trained)


@pytest.mark.slow
def test_a_second_run_is_refused_while_the_first_lives_and_not_after(
  started, here, again, go_on, trained, tmp_path
):
  workdir = tmp_path / "run"
  arguments = ("stay", "SIGKILL", *again, f"--workdir={workdir}")
  process = started("train", *arguments, program=("-c", KILLER))
  while process.stdout.readline() != "here\n":
    assert process.poll() is None
  before = (workdir / "metrics.jsonl").read_bytes(), sorted(workdir.iterdir())
  second = here("train", *again, f"--workdir={workdir}")
  assert second.code == 2
  assert "in use by another run" in second.err
  assert len(second.err.splitlines()) == 1
  assert ((workdir / "metrics.jsonl").read_bytes(), sorted(workdir.iterdir())) == before
  reader = here("evaluate", f"--workdir={workdir}")
  assert reader.code == 4, "reading is not refused; there is no checkpoint yet"
  process.kill()
  process.communicate()
  go_on()
  assert left_behind(workdir) == left_behind(trained)
