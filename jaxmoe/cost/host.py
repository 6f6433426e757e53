"""Host limits of a process (cgroups): memory, cores, and the name of its processor.

In a container /proc/meminfo and the scheduler speak of the whole machine; what ends or slows a
process is the limit of its control group, or of a group around that. Both versions of them are read
where they are mounted; `root` stands for `/`.
"""

from __future__ import annotations

import dataclasses
import os
import pathlib
import platform
import re
from collections.abc import Iterator

ROOT = pathlib.Path("/")


@dataclasses.dataclass(frozen=True)
class HostMemory:
  """Bytes of memory: what a process may have in all, what it can get now without swapping.

  Attributes:
    limit: In all.
    free: Of that; a group's page cache that is not in use counts as free, as the system's does.
    grouped: Whether a control group allows less than the machine has, now or in all.
  """

  limit: int
  free: int
  grouped: bool = False

  def __str__(self) -> str:
    """`0.4 GB of 0.6 GB free`, with whose limit that is."""
    whose = " (the limit of this control group)" if self.grouped else ""
    return f"{self.free / 2**30:.1f} GB of {self.limit / 2**30:.1f} GB free{whose}"


def memory(root: pathlib.Path = ROOT) -> HostMemory | None:
  """Returns the smaller of what the machine and every group around this process have.

  None where the system does not say.
  """
  table = _read(root / "proc/meminfo") or ""
  found = [re.search(rf"^{name}:\s+(\d+) kB", table, re.M) for name in ("MemTotal", "MemAvailable")]
  if not all(found):
    return None
  limit, free = (int(one[1]) * 1024 for one in found if one)
  allowed = [_allowed(folder) for folder in _groups(root, "memory")]
  limits = [most for most, _ in allowed if most is not None]
  rests = [rest for _, rest in allowed if rest is not None]
  grouped = min(limits, default=limit) < limit or min(rests, default=free) < free
  return HostMemory(min([limit, *limits]), min([free, *rests]), grouped)


def cores(root: pathlib.Path = ROOT) -> float:
  """Returns how many cores this process may use: by its affinity, and by its groups' quotas."""
  quotas = [_quota(folder) for folder in _groups(root, "cpu")]
  return min([float(len(_affine())), *(quota for quota in quotas if quota is not None)])


def place(root: pathlib.Path = ROOT) -> str:
  """Returns the machine this process runs on and its cores there: `b5f0-... 0,1,2`.

  Containers of one machine have names of their own; it has booted once for all of them.
  """
  booted = (_read(root / "proc/sys/kernel/random/boot_id") or platform.node() or "here").split()[0]
  return f"{booted} {','.join(map(str, _affine()))}"


def processor(root: pathlib.Path = ROOT) -> str:
  """Returns the model of the processor, '' where nothing says it."""
  named = re.search(r"^(?:model name|Model)\s*:\s*(.+)$", _read(root / "proc/cpuinfo") or "", re.M)
  return named[1].strip() if named else platform.processor()


def _affine() -> list[int]:
  """Returns the numbers of the cores that this process may run on."""
  if hasattr(os, "sched_getaffinity"):
    return sorted(os.sched_getaffinity(0))
  return list(range(os.cpu_count() or 1))


def _allowed(folder: pathlib.Path) -> tuple[int | None, int | None]:
  """Returns the limit of a group, and what is left of it; None where there is none."""
  names = ("memory.max", "memory.high", "memory.limit_in_bytes")
  limits = [limit for name in names if (limit := _number(folder / name)) is not None]
  if not limits:
    return None, None
  used = _number(folder / "memory.current") or _number(folder / "memory.usage_in_bytes") or 0
  table = _read(folder / "memory.stat") or ""
  idle = re.search(r"^total_inactive_file (\d+)$", table, re.M)  # version 1, groups below included
  idle = idle or re.search(r"^inactive_file (\d+)$", table, re.M)
  used -= min(int(idle[1]) if idle else 0, used)
  return min(limits), max(min(limits) - used, 0)


def _quota(folder: pathlib.Path) -> float | None:
  """Returns the cores' worth of time of a group, None where it has no quota."""
  both = (_read(folder / "cpu.max") or "").split()  # "max 100000"
  if len(both) == 2 and both[0].isdigit():
    return int(both[0]) / int(both[1])
  quota, period = (_number(folder / f"cpu.cfs_{name}_us") for name in ("quota", "period"))
  return quota / period if quota and period else None  # -1 is none, and no number here


def _groups(root: pathlib.Path, controller: str) -> Iterator[pathlib.Path]:
  """Yields the folders of the groups this process is in that may have `controller`, inner first."""
  own: dict[str, str] = {}  # "4:cpu,cpuacct:/a", and of version 2 "0::/a"
  lines = _read(root / "proc/self/cgroup") or ""
  for names, path in re.findall(r"^\d+:([^:]*):(.*)$", lines, re.M):
    own |= dict.fromkeys(names.split(","), path)
  for line in (_read(root / "proc/self/mountinfo") or "").splitlines():
    before, _, after = line.partition(" - ")
    kind, options = (after.split() + ["", "", ""])[0:3:2]
    mounted = kind == "cgroup2" or (kind == "cgroup" and controller in options.split(","))
    inside = own.get("" if kind == "cgroup2" else controller)
    if mounted and inside is not None:
      top, point = before.split()[3:5]
      yield from _upwards(root / point.lstrip("/"), _below(inside, top))


def _below(path: str, top: str) -> str:
  """Returns the path of a group below the one that is mounted; '' where it lies outside."""
  inside = path == top or path.startswith(top.rstrip("/") + "/")
  return path[len(top.rstrip("/")) :].strip("/") if inside and ".." not in path.split("/") else ""


def _upwards(top: pathlib.Path, below: str) -> Iterator[pathlib.Path]:
  folder = top / below
  while folder != top:
    yield folder
    folder = folder.parent
  yield top


def _number(path: pathlib.Path) -> int | None:
  """Returns the count in a file, None for `max`, -1 and whatever else is no count."""
  text = (_read(path) or "").strip()
  return int(text) if text.isdigit() else None


def _read(path: pathlib.Path) -> str | None:
  try:
    return path.read_text(encoding="utf-8", errors="replace")
  except OSError:
    return None
