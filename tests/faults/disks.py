"""A small file system of its own for one run, that can be filled and made read-only."""

import contextlib
import ctypes
import os
import pathlib

LIBC = ctypes.CDLL(None, use_errno=True)
READ_ONLY, REMOUNT, BIND, DETACH = 1, 32, 4096, 2


def mount(source, target, kind, flags, options=""):
  """Calls mount(2)."""
  words = [str(each).encode() for each in (source, target, kind, options)]
  if LIBC.mount(words[0], words[1], words[2], flags, words[3]):
    number = ctypes.get_errno()
    raise OSError(number, os.strerror(number), str(target))


def unmount(folder):
  """Takes away the uppermost file system at a folder; returns whether there was one."""
  return LIBC.umount2(str(folder).encode(), DETACH) == 0


def make(folder, num_bytes):
  """Mounts a file system of so many bytes at a folder."""
  folder.mkdir(exist_ok=True)
  mount("none", folder, "tmpfs", 0, f"size={num_bytes}")


def remove(folder):
  """Takes away whatever is mounted at a folder."""
  while unmount(folder):
    pass


def can_mount(folder):
  """Whether this process may mount file systems; tries it."""
  with contextlib.suppress(OSError):
    make(folder, 1 << 16)
    return unmount(folder)
  return False


def fill(folder):
  """Fills the file system of a folder to the last byte."""
  size = 1 << 20
  with open(pathlib.Path(folder) / "ballast", "ab", buffering=0) as file:
    while size:
      try:
        file.write(bytes(size))
      except OSError:
        size //= 2


def free(folder):
  """Undoes `fill`."""
  (pathlib.Path(folder) / "ballast").unlink(missing_ok=True)


def lock(folder):
  """Makes what is in a folder read-only, as a kernel does that met an error on the disk.

  Files that are open stay so: the read-only view is mounted above the folder.
  """
  mount(folder, folder, "", BIND)
  mount("none", folder, "", REMOUNT | BIND | READ_ONLY)
