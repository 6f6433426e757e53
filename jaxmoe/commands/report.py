"""Writes what a run did as one page, or several runs laid over each other; of a live run too.

jaxmoe report --workdir=runs/tiny [--workdir=runs/other] [--out=FILE.html]
"""

from __future__ import annotations

import pathlib

from absl import flags

from jaxmoe.commands.process import command_line, run_flags
from jaxmoe.core.errors import InputError
from jaxmoe.core.output import check_output
from jaxmoe.report import write_comparison, write_report
from jaxmoe.train.run_folder import holds_run
from jaxmoe.train.workdir import Workdir

FLAGS = flags.FlagValues()
flags.DEFINE_multi_string(
  "workdir", None, "The run to tell of; given several times, they are compared.", flag_values=FLAGS
)
flags.DEFINE_string(
  "out", None, "The page; DIR/report.html, or comparison.html in the first DIR of several.",
  flag_values=FLAGS,
)  # fmt: skip


def main(arguments: list[str]) -> int:
  """Runs the command; returns the exit code."""
  del arguments
  workdirs = [_run_of(path) for path in FLAGS.workdir or [None]]
  many = len(workdirs) > 1
  default = workdirs[0] / ("comparison.html" if many else "report.html")
  out = default if FLAGS.out is None else pathlib.Path(FLAGS.out)
  check_output(out, f"--out={out}", [file for path in workdirs for file in Workdir(path).needed])
  try:
    written = write_comparison(workdirs, out) if many else write_report(workdirs[0], out)
  except BrokenPipeError:
    raise
  except OSError as error:
    raise InputError(
      f"--out={out}: cannot be written ({error.strerror}); choose another place"
    ) from None
  print(f"written to {written}")
  return 0


def _run_of(path: str | None) -> pathlib.Path:
  """Returns the folder of a run.

  Raises:
    InputError: there is no folder, or none of a run.
  """
  workdir = run_flags.need_workdir(path)
  if not holds_run(workdir.path):
    raise InputError(f"--workdir={path}: no run here (no metrics.jsonl); train one first")
  return workdir.path


def run() -> None:
  """Runs the command as this process does, and exits."""
  command_line.run(main, FLAGS, __doc__)


if __name__ == "__main__":
  run()
