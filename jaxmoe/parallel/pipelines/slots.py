"""Slots for what lies on a device for some ticks: as few as the fullest tick needs."""

from __future__ import annotations

import dataclasses
import heapq


@dataclasses.dataclass(frozen=True)
class Stay:
  """Something that lies on a device from the end of one tick until another has read it.

  Attributes:
    written: The tick at whose end it is written; -1 is before the first.
    last_read: The last tick that reads it. In that tick the slot may be written anew.
    key: Stage and microbatch that it belongs to.
  """

  written: int
  last_read: int
  key: tuple[int, int]


def assign_slots(stays: list[Stay]) -> tuple[dict[tuple[int, int], int], int]:
  """Returns the slot of each key, and how many slots there are: the most that lie there at once.

  A greedy colouring of intervals, which is optimal: by time of writing, each takes the lowest slot
  that is free.
  """
  free: list[int] = []
  busy: list[tuple[int, int]] = []
  slot_of: dict[tuple[int, int], int] = {}
  count = 0
  for stay in sorted(stays, key=lambda stay: stay.written):
    while busy and busy[0][0] <= stay.written:
      heapq.heappush(free, heapq.heappop(busy)[1])
    if not free:
      heapq.heappush(free, count)
      count += 1
    slot = heapq.heappop(free)
    heapq.heappush(busy, (stay.last_read, slot))
    slot_of[stay.key] = slot
  return slot_of, count
