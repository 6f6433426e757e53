import pytest

from jaxmoe.train import ledger
from jaxmoe.train.ledger import Ledger


class Time:
  """A clock that tests move; `compiled` is what a compiler has taken so far."""

  def __init__(self):
    self.now, self.compiled = 100.0, 0.0

  def time(self):
    return 1e9 + self.now

  def perf_counter(self):
    return self.now

  def pass_by(self, seconds, compiling=0.0):
    self.now += seconds
    self.compiled += compiling


@pytest.fixture
def clock(monkeypatch):
  made = Time()
  monkeypatch.setattr(ledger, "time", made)
  return made


def test_every_second_is_booked_once_and_phases_inside_phases_count_for_themselves(clock):
  made = Ledger()
  clock.pass_by(1)
  with made.phase("outer"):
    clock.pass_by(2)
    with made.phase("inner"):
      clock.pass_by(4)
    clock.pass_by(8)
  clock.pass_by(16)
  assert made.take("rest") == {"outer": 10, "inner": 4, "rest": 17}
  clock.pass_by(32)
  assert made.take("rest") == {"rest": 32}


def test_time_before_the_ledger_counts_from_the_start_of_the_process(clock):
  made = Ledger(clock.time() - 3)
  clock.pass_by(1)
  assert made.take("start") == {"start": 4}


def test_a_phase_that_raises_is_booked_too(clock):
  made = Ledger()
  with pytest.raises(KeyError), made.phase("data"):
    clock.pass_by(2)
    raise KeyError
  clock.pass_by(1)
  assert made.take("step") == {"data": 2, "step": 1}


def test_compiling_inside_a_phase_is_booked_as_such_and_never_more_than_passed(clock):
  made = Ledger(compile_s=lambda: clock.compiled)
  with made.phase("evaluation"):
    clock.pass_by(5, compiling=3)
  clock.pass_by(2, compiling=1)
  assert made.take("step") == {"evaluation": 2, "compile": 4, "step": 1}
  clock.pass_by(1, compiling=9)
  assert made.take("step") == {"compile": 1, "step": 0}


def test_a_phase_cut_in_two_by_a_record_is_booked_in_both(clock):
  made = Ledger()
  with made.phase("checkpoint"):
    clock.pass_by(2)
    assert made.take("step") == {"checkpoint": 2, "step": 0}
    clock.pass_by(1)
  assert made.take("step") == {"checkpoint": 1, "step": 0}
