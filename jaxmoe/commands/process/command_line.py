"""The command line: flags, and one line and an exit code for a mistake. Without JAX.

Exit codes: 0 done; 2 bad input; 3 more steps skipped or rolled back than allowed; 4 no intact
checkpoint or three failed saves; 42 preempted, state saved, or stuck; 43 another process of the run
died, the same command goes on; 130 interrupted, state saved.
"""

from __future__ import annotations

import os
import pathlib
import re
import shlex
import signal
import sys
from collections.abc import Callable, Sequence

from absl import app, flags

from jaxmoe.commands import COMMANDS
from jaxmoe.core.errors import UserFacingError, machine_error
from jaxmoe.core.terminal import escaped

Main = Callable[[list[str]], int | None]
PREEMPTED, INTERRUPTED = 42, 130
ADDRESS, PROCESSES, PROCESS = "JAX_COORDINATOR_ADDRESS", "JAXMOE_PROCESSES", "JAXMOE_PROCESS"
HEARTBEAT_S = "JAXMOE_HEARTBEAT_S"
STARTED_AS = "JAXMOE_STARTED_AS_LAUNCH"
_NAMED = re.compile(rf"\bjaxmoe ({'|'.join(COMMANDS)})\b")
_RANKS = (PROCESS, "OMPI_COMM_WORLD_RANK", "TPU_WORKER_ID", "SLURM_PROCID")


def run(
  main: Main,
  values: flags.FlagValues,
  doc: str | None,
  takes: Sequence[str] = (),
  spreads: bool = False,
) -> None:
  """Parses the flags of one command into `values`, calls `main`, and exits.

  Args:
    main: Gets what was not a flag of `values`, which begins with one of `takes`; returns an exit
      code or None for 0.
    values: The command's flags.
    doc: What `--help` prints first.
    takes: Prefixes of arguments that are left to `main`, such as '--config.'.
    spreads: Whether several processes do it together. What does not is done by process 0 alone.
  """

  def parse(argv: list[str]) -> list[str]:
    return _parse(argv, values, doc or "", takes)

  def guarded(argv: list[str]) -> int:
    try:
      return main(argv[1:]) or 0
    except UserFacingError as error:
      fail(str(error), error.code)
    except KeyboardInterrupt:
      fail("interrupted; what was saved stays", INTERRUPTED)
    except BrokenPipeError:
      return _output_is_closed()
    except SystemExit as stop:
      if stop.code != 1:
        raise
      return _output_is_closed()  # rich turns a broken pipe into this
    except Exception as error:
      user_error = machine_error(error)
      if user_error is None:
        raise
      fail(str(user_error), user_error.code)
    return 1

  for name in values:  # a process may run a command more than once
    values[name].unparse()
  if not spreads and not speaks():
    sys.exit(0)
  _open_what_is_closed()
  # A line is seen when it is written, also in a pipe, and whatever the terminal can show.
  sys.stdout.reconfigure(line_buffering=True, errors="replace")  # type: ignore[union-attr]
  app.run(guarded, flags_parser=parse)


def stops() -> list[signal.Signals]:
  """Returns the signals that ask to stop; a hangup that is ignored (nohup) does not."""
  hangup = [signal.SIGHUP] if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN else []
  return [signal.SIGTERM, signal.SIGINT, *hangup]


def from_clone() -> bool:
  """Whether this command was started as `python -m launch.NAME`, not as `jaxmoe NAME`."""
  return STARTED_AS in os.environ or pathlib.Path(sys.argv[0]).parent.name == "launch"


def follow_up(name: str, *flags: str) -> str:
  """Returns the line that runs another command, as a shell takes it whatever paths are called."""
  program = ["python", "-m", f"launch.{name}"] if from_clone() else ["jaxmoe", name]
  return shlex.join([*program, *flags])


def as_started(text: str) -> str:
  """Returns text in which commands are named as this one was started."""
  return _NAMED.sub(r"python -m launch.\1", text) if from_clone() else text


def speaks() -> bool:
  """Whether this is the process that says what all processes of a run would say alike.

  Told by the environment, before JAX knows how many there are.
  """
  return next((os.environ[name] for name in _RANKS if name in os.environ), "0") == "0"


def say(line: str) -> None:
  """Prints a line, which may have names of files and of what is in them."""
  print(escaped(as_started(line)))


def fail(message: str, code: int) -> None:
  """Prints one line to standard error and exits."""
  print(f"error: {escaped(as_started(' '.join(message.split())))}", file=sys.stderr, flush=True)
  sys.exit(code)


def fail_alike(message: str, code: int) -> None:
  """Fails, as all processes of the run do with the same arguments; one of them says why."""
  if not speaks():
    sys.exit(code)
  fail(message, code)


def _open_what_is_closed() -> None:
  """Gives a process that was started without output (`>&-`) one that nobody reads."""
  for descriptor in range(3):
    try:
      os.fstat(descriptor)
    except OSError:  # or the next file that is opened would take what libraries print
      os.dup2(os.open(os.devnull, os.O_RDWR), descriptor)
  sys.stdout = sys.stdout or open(1, "w", closefd=False)  # noqa: SIM115 - until the process ends
  sys.stderr = sys.stderr or open(2, "w", closefd=False)  # noqa: SIM115


def _output_is_closed() -> int:
  """Ends in silence, as any filter whose reader has gone; returns the code a shell would give."""
  os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # or Python complains when it flushes at exit
  return 128 + signal.SIGPIPE


def _parse(
  argv: list[str], values: flags.FlagValues, doc: str, takes: Sequence[str]
) -> list[str]:
  if any(argument in ("--help", "-h", "--helpfull", "--helpshort") for argument in argv[1:]):
    print(f"{as_started(doc.strip())}\n\nFlags:\n{values.main_module_help() or values.get_help()}")
    sys.exit(0)
  left = [argument for argument in argv[1:] if argument.startswith(tuple(takes))] if takes else []
  mine = [argument for argument in argv[1:] if argument not in left]
  flags.FLAGS(argv[:1])  # absl insists that its own flags are parsed too
  try:
    extra = values([argv[0], *mine])[1:]
  except flags.Error as error:
    fail_alike(f"{error}; --help lists the flags", 2)
  if extra:
    fail_alike(f"unexpected argument {extra[0]!r}; --help lists the flags", 2)
  return [argv[0], *left]
