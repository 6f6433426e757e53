"""A run that is told to stop saves and says so; told twice, it stops at once. Both go on."""

import signal

import pytest

from tests.faults import points, runs

PHASES = ("compile", "step", "save", "evaluation", "samples", "data")
SIGNALS = {"sigterm": (signal.SIGTERM, 42), "ctrl_c": (signal.SIGINT, 130)}


@pytest.mark.slow
@pytest.mark.parametrize("name", SIGNALS)
def test_a_run_told_to_stop_saves_and_goes_on_undisturbed(case, name, seed):
  rng = case.begin(f"{name}_once", seed)
  number, code = SIGNALS[name]
  at = points.draw(rng.choice(PHASES), rng)
  ended = case.run({"do": "shoot", "number": number, "at": at})
  assert "Traceback" not in ended.err, ended.err
  stopped = runs.events(case.workdir, "stopped") if case.has("events.jsonl") else []
  if ended.code == 0:  # it was in its last step, or had made it
    assert runs.events(case.workdir, "done")
  else:
    assert ended.code == code, ended
    assert len([line for line in ended.err.splitlines() if line]) == 1, ended.err
    assert not stopped or stopped[-1]["step"] == runs.steps_saved(case.workdir)[-1]
  case.recover()


@pytest.mark.slow
@pytest.mark.parametrize("name", SIGNALS)
def test_a_run_told_twice_to_stop_ends_at_once_and_goes_on_undisturbed(case, name, seed):
  rng = case.begin(f"{name}_twice", seed)
  number, code = SIGNALS[name]
  pause_s = round(rng.uniform(0.0, 1.0), 3)
  twice = {"do": "shoot_twice", "number": number, "pause_s": pause_s}
  at = points.draw(rng.choice(("step", "evaluation", "samples")), rng)
  # A save that never ends: only the second signal can end the run.
  save = {"do": "stay", "seconds": 900, "at": points.before(f"{points.SAVER}.finish")}
  ended = case.run({**twice, "at": at}, save)
  assert ended.code == code, ended
  assert "Traceback" not in ended.err, ended.err
  case.recover()
