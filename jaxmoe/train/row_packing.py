"""Packing windows of documents into the rows of batches, of one shape or of a few that fit.

`packed_batches` has one shape whatever there is. `fitted_batches` sorts windows by size, puts each
into the row that it fills best, and cuts rows to at most `SHAPES` lengths, those that leave least
empty. No two rows are less than half full, so lengths a factor of 2^(1/4) apart would leave at most
a fifth of what is computed empty.
"""

from __future__ import annotations

import bisect
import dataclasses
import itertools
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

Window = tuple[np.ndarray, np.ndarray]
"""Input ids, and labels of the same length: -1 where another window scores."""
Item = tuple[int, Window]
"""A window and whose it is."""

SHAPES = 4
"""The most shapes of batches, each of which is compiled."""
MOST = 1.3
"""Positions that are computed, over those of the windows, at most."""
GOOD = 1.15
"""A ratio for which one more shape is not compiled."""
SPARE = 0.1
"""The share of rows that may be empty so that more go together."""
SHORT = 512
"""Short windows share rows of this length."""
BUFFER = 2**22
"""Tokens of windows that are packed together; more are never held."""
_LEVELS = 256


def packed_batches(
  windows: Iterator[Window], batch_size: int, length: int
) -> Iterator[dict[str, np.ndarray]]:
  """Yields batches of full shape; a window goes into the open row if it fits, else a new one."""
  rows: list[list[Window]] = [[]]
  free = length
  for window in windows:
    size = len(window[0])
    if size > free:
      if len(rows) == batch_size:
        yield batch_of(rows, batch_size, length)
        rows = []
      rows.append([])
      free = length
    rows[-1].append(window)
    free -= size
  if rows[0]:
    yield batch_of(rows, batch_size, length)


@dataclasses.dataclass(frozen=True)
class Shapes:
  """Lengths of rows, rising, and how many rows of each go together."""

  lengths: tuple[int, ...]
  together: tuple[int, ...]

  def of(self, size: int) -> int:
    """Returns the index of the shortest row that holds `size` tokens."""
    return bisect.bisect_left(self.lengths, size)


def fitted_batches(
  items: Iterable[Item], shape: tuple[int, int], least: int = 1, apart: bool = True
) -> Iterator[tuple[dict[str, np.ndarray], list[list[Item]]]]:
  """Yields batches of at most `SHAPES` shapes, and what lies in each of their rows.

  Args:
    items: The windows.
    shape: (the most rows of a batch, the longest row).
    least: The shortest row.
    apart: Whether a row has windows of one owner only.
  """
  shapes: Shapes | None = None
  waiting: dict[int, list[list[Item]]] = {}
  for chunk, more in itertools.pairwise(itertools.chain(_chunks(items), [[]])):
    longest = max(len(inputs) for _, (inputs, _) in chunk)
    capacity = shape[1] if shapes or more else min(shape[1], max(longest, least, SHORT))
    rows = pack_rows(chunk, capacity, apart)
    sizes = [max(least, size_of(row)) for row in rows]
    if shapes is None:
      shapes = choose_shapes([*sizes, capacity] if more else sizes, shape[0], bool(more))
    for row, size in zip(rows, sizes):
      at = shapes.of(size)
      waiting.setdefault(at, []).append(row)
      if len(waiting[at]) == shapes.together[at]:
        yield _batch(waiting.pop(at), shapes, at)
  for at, rows in sorted(waiting.items()):
    assert shapes is not None
    yield _batch(rows, shapes, at)


def pack_rows(items: Sequence[Item], capacity: int, apart: bool) -> list[list[Item]]:
  """Returns rows of at most `capacity` tokens: largest first, each into the fullest it fits."""
  rows: list[list[Item]] = []
  free: dict[int, list[tuple[int, int]]] = {}  # by owner (free tokens, row), sorted
  for owner, window in sorted(items, key=lambda item: -len(item[1][0])):
    size, rooms = len(window[0]), free.setdefault(owner if apart else 0, [])
    at = bisect.bisect_left(rooms, (size, 0))
    left, row = rooms.pop(at) if at < len(rooms) else (capacity, len(rows))
    if row == len(rows):
      rows.append([])
    rows[row].append((owner, window))
    bisect.insort(rooms, (left - size, row))
  return rows


def choose_shapes(sizes: Sequence[int], batch_size: int, more: bool = False) -> Shapes:
  """Returns shapes for rows of some sizes: as few as leave little empty, `SHAPES` at most.

  Args:
    sizes: Tokens in each row.
    batch_size: The most rows of a batch.
    more: Whether other rows like these are to come, so that all batches get filled.
  """
  filled, best = sum(sizes), (float("inf"), Shapes((), ()))
  for lengths in _cuts(sizes):
    held = np.bincount(np.searchsorted(lengths, sizes), minlength=len(lengths))
    spare = min(SPARE, max(MOST * filled / float(held @ lengths) - 1, 0.0))
    together = [batch_size if more else _together(n, batch_size, spare) for n in held.tolist()]
    whole = [n if more else -(-n // rows) * rows for n, rows in zip(held.tolist(), together)]
    computed = sum(n * length for n, length in zip(whole, lengths))
    if computed < best[0]:
      best = computed, Shapes(tuple(lengths), tuple(together))
    if best[0] <= GOOD * filled:
      break
  return best[1]


def size_of(row: Sequence[Item]) -> int:
  """Returns how many tokens a row holds."""
  return sum(len(inputs) for _, (inputs, _) in row)


def batch_of(
  rows: list[list[Window]], batch_size: int, length: int
) -> dict[str, np.ndarray]:
  """Returns the windows of each row one after the other, as `Tokens.of_batch` reads them."""
  batch = {
    name: np.zeros((batch_size, length), np.int32) for name in ("ids", "position", "segment")
  }
  batch["labels"] = np.full((batch_size, length), -1, np.int32)
  for row, windows in enumerate(rows):
    at = 0
    for segment, (inputs, labels) in enumerate(windows, start=1):
      here = slice(at, at + len(inputs))
      batch["ids"][row, here] = inputs
      batch["labels"][row, here] = labels
      batch["position"][row, here] = np.arange(len(inputs))
      batch["segment"][row, here] = segment
      at += len(inputs)
  return batch


def _batch(
  rows: list[list[Item]], shapes: Shapes, at: int
) -> tuple[dict[str, np.ndarray], list[list[Item]]]:
  windows = [[window for _, window in row] for row in rows]
  return batch_of(windows, shapes.together[at], shapes.lengths[at]), rows


def _chunks(items: Iterable[Item]) -> Iterator[list[Item]]:
  """Yields the windows in lists of about `BUFFER` tokens."""
  chunk: list[Item] = []
  held = 0
  for item in items:
    chunk.append(item)
    held += len(item[1][0])
    if held >= BUFFER:
      yield chunk
      chunk, held = [], 0
  if chunk:
    yield chunk


def _cuts(sizes: Sequence[int]) -> Iterator[list[int]]:
  """Yields the one, two, ... lengths, rising, to which rows are cut with least left empty."""
  levels, held = np.unique(sizes, return_counts=True)
  if len(levels) > _LEVELS:
    grid = np.unique(np.ceil(np.linspace(levels[0], levels[-1], _LEVELS)).astype(levels.dtype))
    held = np.bincount(np.searchsorted(grid, levels), held, len(grid))
    levels = grid
  before = np.concatenate([[0], np.cumsum(held)])
  # [first, last]: the rows of a run of levels, each as long as the longest.
  cost = levels[None] * (before[None, 1:] - before[:-1, None])
  cost = np.where(np.triu(np.ones(cost.shape, bool)), cost, np.inf)
  least, starts = cost[0], []
  yield [int(levels[-1])]
  for _ in range(min(SHAPES, len(levels)) - 1):
    through = np.concatenate([[np.inf], least[:-1]])[:, None] + cost
    starts.append(np.argmin(through, axis=0))
    least, last, ends = np.min(through, axis=0), len(levels) - 1, []
    for start in reversed(starts):
      ends.append(last)
      last = int(start[last]) - 1
    yield [int(levels[end]) for end in reversed([*ends, last])]


def _together(rows: int, most: int, spare: float) -> int:
  """Returns how many rows go together: as many as leave but few of the last batch empty."""
  return next(
    size for size in range(min(rows, most), 0, -1) if -(-rows // size) * size <= rows * (1 + spare)
  )
