"""Process-wide settings of JAX: compile cache, logs, threads; and what compiling costs."""

from __future__ import annotations

import logging
import os
import pathlib
import re
import time

import jax

from jaxmoe.checkpoint.orbax_store import quiet_orbax
from jaxmoe.commands.process.malloc import keep_freed_memory
from jaxmoe.core import measured
from jaxmoe.core.kept_programs import KeptPrograms
from jaxmoe.train.wall_clock import WallClock


def set_up_jax(keep_memory: bool = True) -> None:
  """Makes process-wide settings: memory, the compile cache, measured back ends and quiet logs.

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
  measured.also_read(measured_path())


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


def kept_programs() -> KeptPrograms:
  """Returns the programs that processes leave each other in the folder of caches."""
  return KeptPrograms(cache_dir() / "programs", _process_start())


def measured_path() -> pathlib.Path:
  """Returns this machine's own file of measured back ends, see `core/measured.py`."""
  return cache_dir() / "measured.json"


def cache_dir() -> pathlib.Path:
  """Returns the folder of caches that any run may use: $XDG_CACHE_HOME/jaxmoe."""
  home = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
  return pathlib.Path(home) / "jaxmoe"
