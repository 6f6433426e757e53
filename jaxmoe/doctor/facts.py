"""Plain facts of this machine and installation; `diagnosis.py` says what they mean."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import os
import pathlib
import platform
import re
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from typing import Any

from jaxmoe.cost import host

TRIAL_S = 300.0
_PLUGINS = ("jaxlib", "libtpu", "jax-cuda12-plugin", "jax-cuda13-plugin", "jax-rocm7-plugin")
_SIGNS = {
  "/dev/nvidia0": ("an NVIDIA GPU", "cuda"),
  "/dev/accel0": ("a TPU", "tpu"),
  "/dev/vfio/0": ("a TPU", "tpu"),
}
_WRITTEN_BYTES = 64 << 20


@dataclasses.dataclass(frozen=True)
class Requirement:
  """A package, the versions that are wanted, the one that is there, and the extra that asks."""

  name: str
  wanted: str
  found: str | None
  extra: str | None = None


@dataclasses.dataclass(frozen=True)
class Disk:
  """A folder's disk: what is free, how fast it is, and how far its clock is ahead of ours.

  `error` says why nothing could be written; speeds are then 0.
  """

  path: str
  free_bytes: int
  write_bytes_per_s: float = 0.0
  fsync_s: float = 0.0
  clock_ahead_s: float = 0.0
  error: str = ""


@dataclasses.dataclass(frozen=True)
class Trial:
  """What `doctor_trial` found, and what it wrote to standard error if it did not end well."""

  results: dict[str, Any]
  code: int
  errors: str = ""


@dataclasses.dataclass(frozen=True)
class Facts:
  """All that is judged.

  Attributes:
    python: Version and the versions wanted, '' if the package is not installed.
    requirements: Of the package and its extras.
    plugins: Versions of what JAX may have with it, by name.
    accelerators: What the machine seems to have, and the extra that makes JAX use it.
    cores: That this process may use.
    load: Processes that want a core, over the last minute.
    memory: What this process may have, None where the system does not say.
    workdir: The disk that runs are written to.
    cache: The disk of the caches.
    open_files: How many files this process may have open.
    shm_bytes: Free in /dev/shm, which is memory; None where there is none.
    unix_s: The time of day.
    trial: What was computed.
  """

  python: tuple[str, str]
  requirements: tuple[Requirement, ...]
  plugins: dict[str, str]
  accelerators: tuple[tuple[str, str], ...]
  cores: float
  load: float
  memory: host.HostMemory | None
  workdir: Disk
  cache: Disk
  open_files: int
  shm_bytes: int | None
  unix_s: float
  trial: Trial


def collect(workdir: pathlib.Path, cache: pathlib.Path) -> Facts:
  """Returns the facts; writes 64 MB next to `workdir`, removed again, and trains three steps."""
  load, memory = os.getloadavg()[0], host.memory()  # before we add to them
  return Facts(
    python=(platform.python_version(), _package("Requires-Python")),
    requirements=requirements(),
    plugins={name: found for name in _PLUGINS if (found := version(name))},
    accelerators=tuple({what for path, what in _SIGNS.items() if os.path.exists(path)}),
    cores=host.cores(),
    load=load,
    memory=memory,
    workdir=disk(workdir),
    cache=disk(cache, 1 << 10),
    open_files=resource.getrlimit(resource.RLIMIT_NOFILE)[0],
    shm_bytes=shared_bytes(memory),
    unix_s=time.time(),
    trial=trial(),
  )


def version(name: str) -> str | None:
  """Returns the installed version of a package."""
  try:
    return importlib.metadata.version(name)
  except importlib.metadata.PackageNotFoundError:
    return None


def requirements() -> tuple[Requirement, ...]:
  """Returns what the installed package asks for, the developers' tools left out."""
  try:
    lines = importlib.metadata.requires("jaxmoe") or []
  except importlib.metadata.PackageNotFoundError:
    return ()
  found = [parse_requirement(line) for line in lines]
  return tuple(
    dataclasses.replace(asked, found=version(asked.name)) for asked in found if asked.extra != "dev"
  )


def parse_requirement(line: str) -> Requirement:
  """Returns the requirement of a line such as `jax[cuda13]<0.12,>=0.10.2; extra == "cuda"`."""
  head, _, marker = line.partition(";")
  parts = re.fullmatch(r"\s*([\w.-]+)\s*(?:\[[^\]]*\])?\s*\(?([^)]*)\)?\s*", head)
  extra = re.search(r"extra\s*==\s*['\"]([\w.-]+)['\"]", marker)
  name, wanted = (parts[1], parts[2].replace(" ", "")) if parts else (head.strip(), "")
  return Requirement(name, wanted, None, extra[1] if extra else None)


def shared_bytes(memory: host.HostMemory | None) -> int | None:
  """Returns what can still be written to /dev/shm: its room, but no more than free memory."""
  if not os.path.isdir("/dev/shm"):
    return None
  room = shutil.disk_usage("/dev/shm").free
  return room if memory is None else min(room, memory.free)


def disk(path: pathlib.Path, size: int = _WRITTEN_BYTES) -> Disk:
  """Returns what the disk of a folder, or of the nearest that exists, can do; leaves nothing."""
  there = next(p for p in (path, *path.absolute().parents) if os.path.isdir(p))
  free = shutil.disk_usage(there).free
  if free < 2 * size:
    return Disk(str(path), free, error="too little room to try")
  try:
    with tempfile.NamedTemporaryFile(dir=there, prefix=".jaxmoe-doctor-") as file:
      return Disk(str(path), free, *_timed_write(file, size))
  except OSError as error:
    return Disk(str(path), free, error=error.strerror or str(error))


def _timed_write(file: Any, size: int) -> tuple[float, float, float]:
  """Returns bytes a second, seconds of a small sync, and how far the disk's clock is ahead."""
  block = os.urandom(1 << 10) * (1 << 10)  # a disk that compresses must not look fast
  start = time.perf_counter()
  for _ in range(max(size >> 20, 1)):
    file.write(block[:size])
  file.flush()
  os.fsync(file.fileno())
  bytes_per_s = size / (time.perf_counter() - start)
  start = time.perf_counter()
  file.write(b"x")
  file.flush()
  os.fsync(file.fileno())
  fsync_s = time.perf_counter() - start
  return bytes_per_s, fsync_s, os.fstat(file.fileno()).st_mtime - time.time()


def trial(timeout_s: float = TRIAL_S) -> Trial:
  """Returns what `doctor_trial` tells from a process of its own."""
  with tempfile.TemporaryDirectory(prefix="jaxmoe-doctor-") as folder:
    command = [sys.executable, "-m", "jaxmoe.commands.doctor_trial", folder]
    root = pathlib.Path(__file__).parents[2]
    try:
      done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=timeout_s)
    except subprocess.TimeoutExpired as error:
      out = error.stdout.decode(errors="replace") if isinstance(error.stdout, bytes) else ""
      return Trial(parse_results(out), -1, f"it did not end within {timeout_s:.0f} s")
  return Trial(parse_results(done.stdout), done.returncode, done.stderr if done.returncode else "")


def parse_results(output: str) -> dict[str, Any]:
  """Returns the objects of lines of JSON as one; other lines are left out."""
  found: dict[str, Any] = {}
  for line in output.splitlines():
    try:
      value = json.loads(line)
    except ValueError:
      continue
    found.update(value if isinstance(value, dict) else {})
  return found


def _package(field: str) -> str:
  try:
    return str(importlib.metadata.metadata("jaxmoe")[field] or "")
  except importlib.metadata.PackageNotFoundError:
    return ""
