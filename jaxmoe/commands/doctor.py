"""Says whether this machine and installation are fit to train, what is wrong, and how to mend it.

jaxmoe doctor [--workdir=runs/tiny] [--out=report.txt]

It writes 64 MB next to the workdir and trains three steps in a temporary folder, and removes both.
Exit code 0 if there is no problem (warnings do not count), else 1.
"""

from __future__ import annotations

import os
import pathlib
import sys

from absl import flags

from jaxmoe.commands.process import command_line
from jaxmoe.core.errors import InputError
from jaxmoe.core.output import check_output, write_output
from jaxmoe.doctor.bug_report import bug_report, finding_lines, without_home
from jaxmoe.doctor.diagnosis import diagnose
from jaxmoe.doctor.facts import collect
from jaxmoe.status.text_columns import shown

FLAGS = flags.FlagValues()
flags.DEFINE_string("workdir", "runs", "Where runs are to be written.", flag_values=FLAGS)
flags.DEFINE_string("out", None, "A new text file for a bug report.", flag_values=FLAGS)


def main(arguments: list[str]) -> int:
  """Runs the command; returns the exit code."""
  del arguments
  if FLAGS.out:
    check_out(pathlib.Path(FLAGS.out))
  home = os.environ.get("XDG_CACHE_HOME") or str(pathlib.Path.home() / ".cache")
  print("looking at this machine, and training three steps (about 20 s) ...")
  facts = collect(pathlib.Path(FLAGS.workdir), pathlib.Path(home) / "jaxmoe")
  findings = diagnose(facts)
  lines = [without_home(line) for line in finding_lines(findings)]
  for line in lines:
    print(shown(line, sys.stdout.encoding))
  if FLAGS.out:
    write_output(FLAGS.out, f"--out={FLAGS.out}", bug_report(lines, facts))
    print(f"written to {FLAGS.out}")
  return 1 if any(finding.level == "problem" for finding in findings) else 0


def check_out(path: pathlib.Path) -> None:
  """Returns if a report can be written at `path`.

  Raises:
    InputError: it is a folder, a file that is there already, or cannot be written.
  """
  if os.path.isfile(path) or os.path.isdir(path):
    raise InputError(f"--out={path}: is there already; give a new name")
  check_output(path, f"--out={path}")


def run() -> None:
  """Runs the command as this process does, and exits."""
  command_line.run(main, FLAGS, __doc__)


if __name__ == "__main__":
  run()
