import os
import signal
import subprocess
import sys
import time

import pytest

from jaxmoe.train import pause_detector, wall_clock
from jaxmoe.train.pause_detector import BEAT_S, PauseDetector
from jaxmoe.train.wall_clock import WallClock


class Time:
  """A clock that tests move; `compiled` is what a compiler has taken so far, `used` all cores."""

  def __init__(self):
    self.now, self.compiled, self.used = 100.0, 0.0, 0.0

  def time(self):
    return 1e9 + self.now

  def perf_counter(self):
    return self.now

  def process_time(self):
    return self.used

  monotonic = perf_counter

  def pass_by(self, seconds, compiling=0.0, used=0.0):
    self.now += seconds
    self.compiled += compiling
    self.used += used


@pytest.fixture
def clock(monkeypatch):
  made = Time()
  monkeypatch.setattr(wall_clock, "time", made)
  monkeypatch.setattr(pause_detector, "time", made)
  return made


def test_every_second_is_booked_once_and_phases_inside_phases_count_for_themselves(clock):
  made = WallClock()
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
  made = WallClock(clock.time() - 3)
  clock.pass_by(1)
  assert made.take("start") == {"start": 4}


def test_a_phase_that_raises_is_booked_too(clock):
  made = WallClock()
  with pytest.raises(KeyError), made.phase("data"):
    clock.pass_by(2)
    raise KeyError
  clock.pass_by(1)
  assert made.take("step") == {"data": 2, "step": 1}


def test_compiling_inside_a_phase_is_booked_as_such_and_never_more_than_passed(clock):
  made = WallClock(compile_s=lambda: clock.compiled)
  with made.phase("evaluation"):
    clock.pass_by(5, compiling=3)
  clock.pass_by(2, compiling=1)
  assert made.take("step") == {"evaluation": 2, "compile": 4, "step": 1}
  clock.pass_by(1, compiling=9)
  assert made.take("step") == {"compile": 1, "step": 0}


def test_a_phase_cut_in_two_by_a_record_is_booked_in_both(clock):
  made = WallClock()
  with made.phase("checkpoint"):
    clock.pass_by(2)
    assert made.take("step") == {"checkpoint": 2, "step": 0}
    clock.pass_by(1)
  assert made.take("step") == {"checkpoint": 1, "step": 0}


def test_what_is_booked_after_a_moment_is_left_to_the_next_record(clock):
  made = WallClock()
  clock.pass_by(2)
  with made.phase("data"):
    clock.pass_by(4)
  clock.pass_by(8)
  assert made.take("start", until_s=103.0) == {"start": 2, "data": 1}
  assert made.take("step", until_s=102.0) == {"step": 0}
  assert made.take("step", until_s=110.0) == {"data": 3, "step": 4}
  assert made.take("step") == {"step": 4}


def test_setting_the_time_of_day_moves_nothing(clock, monkeypatch):
  made = WallClock(clock.time() - 3)
  clock.pass_by(2)
  monkeypatch.setattr(clock, "time", lambda: 1e9 + clock.now - 7200)
  clock.pass_by(1)
  assert made.take("step") == {"step": 6}


@pytest.fixture
def beating(clock, monkeypatch):
  """A detector that runs, whose beats are those of the test."""
  made = PauseDetector()
  monkeypatch.setattr(made, "_beat_until", lambda end: None)
  with made.running():
    yield made


def test_time_in_which_the_process_was_stopped_is_no_step(clock, beating):
  made = WallClock(pauses=beating)
  clock.pass_by(0.5, used=1)
  beating.beat()
  clock.pass_by(60, used=0.1)  # SIGSTOP, SIGCONT, and nobody has beaten yet
  assert made.take("step") == {"step": 0.5 + BEAT_S, "paused": 60 - BEAT_S}
  with made.phase("data"):
    clock.pass_by(30)
    beating.beat()
    clock.pass_by(0.25)
  assert made.take("step") == {"data": 0.25 + BEAT_S, "paused": 30 - BEAT_S, "step": 0}


def test_who_is_busy_or_stopped_for_a_moment_is_not_paused(clock, beating):
  clock.pass_by(60, used=50)  # another thread held the interpreter's lock
  assert beating.beat() == 0
  clock.pass_by(6, used=2 * BEAT_S * os.cpu_count() + 0.1)  # and got few cores for it
  assert beating.beat() == 0
  clock.pass_by(0.9)
  assert beating.beat() == 0


def test_without_a_thread_that_beats_nobody_knows_of_a_stop(clock):
  made = WallClock()
  clock.pass_by(60)
  assert made.take("start") == {"start": 60}


@pytest.mark.slow
def test_a_process_that_was_stopped_finds_out():
  """The real thread, in a process that a signal stops for two seconds."""
  program = (
    "import os, time\n"
    "from jaxmoe.train.pause_detector import PauseDetector\n"
    "pauses = PauseDetector()\n"
    "with pauses.running():\n"
    "  print('ready', flush=True)\n"
    "  input()\n"
    "  print(pauses.beat())\n"
  )
  with subprocess.Popen(
    [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
  ) as process:
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGSTOP)
    time.sleep(2)
    process.send_signal(signal.SIGCONT)
    out, _ = process.communicate("\n", timeout=60)
  assert 1.5 < float(out) < 60
