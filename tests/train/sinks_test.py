import errno
import threading
import types

import pytest

from jaxmoe.train import sinks
from jaxmoe.train.sinks import MAX_WAITING, Sinks, flatten


class Kept:
  """A sink that keeps what it is given."""

  name = "kept"

  def __init__(self):
    self.calls = []

  def resume(self, step):
    self.calls.append(("resume", step))

  def write(self, line):
    self.calls.append(("write", line["step"]))

  def close(self):
    self.calls.append(("close",))


class Failing(Kept):
  """A sink that raises `error` at its first `times` writes."""

  name = "failing"

  def __init__(self, error, times=10**9, at="write"):
    super().__init__()
    self.error, self.times, self.at = error, times, at

  def resume(self, step):
    if self.at == "resume":
      raise self.error
    super().resume(step)

  def write(self, line):
    super().write(line)
    if self.at == "write" and self.times > 0:
      self.times -= 1
      raise self.error

  def close(self):
    super().close()
    if self.at == "close":
      raise self.error


class Hanging(Kept):
  """A sink that does not return until it is let go."""

  name = "hanging"

  def __init__(self, at="write"):
    super().__init__()
    self.at, self.entered, self.go = at, threading.Event(), threading.Event()

  def resume(self, step):
    self._wait("resume")
    super().resume(step)

  def write(self, line):
    self._wait("write")
    super().write(line)

  def close(self):
    self._wait("close")
    super().close()

  def _wait(self, here):
    if self.at == here:
      self.entered.set()
      self.go.wait()


@pytest.fixture
def world():
  """Returns a function from sinks to Sinks, with all that is reported."""
  seen = types.SimpleNamespace(events=[], said=[])

  def make(*chosen):
    def event(kind, **fields):
      assert threading.current_thread() is threading.main_thread()
      seen.events.append({"event": kind, **fields})

    return Sinks(chosen, event, seen.said.append)

  seen.make = make
  return seen


def steps(first, last):
  return [("write", step) for step in range(first, last + 1)]


def feed(to, first, last):
  for step in range(first, last + 1):
    to({"step": step})


def test_a_sink_gets_every_line_in_order_and_is_closed(world):
  kept = Kept()
  to = world.make(kept)
  feed(to, 5, 9)
  to.rollback(6)
  feed(to, 7, 9)
  to.close(60)
  expected = [("resume", 4), *steps(5, 9), ("resume", 6), *steps(7, 9), ("close",)]
  assert kept.calls == expected
  assert (world.events, world.said) == ([], [])


def test_without_sinks_there_is_nothing_to_do(world):
  to = world.make()
  feed(to, 1, 3)
  to.close()
  assert world.events == []


@pytest.mark.parametrize(
  "error", [RuntimeError("no\nroute"), OSError(errno.ENOSPC, "No space left"), SystemExit(3)]
)
def test_a_sink_that_raises_is_switched_off_and_told_once_while_the_others_go_on(world, error):
  failing, kept = Failing(error), Kept()
  to = world.make(failing, kept)
  feed(to, 1, 9)
  to.close(60)
  assert failing.calls == [("resume", 0), *steps(1, 3), ("close",)]
  assert kept.calls == [("resume", 0), *steps(1, 9), ("close",)]
  (event,) = world.events
  assert (event["event"], event["sink"]) == ("sink_failed", "failing")
  assert event["why"].startswith(f"switched off: {type(error).__name__}: ")
  assert "\n" not in event["why"]
  assert world.said == [f"sink failing: {event['why']}; the run itself is not touched"]


def test_a_sink_that_was_switched_off_is_told_of_while_the_run_goes_on(world):
  failing = Failing(RuntimeError("gone"))
  to = world.make(failing)
  feed(to, 1, 3)
  to._couriers[0]._thread.join(60)
  assert world.events == []
  to({"step": 4})
  assert len(world.events) == len(world.said) == 1
  to({"step": 5})
  to.close(60)
  assert len(world.events) == len(world.said) == 1


def test_a_passing_failure_costs_its_lines_only(world):
  failing = Failing(RuntimeError("once"), times=2)
  to = world.make(failing)
  feed(to, 1, 9)
  to.close(60)
  assert failing.calls == [("resume", 0), *steps(1, 9), ("close",)]
  assert world.events == [
    {
      "event": "sink_failed",
      "sink": "failing",
      "why": "0 lines were dropped, too slow, and 2 failed",
    }
  ]


@pytest.mark.parametrize("at, why", [("resume", "switched off: "), ("close", "its end failed: ")])
def test_a_sink_that_cannot_start_or_end_is_told_at_once(world, at, why):
  failing = Failing(OSError(30, "Read-only file system"), at=at)
  to = world.make(failing)
  feed(to, 1, 2)
  to.close(60)
  (event,) = world.events
  assert event["why"] == f"{why}OSError: [Errno 30] Read-only file system"
  assert ("write", 1) in failing.calls or at == "resume"


@pytest.mark.parametrize("at", ["resume", "write", "close"])
def test_a_sink_that_hangs_holds_up_neither_lines_nor_the_end(world, at):
  hanging, kept = Hanging(at), Kept()
  to = world.make(hanging, kept)
  feed(to, 1, 5)
  if at == "close":
    to._couriers[0].put(lambda sink: sink.entered.set())
  hanging.entered.wait(60)
  to.close(0.05)
  left = {"resume": 5, "write": 4, "close": 0}[at]
  assert [(event["sink"], event["why"]) for event in world.events if event["sink"] != "kept"] == [
    ("hanging", f"did not finish within 0.05 s; {left} lines were left")
  ]
  hanging.go.set()
  for courier in to._couriers:
    courier._thread.join(60)
  assert kept.calls == [("resume", 0), *steps(1, 5), ("close",)]


def test_a_slow_sink_loses_lines_that_are_counted_but_no_rollback(world):
  slow = Hanging()
  to = world.make(slow)
  to({"step": 1})
  slow.entered.wait(60)
  feed(to, 2, 1 + MAX_WAITING + 7)
  to.rollback(3)
  slow.at = None
  slow.go.set()
  to.close(60)
  assert slow.calls == [("resume", 0), *steps(1, 1 + MAX_WAITING), ("resume", 3), ("close",)]
  assert [event["why"] for event in world.events] == [
    "7 lines were dropped, too slow, and 0 failed"
  ]


def test_a_line_becomes_scalars_by_path_and_long_lists():
  load = [1 / 64] * 64
  layers = {
    "0": {"load": [0.25, 0.75], "load_entropy": 0.9, "dead": 0, "dropped": {"capacity": 3}},
    "5": {"load": load, "router_z": None},
  }
  routing = {"0": {"counts": {"code": [1, 2]}, "mutual_information": 0.5, "shuffled_95": [0, 0.1]}}
  line = {
    "step": 7,
    "loss": None,
    "grad_norm": 1.5,
    "layers": layers,
    "eval": {"domains": {"code": 1.25}, "routing": routing},
    "time": {"unix_s": 1e9, "mfu": 0.5, "seconds": {"step": 0.1}},
  }
  scalars, lists = flatten(line)
  assert scalars == {
    "grad_norm": 1.5,
    "layers/0/load/0": 0.25,
    "layers/0/load/1": 0.75,
    "layers/0/load_entropy": 0.9,
    "layers/0/dead": 0.0,
    "layers/0/dropped/capacity": 3.0,
    "eval/domains/code": 1.25,
    "eval/routing/0/mutual_information": 0.5,
    "eval/routing/0/shuffled_95/0": 0.0,
    "eval/routing/0/shuffled_95/1": 0.1,
    "time/mfu": 0.5,
    "time/seconds/step": 0.1,
  }
  assert lists == {"layers/5/load": load}


def test_a_sink_s_thread_does_not_keep_the_process_alive():
  to = Sinks([Kept()], lambda *a, **k: None, lambda text: None)
  assert all(courier._thread.daemon for courier in to._couriers)
  to.close(60)


def test_a_long_message_stays_one_short_line():
  assert len(sinks._one_line(ValueError("x\n" * 5000))) < 250
  assert sinks._one_line(KeyError()) == "KeyError"
