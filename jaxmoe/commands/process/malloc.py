"""Settings of malloc: this process keeps the memory it was given, in pages as large as it gets."""

from __future__ import annotations

import ctypes
import mmap
import resource
from typing import Any

_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -2, -4, -8  # malloc.h
_SETTINGS = (
  (_M_MMAP_MAX, 0),
  (_M_ARENA_MAX, 1),
  (_M_TRIM_THRESHOLD, 2**31 - 1),
  (_M_TOP_PAD, 2**26),
)
_LARGE_PAGES = 2**31 - 2**28  # bytes of the heap; above the threshold they would be given back


def keep_freed_memory() -> None:
  """Tells glibc to reuse large blocks instead of giving them back to the system; else nothing.

  XLA on CPU allocates its temporaries anew in every step. Above 32 MB or so glibc maps and unmaps
  each, and the page faults cost a training step of the quickstart a quarter of its CPU time
  (629,000 against 16,000 faults in 40 steps). Memory that was once needed is kept.

  Threads share one heap: those of their own end at 64 MB, and what is larger is mapped after all.
  It must be called before XLA starts its threads.
  """
  try:
    libc = ctypes.CDLL(None)
    mallopt = libc.mallopt
  except (OSError, AttributeError):
    return
  for parameter, value in _SETTINGS:
    mallopt(parameter, value)
  _ask_for_large_pages(libc)


def _ask_for_large_pages(libc: Any) -> None:
  """Has Linux lay what the heap grows by in large pages, where it does so for those who ask.

  The heap grows once, untouched, and is given back to malloc: that takes addresses, no memory. A
  limit on addresses leaves it as it is.
  """
  limits = (resource.getrlimit(which)[0] for which in (resource.RLIMIT_AS, resource.RLIMIT_DATA))
  if not hasattr(mmap, "MADV_HUGEPAGE") or any(at != resource.RLIM_INFINITY for at in limits):
    return
  libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
  libc.free.argtypes = [ctypes.c_void_p]
  libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
  start = libc.malloc(_LARGE_PAGES)
  if start:
    first = -(-start // mmap.PAGESIZE) * mmap.PAGESIZE
    libc.madvise(first, _LARGE_PAGES - mmap.PAGESIZE, mmap.MADV_HUGEPAGE)
    libc.free(start)
