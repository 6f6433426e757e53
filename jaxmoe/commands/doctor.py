"""Says whether this machine and installation are fit to train, what is wrong, and how to mend it.

jaxmoe doctor [--workdir=runs/tiny] [--out=report.txt]

It writes 64 MB next to the workdir and trains three steps in a temporary folder, and removes both.
Exit code 0 if there is no problem (warnings do not count), else 1.
"""

from __future__ import annotations

import os
import pathlib
import platform
import sys
import textwrap
from collections.abc import Iterable

from absl import flags

from jaxmoe.commands.process import command_line
from jaxmoe.core.errors import InputError
from jaxmoe.core.output import check_output, write_output
from jaxmoe.doctor.diagnosis import Finding, diagnose
from jaxmoe.doctor.facts import Facts, collect
from jaxmoe.status.text_columns import WIDTH, fit, shown

FLAGS = flags.FlagValues()
flags.DEFINE_string("workdir", "runs", "Where runs are to be written.", flag_values=FLAGS)
flags.DEFINE_string("out", None, "A new text file for a bug report.", flag_values=FLAGS)

_HEAD = 20  # cells of a line before its text


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
    write_output(FLAGS.out, f"--out={FLAGS.out}", report(lines, facts))
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


def finding_lines(findings: Iterable[Finding]) -> list[str]:
  """Returns the findings as lines of at most 80 cells, and a last line that counts them."""
  findings, lines = list(findings), []
  for finding in findings:
    text = f"{finding.level:<8} {finding.name:<10} {finding.text}"
    lines += _wrapped(text)
    if finding.cure and finding.level != "ok":
      lines += _wrapped(f"{'':<{_HEAD - 1}} fix: {finding.cure}")
  counts = {level: sum(f.level == level for f in findings) for level in ("problem", "warning")}
  ends = [f"{count} {level}{'s' * (count != 1)}" for level, count in counts.items() if count]
  return [*lines, ", ".join(ends) or "all is well"]


def report(lines: Iterable[str], facts: Facts) -> str:
  """Returns the text of a bug report: the lines, the system, and how the trial run failed."""
  parts = ["jaxmoe doctor", f"system: {platform.platform()}", "", *lines]
  if facts.trial.errors:
    parts += ["", "The trial run's last words:", "", *facts.trial.errors.splitlines()[-60:]]
  return without_home("\n".join(parts)) + "\n"


def without_home(text: str) -> str:
  """Returns text with `~` for the home directory, which may name a person."""
  home = str(pathlib.Path.home()).rstrip("/")
  return text.replace(home, "~") if home else text


def _wrapped(text: str) -> list[str]:
  indent = " " * _HEAD
  lines = textwrap.wrap(text, WIDTH, subsequent_indent=indent, break_on_hyphens=False)
  return [fit(line) for line in lines]


def run() -> None:
  """Runs the command as this process does, and exits."""
  command_line.run(main, FLAGS, __doc__)


if __name__ == "__main__":
  run()
