"""From facts to findings: what is right, what is not, and how it is mended. Pure functions."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator
from typing import Literal

from jaxmoe.doctor.facts import Disk, Facts, Requirement

Level = Literal["ok", "warning", "problem"]

MB, GB = 1 << 20, 1 << 30
_OLDEST_UNIX_S = 1.76e9  # October 2025: this code is younger


@dataclasses.dataclass(frozen=True)
class Finding:
  """One thing that was looked at: how it stands, and what to do unless it is ok."""

  level: Level
  name: str
  text: str
  cure: str = ""


def diagnose(facts: Facts) -> list[Finding]:
  """Returns a finding for each thing that was looked at."""
  judges = (
    _python, _packages, _jaxlib, _extras, _devices, _cores, _memory, _workdir, _speed, _cache,
    _limits, _shm, _clock, _matmul, _trial, _kernels,
  )  # fmt: skip
  return [finding for judge in judges for finding in judge(facts)]


def satisfies(version: str, wanted: str) -> bool:
  """Whether a version meets a list such as `>=0.10.2,<0.12`; only numbers are compared.

  A release candidate counts as its release.
  """
  return all(_meets(version, part.strip()) for part in wanted.split(",") if part.strip())


def _meets(version: str, condition: str) -> bool:
  found = re.fullmatch(r"(>=|<=|==|!=|~=|>|<)\s*(\d+(?:\.\d+)*)(\.\*)?.*", condition)
  if not found:
    return True
  sign, wanted, star = found[1], _numbers(found[2]), found[3]
  ours = _numbers(version)
  if star:
    ours = ours[: len(wanted)]
  width = max(len(ours), len(wanted))
  ours, padded = (tuple(n + (0,) * (width - len(n))) for n in (ours, wanted))
  prefix = ours[: len(wanted) - 1] == wanted[:-1]
  return {
    ">=": ours >= padded, "<=": ours <= padded, "==": ours == padded, "!=": ours != padded,
    ">": ours > padded, "<": ours < padded, "~=": ours >= padded and prefix,
  }[sign]  # fmt: skip


def _numbers(version: str) -> tuple[int, ...]:
  found = re.match(r"\d+(\.\d+)*", version)
  return tuple(int(number) for number in found[0].split(".")) if found else (0,)


def _python(facts: Facts) -> Iterator[Finding]:
  found, wanted = facts.python
  if not wanted:
    cure = "run `make venv`, or `pip install -e .` in the clone, and use that Python"
    yield Finding("problem", "python", f"{found}; jaxmoe is not installed in it", cure)
  elif not satisfies(found, wanted):
    cure = "make the environment again: make venv PYTHON=/path/to/python3.12"
    yield Finding("problem", "python", f"{found}, needs {wanted}", cure)
  else:
    yield Finding("ok", "python", f"{found} (needs {wanted})")


def _packages(facts: Facts) -> Iterator[Finding]:
  needed = [asked for asked in facts.requirements if asked.extra is None]
  good = [asked for asked in needed if _is_met(asked)]
  for asked in needed:
    if asked not in good:
      cure = f"pip install '{asked.name}{asked.wanted}', or make venv"
      yield Finding("problem", "packages", f"{_shown(asked)}, needs {asked.wanted}", cure)
  if good:
    yield Finding("ok", "packages", ", ".join(_shown(asked) for asked in good))


def _jaxlib(facts: Facts) -> Iterator[Finding]:
  jax = next((asked.found for asked in facts.requirements if asked.name == "jax"), None)
  for name, found in facts.plugins.items():
    matters = name != "libtpu" and jax is not None
    if matters and _numbers(found)[:2] != _numbers(jax or "")[:2]:
      cure = f"pip install '{name}=={jax}'"
      yield Finding("problem", "packages", f"{name} {found} does not fit jax {jax}", cure)
    else:
      yield Finding("ok", "packages", f"{name} {found}")


def _extras(facts: Facts) -> Iterator[Finding]:
  names = sorted({asked.extra for asked in facts.requirements if asked.extra})
  asked_by = {name: [a for a in facts.requirements if a.extra == name] for name in names}
  for name, asked in asked_by.items():
    for each in asked:
      if each.found and not _is_met(each):
        cure = f"pip install 'jaxmoe[{name}]'"
        yield Finding("warning", "extras", f"{_shown(each)}, needs {each.wanted}", cure)
  # Those of JAX name packages that everybody has.
  optional = {name: of for name, of in asked_by.items() if any(a.name != "jax" for a in of)}
  there = [name for name, of in optional.items() if all(map(_is_met, of))]
  missing = [name for name in optional if name not in there]
  text = f"{', '.join(there) or 'none'}; not here: {', '.join(missing) or 'none'}"
  yield Finding("ok", "extras", text)


def _devices(facts: Facts) -> Iterator[Finding]:
  devices = facts.trial.results.get("devices")
  if not devices:
    yield Finding("problem", "devices", "JAX starts on no device here", _last_line(facts))
    return
  first, count = devices[0], len(devices)
  memory = f", {first['memory_bytes'] / GB:.1f} GB each" if first.get("memory_bytes") else ""
  text = f"{count} x {first['kind']} ({first['platform']}){memory}"
  unused = [pair for pair in facts.accelerators if first["platform"] == "cpu"]
  for what, extra in unused:
    cure = f"pip install 'jaxmoe[{extra}]'; is JAX_PLATFORMS set?"
    yield Finding("warning", "devices", f"{text}; the machine has {what}, unused", cure)
  if not unused:
    yield Finding("ok", "devices", text)


def _cores(facts: Facts) -> Iterator[Finding]:
  text = f"{facts.cores:g} for this process, {facts.load:.1f} wanted over the last minute"
  if facts.load > 1.5 * facts.cores:
    cure = "end what else runs here, or take no speed measured now for the machine's"
    yield Finding("warning", "cores", text, cure)
  elif facts.cores < 2:
    yield Finding("warning", "cores", text, "give it 2, or batches are made while a step waits")
  else:
    yield Finding("ok", "cores", text)


def _memory(facts: Facts) -> Iterator[Finding]:
  if facts.memory is None:
    yield Finding("ok", "memory", "the system does not say")
    return
  text, grouped = str(facts.memory), facts.memory.grouped
  cure = "give the group (container, job) more" if grouped else "end other programs"
  if facts.memory.free < GB:
    yield Finding("problem", "memory", text, f"{cure}; the smallest run needs 1 GB")
  elif facts.memory.free < 3 * GB:
    yield Finding("warning", "memory", text, f"{cure}; the quickstart needs 3 GB")
  else:
    yield Finding("ok", "memory", text)


def _workdir(facts: Facts) -> Iterator[Finding]:
  disk = facts.workdir
  text = f"{disk.free_bytes / GB:.1f} GB free at {disk.path}"
  if disk.free_bytes < GB // 2:
    yield Finding("problem", "workdir", text, "make room, or give another --workdir")
  elif disk.error:
    cure = "give a --workdir that you may write to"
    yield Finding("problem", "workdir", f"cannot write at {disk.path}: {disk.error}", cure)
  elif disk.free_bytes < 5 * GB:
    cure = "keep fewer checkpoints (--config.train.keep), or give another --workdir"
    yield Finding("warning", "workdir", text, cure)
  else:
    yield Finding("ok", "workdir", text)


def _speed(facts: Facts) -> Iterator[Finding]:
  disk = facts.workdir
  if not disk.write_bytes_per_s:
    return
  bytes_per_s, wait_ms = disk.write_bytes_per_s, disk.fsync_s * 1e3
  text = f"{bytes_per_s / MB:,.0f} MB/s, {wait_ms:,.1f} ms until a line is safe"
  if disk.write_bytes_per_s < 20 * MB or disk.fsync_s > 0.5:
    cure = "put --workdir on a local disk, or save less often (--config.train.checkpoint_every)"
    yield Finding("warning", "writing", text, cure)
  else:
    yield Finding("ok", "writing", text)


def _cache(facts: Facts) -> Iterator[Finding]:
  disk: Disk = facts.cache
  cure = "set XDG_CACHE_HOME to a folder with room; without it every start compiles anew"
  if disk.error:
    yield Finding("warning", "cache", f"cannot write at {disk.path}: {disk.error}", cure)
  elif disk.free_bytes < GB // 4:
    yield Finding("warning", "cache", f"{disk.free_bytes / MB:.0f} MB free at {disk.path}", cure)
  else:
    yield Finding("ok", "cache", f"{disk.free_bytes / GB:.1f} GB free at {disk.path}")


def _limits(facts: Facts) -> Iterator[Finding]:
  unlimited = facts.open_files < 0 or facts.open_files >= 1 << 30
  text = "no limit" if unlimited else f"{facts.open_files:,} at once"
  if not unlimited and facts.open_files < 1024:
    cure = "run `ulimit -n 4096` in the shell first; a checkpoint has many files"
    yield Finding("warning", "open files", text, cure)
  else:
    yield Finding("ok", "open files", text)


def _shm(facts: Facts) -> Iterator[Finding]:
  if facts.shm_bytes is None:
    return
  text = f"{facts.shm_bytes / MB:,.0f} MB free in /dev/shm"
  if facts.shm_bytes < 256 * MB:
    cure = "in a container: docker run --shm-size=1g; data workers and NCCL share memory there"
    yield Finding("warning", "shared", text, cure)
  else:
    yield Finding("ok", "shared", text)


def _clock(facts: Facts) -> Iterator[Finding]:
  ahead = facts.workdir.clock_ahead_s
  if facts.unix_s < _OLDEST_UNIX_S:
    cure = "set the time (ntp); which process of a run came first depends on it"
    yield Finding("problem", "clock", "stands before this code was written", cure)
  elif abs(ahead) > 2:
    text = f"the disk's clock is {ahead:+.1f} s off this machine's"
    cure = "set both by ntp; `status` and wall times are off by as much"
    yield Finding("warning", "clock", text, cure)
  else:
    yield Finding("ok", "clock", "agrees with the disk's to 2 s")


def _matmul(facts: Facts) -> Iterator[Finding]:
  peaks = facts.trial.results.get("peak_flops_per_s") or {}
  text = ", ".join(f"{peak / 1e9:,.0f} GFLOP/s in {dtype}" for dtype, peak in peaks.items())
  text += "; the best seen here, of which MFU is a share"
  if peaks and min(peaks.values()) < 2e9:
    cure = "has the machine always been busy, or is it emulated?"
    yield Finding("warning", "matmul", text, cure)
  elif peaks:
    yield Finding("ok", "matmul", text)


def _trial(facts: Facts) -> Iterator[Finding]:
  run, code = facts.trial.results.get("run"), facts.trial.code
  if run is None:
    end = f"signal {-code}" if code < -1 else f"exit code {code}" if code >= 0 else "no end"
    text = f"three steps of configs/tiny.py failed ({end}): {_last_line(facts)}"
    yield Finding("problem", "training", text, "send the report that --out=FILE writes")
    return
  losses = [math.nan if loss is None else loss for loss in run["losses"]]
  if len(losses) != 3 or not all(map(math.isfinite, losses)):
    text = f"the losses of three steps of configs/tiny.py: {losses}"
    yield Finding("problem", "training", text, "send the report that --out=FILE writes")
  elif not run["equal"]:
    text = "a checkpoint came back from the disk with other values"
    yield Finding("problem", "training", text, "check the disk and the memory of this machine")
  elif facts.trial.code:
    text = f"three steps went well, then: {_last_line(facts)}"
    yield Finding("warning", "training", text, "send the report that --out=FILE writes")
  else:
    text = f"3 steps, loss {losses[0]:.3f} to {losses[-1]:.3f}, checkpoint restored and equal, "
    yield Finding("ok", "training", f"{text}{run['seconds']:.0f} s in all")


def _kernels(facts: Facts) -> Iterator[Finding]:
  run = facts.trial.results.get("run")
  for operation, backends in ((run or {}).get("kernels") or {}).items():
    yield Finding("ok", "kernel", f"{operation}: {' and '.join(backends)}")


def _is_met(asked: Requirement) -> bool:
  return asked.found is not None and satisfies(asked.found, asked.wanted)


def _shown(asked: Requirement) -> str:
  return f"{asked.name} {asked.found}" if asked.found else f"{asked.name} is missing"


def _last_line(facts: Facts) -> str:
  lines = facts.trial.errors.strip().splitlines()
  return lines[-1].strip()[:300] if lines else "it said nothing"
