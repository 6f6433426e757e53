"""What the commands that compute share: JAX settings, a run's parameters, signals."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import pathlib
import re
import signal
import sys
import threading
import time
import types
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax

from jaxmoe.checkpoint import OrbaxStore
from jaxmoe.checkpoint.orbax_store import quiet_orbax
from jaxmoe.commands.process.command_line import INTERRUPTED, PREEMPTED, fail_alike, speaks, stops
from jaxmoe.commands.process.command_line import run as run
from jaxmoe.commands.process.malloc import keep_freed_memory
from jaxmoe.commands.process.patient_output import Patient
from jaxmoe.core.errors import CheckpointError, InputError
from jaxmoe.core.layout import Layout, one_device
from jaxmoe.data.tokenizers import Tokenizer, load_tokenizer
from jaxmoe.data.tokenizers.tokenizer_file import TokenizerFile
from jaxmoe.models.transformer import Decoder, Params
from jaxmoe.parallel import idle_line
from jaxmoe.runs.recipe_loading import PREFIX
from jaxmoe.train.experiment import Experiment
from jaxmoe.train.saved_steps import check_saved
from jaxmoe.train.train_state import ONLY, params_from_arrays, read_params
from jaxmoe.train.wall_clock import WallClock
from jaxmoe.train.workdir import Workdir


def set_up_jax(keep_memory: bool = True) -> None:
  """Makes process-wide settings: memory, the compile cache and quiet logs.

  Args:
    keep_memory: Whether freed memory is kept for the next step, or given back to the system.
  """
  for name in ("absl", "jax"):
    logging.getLogger(name).setLevel(logging.ERROR)
  if keep_memory:
    keep_freed_memory()
  _threads_for_virtual_devices()
  quiet_orbax()
  jax.monitoring.register_event_duration_secs_listener(_COMPILING.add)
  cache = cache_dir() / "compiled"
  jax.config.update("jax_compilation_cache_dir", str(cache))
  jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
  jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
  jax.config.update("jax_numpy_rank_promotion", "raise")


def _threads_for_virtual_devices() -> None:
  """Gives XLA's CPU client two threads for each virtual device; called before it starts.

  A device that waits in a collective holds a thread. With no more threads than cores the last
  device found none now and then, and after 40 s XLA ended the process.
  """
  asked = re.search(r"host_platform_device_count=(\d+)", os.environ.get("XLA_FLAGS", ""))
  devices = max(jax.config.values["jax_num_cpu_devices"], int(asked[1]) if asked else 1)
  if devices > 1:
    os.environ.setdefault("NPROC", str(max(2 * devices, os.cpu_count() or 1)))


def process_clock() -> WallClock:
  """Returns a clock that counts from the start of this process, interpreter and imports included.

  What any program costs to compile is booked as such from `set_up_jax` on.
  """
  return WallClock(_process_start(), lambda: _COMPILING.seconds)


_COMPILE_EVENTS = tuple(
  f"/jax/core/compile/{part}_duration"
  for part in ("jaxpr_trace", "jaxpr_to_mlir_module", "backend_compile")
)


class _Compiling:
  """Sums the seconds JAX says it spent tracing, lowering, compiling or fetching programs."""

  def __init__(self) -> None:
    self.seconds = 0.0

  def add(self, event: str, duration_secs: float, **details: str | int) -> None:
    """Takes an event of `jax.monitoring`."""
    if event in _COMPILE_EVENTS:
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
  """What commands that use a run need of it.

  Attributes:
    data_fingerprint: Of the batches it was trained on; None where it was converted, and not trained
      since.
  """

  workdir: Workdir
  experiment: Experiment
  decoder: Decoder
  tokenizer: Tokenizer
  step: int
  params: Params
  data_fingerprint: str | None


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
  store = need_steps(workdir)
  made_elsewhere = isinstance(experiment.data.tokenizer, TokenizerFile)
  tokenizer = load_tokenizer(workdir.tokenizer, made_elsewhere)
  check(tokenizer)
  set_up_jax()
  decoder = experiment.decoder()

  def on_damage(step: int, why: str) -> None:
    print(f"checkpoint {step} is damaged, trying the one before: {why}", file=sys.stderr)

  # A live run may be writing here: this command sets nothing aside.
  found = read_params(store, decoder, one_device(), on_damage)
  if found is None:
    raise CheckpointError(f"{workdir.path}: no checkpoint yet; train first")
  step, arrays, record = found
  params = params_from_arrays(decoder, arrays)
  fingerprint = None if ONLY in record else record["data"]["fingerprint"]
  return Trained(workdir, experiment, decoder, tokenizer, step, params, fingerprint)


def need_workdir(path: str | None) -> Workdir:
  """Returns the workdir of a command line.

  Raises:
    InputError: the flag is missing.
  """
  if not path:
    raise InputError("--workdir is missing; give the folder of the run, such as --workdir=runs/a")
  return Workdir(path)


def idle_of(
  experiment: Experiment, layout: Layout, devices: Sequence[jax.Device]
) -> str | None:
  """Returns a line on devices for which a run has nothing to do, None if there are none."""
  rows = experiment.train.batch_size // experiment.train.num_micro
  return idle_line(experiment.parallel, layout.mesh, devices, rows)


def need_steps(workdir: Workdir) -> OrbaxStore:
  """Returns the checkpoints of a run, of which there is one at least.

  Raises:
    CheckpointError: there is none yet, or those that were saved are not there.
  """
  check_saved(workdir.checkpoints, workdir.events)
  store = OrbaxStore(workdir.checkpoints)
  if not store.steps() and not store.aside():
    raise CheckpointError(f"{workdir.path}: no checkpoint yet; train first")
  return store


@contextlib.contextmanager
def named(flag: str) -> Iterator[None]:
  """Says of an error which flag it is about."""
  try:
    yield
  except InputError as error:
    raise InputError(f"--{flag}: {error}") from None


@contextlib.contextmanager
def as_trained() -> Iterator[None]:
  """Says of an error that advises to change the recipe that here it is what the run has."""
  try:
    yield
  except InputError as error:
    if PREFIX not in str(error):
      raise
    raise InputError(
      f"{error} (a flag of jaxmoe train; this command takes the recipe that the run has)"
    ) from None


class StopSignals:
  """Notes SIGTERM, SIGINT and SIGHUP, so that a run can finish its step and save.

  A hangup that whoever started the run has it ignore (nohup) stays ignored.

  Before the run first asks there is no step to finish, and whoever sends a second signal does not
  want to wait: then the process ends at once, and what was saved stays.
  """

  def __init__(self) -> None:
    self.received: int | None = None
    self._asked = False
    for number in stops():
      signal.signal(number, self._note)
    self._unraisable = sys.unraisablehook
    sys.unraisablehook = self._swallowed

  def __call__(self) -> bool:
    """Whether the run should stop."""
    self._asked = True
    return self.received is not None

  @property
  def exit_code(self) -> int:
    """The exit code that says why."""
    return INTERRUPTED if self.received == signal.SIGINT else PREEMPTED

  def _swallowed(self, unraisable: sys.UnraisableHookArgs) -> None:
    """Interrupts again where the garbage collector or a destructor swallowed it."""
    if unraisable.exc_type is KeyboardInterrupt:
      threading.Timer(0.05, os.kill, (os.getpid(), signal.SIGINT)).start()
    else:
      self._unraisable(unraisable)

  def _note(self, number: int, frame: types.FrameType | None) -> None:
    if self.received is not None:
      _write(b"\nerror: told twice to stop; what was saved stays, the same command goes on\n")
      os._exit(INTERRUPTED if number == signal.SIGINT else PREEMPTED)  # nothing waits for a save
    if number == signal.SIGINT and not self._asked:
      raise KeyboardInterrupt
    if not self._asked:
      fail_alike("preempted before a step was made; the same command goes on", PREEMPTED)
    self.received = number
    _write(b"\nstopping: finishing the step, then saving; a second signal stops at once\n")


def _write(line: bytes) -> None:
  """Writes to standard error; not by print, as the signal may have come in the middle of one."""
  if speaks():
    Patient(2).write(line)
