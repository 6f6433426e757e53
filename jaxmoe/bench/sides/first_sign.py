"""Seconds of the clock and the processor that a process takes to its first sign of work."""

from __future__ import annotations

import os
import pathlib
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence

from jaxmoe.bench.race import Seconds
from jaxmoe.bench.sides.process import SideError

_LOOK_S = 0.004


def first_sign(
  command: Sequence[str], env: Mapping[str, str], sign: pathlib.Path | None = None
) -> Seconds:
  """Returns the seconds until a file has something in it; the process is then ended.

  Args:
    command: What is run.
    env: Its environment.
    sign: The file; None to wait for the end of the process.

  Raises:
    SideError: the process ended without it, or in failure; with its last line.
  """
  with tempfile.TemporaryFile("w+") as log:
    start = time.perf_counter()
    process = subprocess.Popen(command, env=dict(env), stdout=log, stderr=log, text=True)
    try:
      cpu = _processor_s(process.pid)
      while process.poll() is None and (sign is None or not _has_content(sign)):
        cpu = _processor_s(process.pid, cpu)
        time.sleep(_LOOK_S)
      wall = time.perf_counter() - start
      if process.returncode is None:
        cpu = _processor_s(process.pid, cpu)
      elif process.returncode or not (sign is None or _has_content(sign)):
        log.seek(0)
        lines = log.read().strip().splitlines()
        raise SideError(lines[-1] if lines else f"it ended with {process.returncode}")
    finally:
      process.kill()
      process.wait()
  return Seconds(wall, cpu)


def _has_content(path: pathlib.Path) -> bool:
  return path.exists() and path.stat().st_size > 0


def _processor_s(pid: int, least: float = 0.0) -> float:
  """Returns the seconds of all threads of a process, `least` once it is gone."""
  try:
    text = pathlib.Path(f"/proc/{pid}/stat").read_text(encoding="utf-8")
  except OSError:
    return least
  fields = text.rpartition(")")[2].split()
  return max((int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK"), least)
