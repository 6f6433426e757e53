"""Runs a command as N processes of this machine, as a cluster would run it.

jaxmoe local --processes=4 --devices_per_process=2 --
  jaxmoe train --config=configs/tiny.py --workdir=runs/tiny --config.parallel.data=8

For trying and testing, on the CPU; each process has --devices_per_process virtual devices. With
--processes=1 one process has them all. Commands that do not train are run by one process.

What the processes other than the first print comes with their number before it. When one ends
badly, the others end by themselves within --heartbeat_s + 5 s or are killed. The exit code is the
worst of theirs; 43 if one was killed: the same command goes on. Signals are passed on.
"""

from __future__ import annotations

import functools
import re
import sys
from collections.abc import Sequence

from absl import flags

from jaxmoe.commands import COMMANDS
from jaxmoe.commands.process import command_line
from jaxmoe.commands.process.patient_output import outlive_readers
from jaxmoe.commands.process.process_group import ProcessGroup
from jaxmoe.core.errors import InputError

FLAGS = flags.FlagValues()
MOST = 1024  # of one machine
flags.DEFINE_integer("processes", 1, "How many processes.", 1, MOST, flag_values=FLAGS)
flags.DEFINE_integer(
  "devices_per_process", 1, "Virtual devices of each.", 1, MOST, flag_values=FLAGS
)
flags.DEFINE_integer(
  "heartbeat_s", 30, "Seconds without a sign of life after which a process counts as dead.",
  lower_bound=1, flag_values=FLAGS,
)  # fmt: skip


def main(arguments: list[str], words: Sequence[str] = ()) -> int:
  """Runs the command that `words` are; returns the exit code."""
  del arguments
  outlive_readers()
  try:
    program = program_of(words)
    group = ProcessGroup(program, FLAGS.processes, FLAGS.devices_per_process, FLAGS.heartbeat_s)
  except OSError as error:
    raise InputError(f"{' '.join(words[:1])}: cannot be run ({error.strerror})") from None
  return group.wait()


def program_of(words: Sequence[str]) -> list[str]:
  """Returns the command to run: as it is, or one of ours by this interpreter.

  `NAME ...`, `launch.NAME ...` and `jaxmoe NAME ...` are ours.

  Raises:
    InputError: there is none.
  """
  if not words:
    raise InputError(
      "there is no command; give one behind --, such as -- train --config=tiny --workdir=..."
    )
  ours = words[1:] if words[0] == "jaxmoe" else words
  name = ours[0].removeprefix("launch.") if ours else ""
  if name in COMMANDS:
    return [sys.executable, "-m", f"jaxmoe.commands.{name}", *ours[1:]]
  if re.fullmatch(r"python3?", words[0]):
    return [sys.executable, *words[1:]]
  return list(words)


def run() -> None:
  """Runs the command as this process does, and exits."""
  at = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
  sys.argv, words = sys.argv[:at], sys.argv[at + 1 :]
  command_line.run(functools.partial(main, words=words), FLAGS, __doc__)


if __name__ == "__main__":
  run()
