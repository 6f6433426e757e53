import subprocess
import sys

SCRIPT = """
import signal, time
from launch.cli import StopSignals

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
