"""The lock of a run's folder, looked at without touching it.

A shared lock taken for an instant would make a run that starts just then believe that the folder is
in use, so the system's list of locks is read instead.
"""

from __future__ import annotations

import os
import pathlib

TABLE = pathlib.Path("/proc/locks")


def is_held(lock: pathlib.Path, pid: int | None) -> bool:
  """Whether a process of this machine holds the lock of a folder.

  Args:
    lock: The lock file.
    pid: The process that last said that it runs there. Where the system has no list of locks (it is
      not Linux), a run counts as alive while there is a process of that number.
  """
  try:
    file = os.stat(lock)
  except OSError:
    return False
  try:
    entries = TABLE.read_text(encoding="ascii", errors="replace").splitlines()
  except OSError:
    return pid is not None and _is_alive(pid)
  return any(_is_of(entry.split(), file) for entry in entries)


def _is_of(fields: list[str], file: os.stat_result) -> bool:
  """Whether an entry such as `1: FLOCK ADVISORY WRITE 812 fe:00:2148 0 EOF` is of a file."""
  if len(fields) < 6 or fields[1] == "->" or fields[3] != "WRITE":  # an arrow: who waits for it
    return False
  major, minor, inode = fields[5].split(":")
  if int(inode) != file.st_ino:
    return False
  if (int(major, 16), int(minor, 16)) == (os.major(file.st_dev), os.minor(file.st_dev)):
    return True
  # overlayfs and btrfs give a file another device than the system's list does.
  return _has_open(fields[4], file)


def _has_open(pid: str, file: os.stat_result) -> bool:
  try:
    numbers = os.listdir(f"/proc/{pid}/fd")
  except OSError:
    return False
  return any(_is_same(f"/proc/{pid}/fd/{number}", file) for number in numbers)


def _is_same(path: str, file: os.stat_result) -> bool:
  try:
    return os.path.samestat(os.stat(path), file)
  except OSError:
    return False


def _is_alive(pid: int) -> bool:
  try:
    os.kill(pid, 0)
  except ProcessLookupError:
    return False
  except OSError:  # it is another person's
    return True
  return True
