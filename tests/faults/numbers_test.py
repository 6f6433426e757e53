"""Steps that would do harm are skipped, the run goes back when they persist; also if killed."""

import signal

import pytest

from tests.faults import numbers, points, runs

KILL = {"do": "shoot", "number": signal.SIGKILL}

BASE = {
  "train.num_steps": 10, "train.checkpoint_every": 2, "train.keep": 3,
  "train.recovery.spike_window": 3,
}
QUIET = {"evaluation.every": 0, "samples.every": 0}
KINDS = ("nan_in_batch", "nan_in_parameter", "nan_in_router_score", "loss_spike")


def recovery(rng):
  """Returns draws of everything that says when and how a run goes back."""
  draws = {"patience": (1, 3), "rollback_steps": (0, 3), "skip_batches": (1, 2)}
  drawn = {name: rng.randint(*bounds) for name, bounds in draws.items()}
  drawn["max_rollbacks"] = rng.choice((0, 1, 2, 3, 3, 3))
  return {f"train.recovery.{name}": value for name, value in drawn.items()}


def fault(kind, rng):
  """Returns the plant of a fault in some batches of the run, and whether it stays in the state."""
  first = rng.randint(4, 8)  # the window of spikes is full then
  batches = list(range(first, first + rng.randint(1, 4)))
  if kind == "nan_in_batch":
    token = rng.choice((257, 10**6, -1, -(10**6)))
    return {"do": kind, "batches": batches, "place": rng.randrange(256), "token": token}, False
  if kind == "nan_in_parameter":
    return {"do": kind, "batches": batches[:1], "leaf": rng.choice(list(numbers.LEAVES))}, True
  if kind == "loss_spike" and rng.random() < 0.5:
    return {"do": "huge_parameters", "batches": batches[:1], "factor": 30.0}, True
  factor = {"factor": 100.0} if kind == "loss_spike" else {}
  return {"do": kind, "batches": batches, **factor}, False


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_run_with_harmful_steps_is_the_same_if_it_is_killed_too(case, twin, kind, seed):
  rng = case.begin(kind, seed)
  changes = {**BASE, **({} if seed % 4 == 0 else QUIET), **recovery(rng)}
  plant, stays = fault(kind, rng)
  whole = twin.run(plant, changes=changes)
  check(whole, twin.workdir, changes, stays, "spike" if kind == "loss_spike" else "not finite")
  back = ["rollback"] * 3 if runs.events(twin.workdir, "rollback") else []
  phase = rng.choice(["step", "save", "data", *back])
  case.hit(phase, also=[plant], changes=changes)
  ended = case.run(plant, changes=changes)
  assert (ended.code, ended.err) == (whole.code, whole.err), ended
  assert runs.metrics(case.workdir) == runs.metrics(twin.workdir)
  if ended.code == 0:
    assert runs.left_behind(case.workdir) == runs.left_behind(twin.workdir)
    case.recovered()
  else:
    case.end_as_stated()


def check(ended, workdir, changes, stays, why):
  """The run was harmed, said so, and did what its recipe says about it."""
  skipped = runs.events(workdir, "skipped")
  rollbacks = runs.events(workdir, "rollback")
  allowed = changes["train.recovery.max_rollbacks"]
  assert {event["why"] for event in skipped} == {why}
  assert len(rollbacks) <= allowed
  for event in rollbacks:
    assert event["to"] < event["step"]
    assert event["skipped_batches"] == changes["train.recovery.skip_batches"]
  if ended.code == 0:
    assert bool(rollbacks) == bool(stays) or not stays
    return
  assert ended.code == 3, ended
  assert len(rollbacks) == allowed, (ended, changes, skipped)
  assert len(ended.err.splitlines()) == 1 and "rollbacks are allowed" in ended.err, ended.err


@pytest.mark.slow
def test_a_run_killed_when_it_has_undone_its_only_checkpoint_starts_anew(case, twin):
  changes = {**BASE, **QUIET, "train.recovery.patience": 1, "train.recovery.rollback_steps": 9}
  plant = {"do": "nan_in_batch", "batches": list(range(3, 6)), "place": 0, "token": -1}
  whole = twin.run(plant, changes=changes)
  assert whole.code == 0, whole
  assert [event["to"] for event in runs.events(twin.workdir, "rollback")] == [2, 0]
  at = {"target": f"{points.STORE}.set_aside", "call": 1, "when": "after"}
  assert case.run(plant, {**KILL, "at": at}, changes=changes).code == -signal.SIGKILL
  assert case.run(plant, changes=changes).code == 0
  assert runs.left_behind(case.workdir) == runs.left_behind(twin.workdir)
