import signal
import subprocess
import sys

import pytest

from jaxmoe.commands.process.stop_signals import StopSignals

SCRIPT = """
import signal, time
from jaxmoe.commands.process.stop_signals import StopSignals

class Last:
  def __del__(self):
    signal.raise_signal(signal.SIGINT)
    time.sleep(0.01)  # the handler runs, and raises, in here

StopSignals()
try:
  last = Last()
  del last
  time.sleep(30)
except KeyboardInterrupt:
  print("interrupted")
"""


def test_an_interrupt_that_a_destructor_swallows_comes_again():
  child = subprocess.run(
    [sys.executable, "-c", SCRIPT], capture_output=True, text=True, timeout=60, check=False
  )
  assert (child.returncode, child.stdout, child.stderr) == (0, "interrupted\n", "")


@pytest.fixture
def _as_before(monkeypatch):
  """Leaves signals and hooks of this process as they were."""
  monkeypatch.setattr(sys, "unraisablehook", sys.unraisablehook)
  numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
  handlers = {number: signal.getsignal(number) for number in numbers}
  yield
  for number, handler in handlers.items():
    signal.signal(number, handler)


@pytest.mark.parametrize(
  ("number", "code"), [(signal.SIGTERM, 42), (signal.SIGHUP, 42), (signal.SIGINT, 130)]
)
def test_each_signal_that_asks_to_stop_has_its_code(_as_before, number, code):
  signal.signal(signal.SIGHUP, signal.SIG_DFL)  # also where the tests themselves run under nohup
  stop = StopSignals()
  assert not stop()
  signal.raise_signal(number)
  assert stop() and stop.exit_code == code


def test_a_hangup_that_nohup_has_ignored_stays_ignored(_as_before):
  signal.signal(signal.SIGHUP, signal.SIG_IGN)
  stop = StopSignals()
  stop()
  signal.raise_signal(signal.SIGHUP)
  assert not stop() and signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
