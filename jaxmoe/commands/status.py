"""Says how a run stands, while it runs or after, from its files alone; it never disturbs the run.

jaxmoe status --workdir=runs/tiny [--watch=5]
"""

from __future__ import annotations

import pathlib
import shutil
import sys
import time

from absl import flags

from jaxmoe.commands.process import command_line
from jaxmoe.core.errors import InputError
from jaxmoe.status.run_status import read_status
from jaxmoe.status.status_page import status_lines

FLAGS = flags.FlagValues()
flags.DEFINE_string("workdir", None, "The run to look at.", flag_values=FLAGS)
flags.DEFINE_float(
  "watch", 0.0, "Seconds between two looks, until the run ends; 0 for one.", 0, flag_values=FLAGS
)

_CLEAR = "\x1b[H\x1b[2J"


def main(arguments: list[str]) -> int:
  """Runs the command; returns the exit code."""
  del arguments
  if not FLAGS.workdir:
    raise InputError("--workdir is missing; give the folder of the run, such as --workdir=runs/a")
  terminal = sys.stdout.isatty()
  while True:
    snapshot = read_status(pathlib.Path(FLAGS.workdir))
    rows = shutil.get_terminal_size().lines if terminal else None
    lines = status_lines(snapshot, rows, sys.stdout.encoding)
    print((_CLEAR if terminal and FLAGS.watch else "") + "\n".join(lines))
    if not FLAGS.watch or snapshot.state != "running":
      return 0
    try:
      time.sleep(FLAGS.watch)
    except KeyboardInterrupt:
      return 0
    if not terminal:
      print()


def run() -> None:
  """Runs the command as this process does, and exits."""
  command_line.run(main, FLAGS, __doc__)


if __name__ == "__main__":
  run()
