"""What every command shares: flags, one line and an exit code for a mistake, JAX settings.

Exit codes: 0 done; 2 bad input; 3 loss not finite; 4 no intact checkpoint; 42 preempted, state
saved; 130 interrupted, state saved.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import pathlib
import signal
import sys
import time
import types
from collections.abc import Callable, Sequence
from typing import Any

import jax
from absl import app, flags

from jaxmoe.checkpoint import OrbaxStore
from jaxmoe.checkpoint.orbax_store import quiet_orbax
from jaxmoe.checkpoint.store import read_latest
from jaxmoe.core.errors import CheckpointError, InputError, NotFiniteError
from jaxmoe.core.layout import one_device
from jaxmoe.data.tokenizers import Tokenizer, load_tokenizer
from jaxmoe.models.transformer import Decoder, Params
from jaxmoe.train.experiment import Experiment
from jaxmoe.train.ledger import Ledger
from jaxmoe.train.state import params_from_arrays, params_like
from jaxmoe.train.workdir import Workdir
from launch.memory import keep_freed_memory

Main = Callable[[list[str]], int | None]
PREEMPTED, INTERRUPTED = 42, 130


def run(main: Main, values: flags.FlagValues, doc: str | None, takes: Sequence[str] = ()) -> None:
  """Parses the flags of one command into `values`, calls `main`, and exits.

  Args:
    main: Gets what was not a flag of `values`, which begins with one of `takes`; returns an exit
      code or None for 0.
    values: The command's flags.
    doc: What `--help` prints first.
    takes: Prefixes of arguments that are left to `main`, such as '--config.'.
  """

  def parse(argv: list[str]) -> list[str]:
    return _parse(argv, values, doc or "", takes)

  def guarded(argv: list[str]) -> int:
    try:
      return main(argv[1:]) or 0
    except (InputError, NotFiniteError, CheckpointError) as error:
      fail(str(error), error.code)
    except KeyboardInterrupt:
      fail("interrupted; what was saved stays", INTERRUPTED)
    except BrokenPipeError:
      return _output_is_closed()
    except SystemExit as stop:
      if stop.code != 1:
        raise
      return _output_is_closed()  # rich turns a broken pipe into this
    return 1

  # A line is seen when it is written, also in a pipe, and whatever the terminal can show.
  sys.stdout.reconfigure(line_buffering=True, errors="replace")  # type: ignore[union-attr]
  app.run(guarded, flags_parser=parse)


def fail(message: str, code: int) -> None:
  """Prints one line to standard error and exits."""
  print(f"error: {' '.join(message.split())}", file=sys.stderr, flush=True)
  sys.exit(code)


def set_up_jax() -> None:
  """Makes process-wide settings: memory, the compile cache and quiet logs."""
  for name in ("absl", "jax"):
    logging.getLogger(name).setLevel(logging.ERROR)
  keep_freed_memory()
  quiet_orbax()
  jax.monitoring.register_event_duration_secs_listener(_COMPILING.add)
  cache = cache_dir() / "compiled"
  jax.config.update("jax_compilation_cache_dir", str(cache))
  jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
  jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
  jax.config.update("jax_numpy_rank_promotion", "raise")


def process_ledger() -> Ledger:
  """Returns a ledger that counts from the start of this process, interpreter and imports included.

  What any program costs to compile is booked as such from `set_up_jax` on.
  """
  return Ledger(_process_start(), lambda: _COMPILING.seconds)


class _Compiling:
  """Sums the seconds JAX says it spent compiling or fetching a compiled program."""

  def __init__(self) -> None:
    self.seconds = 0.0

  def add(self, event: str, duration_secs: float, **details: str | int) -> None:
    """Takes an event of `jax.monitoring`."""
    if event == "/jax/core/compile/backend_compile_duration":
      self.seconds += duration_secs


_COMPILING = _Compiling()


def _process_start() -> float:
  """Returns when this process started, as Linux knows it; elsewhere now."""
  try:
    ticks = int(pathlib.Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
    up_s = float(pathlib.Path("/proc/uptime").read_text().split()[0])
  except (OSError, ValueError, IndexError):
    return time.time()
  return time.time() - max(up_s - ticks / os.sysconf("SC_CLK_TCK"), 0.0)


def cache_dir() -> pathlib.Path:
  """Returns the folder of caches that any run may use: $XDG_CACHE_HOME/jaxmoe."""
  home = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
  return pathlib.Path(home) / "jaxmoe"


@dataclasses.dataclass(frozen=True)
class Trained:
  """What commands that use a run need of it."""

  workdir: Workdir
  experiment: Experiment
  decoder: Decoder
  tokenizer: Tokenizer
  step: int
  params: Params
  data_fingerprint: str


def load_run(
  path: str | None, check: Callable[[Tokenizer], Any] = lambda tokenizer: None
) -> Trained:
  """Returns the newest intact parameters of the run in a workdir, with its tokenizer.

  Args:
    path: The workdir.
    check: Called with the run's tokenizer before anything is compiled.

  Raises:
    InputError: the flag is missing, or the files are not of this run.
    CheckpointError: there is no run, or no intact checkpoint yet.
  """
  workdir = need_workdir(path)
  experiment = workdir.experiment()
  store = OrbaxStore(workdir.checkpoints)
  if not store.steps() and not store.aside():
    raise CheckpointError(f"{workdir.path}: no checkpoint yet; train first")
  tokenizer = load_tokenizer(workdir.tokenizer)
  check(tokenizer)
  set_up_jax()
  decoder = experiment.decoder()
  like = params_like(decoder, one_device())

  def on_damage(step: int, why: str) -> None:
    print(f"checkpoint {step} is damaged, trying the one before: {why}", file=sys.stderr)

  # A live run may be writing here: this command sets nothing aside.
  found = read_latest(store, like, on_damage, under="params/", set_aside=False)
  if found is None:
    raise CheckpointError(f"{workdir.path}: no checkpoint yet; train first")
  step, arrays, record = found
  params = params_from_arrays(decoder, arrays)
  fingerprint = record["data"]["fingerprint"]
  return Trained(workdir, experiment, decoder, tokenizer, step, params, fingerprint)


def need_workdir(path: str | None) -> Workdir:
  """Returns the workdir of a command line.

  Raises:
    InputError: the flag is missing.
  """
  if not path:
    raise InputError("--workdir is missing; give the folder of the run, such as --workdir=runs/a")
  return Workdir(path)


class StopSignals:
  """Notes SIGTERM and SIGINT, so that a run can finish its step and save.

  Before the run first asks there is no step to finish, and whoever sends a second signal does not
  want to wait: then the process ends at once, and what was saved stays.
  """

  def __init__(self) -> None:
    self.received: int | None = None
    self._asked = False
    for number in (signal.SIGTERM, signal.SIGINT):
      signal.signal(number, self._note)

  def __call__(self) -> bool:
    """Whether the run should stop."""
    self._asked = True
    return self.received is not None

  @property
  def exit_code(self) -> int:
    """The exit code that says why."""
    return INTERRUPTED if self.received == signal.SIGINT else PREEMPTED

  def _note(self, number: int, frame: types.FrameType | None) -> None:
    if self.received is not None:
      os.write(2, b"\nerror: told twice to stop; what was saved stays, the same command goes on\n")
      os._exit(INTERRUPTED if number == signal.SIGINT else PREEMPTED)  # nothing waits for a save
    if number == signal.SIGINT and not self._asked:
      raise KeyboardInterrupt
    if not self._asked:
      fail("preempted before a step was made; the same command goes on", PREEMPTED)
    self.received = number
    # Not print: the signal may have come in the middle of one.
    os.write(2, b"\nstopping: finishing the step, then saving; a second signal stops at once\n")


def _output_is_closed() -> int:
  """Ends in silence, as any filter whose reader has gone; returns the code a shell would give."""
  os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # or Python complains when it flushes at exit
  return 128 + signal.SIGPIPE


def _parse(
  argv: list[str], values: flags.FlagValues, doc: str, takes: Sequence[str]
) -> list[str]:
  if any(argument in ("--help", "-h", "--helpfull", "--helpshort") for argument in argv[1:]):
    print(f"{doc.strip()}\n\nFlags:\n{values.main_module_help() or values.get_help()}")
    sys.exit(0)
  left = [argument for argument in argv[1:] if argument.startswith(tuple(takes))] if takes else []
  mine = [argument for argument in argv[1:] if argument not in left]
  flags.FLAGS(argv[:1])  # absl insists that its own flags are parsed too
  try:
    extra = values([argv[0], *mine])[1:]
  except flags.Error as error:
    fail(f"{error}; --help lists the flags", 2)
  if extra:
    fail(f"unexpected argument {extra[0]!r}; --help lists the flags", 2)
  return [argv[0], *left]
