"""Orders in which a row's blocks lie over the devices of `context`, chosen on the host.

Attention that is causal and stays within documents has unequal work by token. A ring (Liu et al.
2023) takes a step for the keys of each device, and each step as long as its busiest device: so the
order counts by the visible pairs (query, key) of the busiest device, summed over steps. Of one
document zigzag (device r holds blocks r and 2n-1-r) is even to the pair; of several it is not, and
`balanced` looks for better by what each row's documents let its blocks see.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import numpy as np

from jaxmoe.core.errors import InputError

Order = Literal["plain", "zigzag", "balanced"]
SLOT = "slot"
MAX_ROUNDS = 64
"""Swaps that `balanced` makes at most; far more than it has been seen to."""


def order_blocks(segment_L: np.ndarray, context: int, order: Order) -> np.ndarray:
  """Returns which token lies at each slot: slots r L/n to (r+1) L/n are device r's, ascending.

  What follows tokens (ids, labels, positions, segments, slots) is indexed by it, and its `argsort`
  undoes that. Pure and without chance: a row has the same order in every process and run.

  Args:
    segment_L: Which document each token is of, contiguous, from 1; 0 is padding.
    context: Devices n along `context`.
    order: "plain": as they are; "zigzag"; "balanced": never more pairs than zigzag.

  Returns:
    int32 (L,), a permutation.

  Raises:
    InputError: If the row does not divide into the blocks that the order asks for.
  """
  check_order(len(segment_L), context, order)
  slots_L = np.arange(len(segment_L), dtype=np.int32)
  if order == "plain" or context == 1:
    return slots_L
  if order == "zigzag":
    return _permutation(_zigzag(context), slots_L, context)
  return min(
    (_permutation(found, slots_L, context) for found in _candidates(segment_L, context)),
    key=lambda permutation: busiest_pairs(segment_L, permutation, context),
  )


def order_batch(
  batch: Mapping[str, np.ndarray], context: int, order: Order
) -> dict[str, np.ndarray]:
  """Returns a batch whose columns lie in an order, row by row, with the `slot` of each, int32.

  Args:
    batch: Arrays (B, L) in order of time, `segment` among them.
    context: Devices along `context`.
    order: As in `order_blocks`.
  """
  rows = np.asarray(batch["segment"])
  slot_BL = np.stack([order_blocks(segment_L, context, order) for segment_L in rows])
  ordered = {name: np.take_along_axis(rows, slot_BL, axis=1) for name, rows in batch.items()}
  return {**ordered, SLOT: slot_BL}


def in_time(batch: Mapping[str, Any]) -> dict[str, Any]:
  """Returns the batch that `order_batch` was given; one in order of time as it is."""
  if SLOT not in batch:
    return dict(batch)
  back_BL = batch[SLOT].argsort(axis=1)
  rows = {name: rows for name, rows in batch.items() if name != SLOT}
  return {name: of[np.arange(len(of))[:, None], back_BL] for name, of in rows.items()}


def check_order(seq_len: int, context: int, order: Order) -> None:
  """Checks that rows of a length divide into an order's blocks.

  Raises:
    InputError: One line with the next lengths that do.
  """
  multiple = context if order == "plain" else 2 * context
  if seq_len % multiple and context > 1:
    below = seq_len - seq_len % multiple
    nearest = " or ".join(str(size) for size in (below, below + multiple) if size)
    raise InputError(
      f"seq_len={seq_len} is no multiple of {multiple}, the blocks of order={order} over "
      f"context={context} devices; take seq_len {nearest}"
    )


def visible_pairs(segment_L: np.ndarray, permutation_L: np.ndarray, context: int) -> np.ndarray:
  """Returns how many pairs (query, key) each device has at each step of a ring, int64 (n, n).

  A query sees keys of its document up to itself; padding sees nothing. At step s device r has the
  keys of device r - s. Queries that travel instead (token_ring) meet the same pairs in other order.
  """
  parts = permutation_L.reshape(context, -1)
  owner_L = np.empty(len(segment_L), np.int64)
  owner_L[parts] = np.arange(context)[:, None]
  pairs = _pairs_of_owners(segment_L, owner_L, context)
  devices, steps = np.ogrid[:context, :context]
  return pairs[devices, (devices - steps) % context]


def busiest_pairs(segment_L: np.ndarray, permutation_L: np.ndarray, context: int) -> int:
  """Returns the pairs of the busiest device, summed over the steps of a ring."""
  return int(visible_pairs(segment_L, permutation_L, context).max(axis=0).sum())


def imbalance(segment_L: np.ndarray, permutation_L: np.ndarray, context: int) -> float:
  """Returns the busiest device's pairs, summed over steps, over the mean of devices; 1 is even."""
  pairs = visible_pairs(segment_L, permutation_L, context)
  return float(pairs.max(axis=0).sum() * context / max(1, pairs.sum()))


def _pairs_of_owners(segment_L: np.ndarray, owner_L: np.ndarray, num: int) -> np.ndarray:
  """Returns (num, num) pairs of queries of one owner and keys of another."""
  held_LN = np.zeros((len(segment_L) + 1, num), np.int64)
  np.add.at(held_LN, (np.arange(1, len(segment_L) + 1), owner_L), 1)
  held_LN = held_LN.cumsum(axis=0)
  starts = np.flatnonzero(np.diff(segment_L, prepend=segment_L[0] - 1))
  first_L = np.repeat(starts, np.diff(starts, append=len(segment_L)))
  seen_LN = (held_LN[1:] - held_LN[first_L]) * (segment_L > 0)[:, None]
  pairs = np.zeros((num, num), np.int64)
  np.add.at(pairs, owner_L, seen_LN)
  return pairs


def _zigzag(context: int) -> np.ndarray:
  """Returns the device of each of 2n blocks."""
  return np.r_[:context, context - 1 : -1 : -1]


def _permutation(device_of: np.ndarray, slots_L: np.ndarray, context: int) -> np.ndarray:
  """Returns the tokens of device 0, then 1, ..., each in ascending order."""
  blocks = slots_L.reshape(len(device_of), -1)
  return np.concatenate([blocks[device_of == device].ravel() for device in range(context)])


def _candidates(segment_L: np.ndarray, context: int) -> list[np.ndarray]:
  """Returns zigzag, and what swaps of blocks make of it and of blocks dealt out by their work."""
  zigzag = _zigzag(context)
  finer = 2 if len(segment_L) % (4 * context) == 0 else 1
  num_blocks = 2 * finer * context
  owner_L = np.repeat(np.arange(num_blocks), len(segment_L) // num_blocks)
  pairs = _pairs_of_owners(segment_L, owner_L, num_blocks)
  by_work = np.argsort(-pairs.sum(axis=1), kind="stable")
  dealt = np.empty(num_blocks, np.int64)
  dealt[by_work] = np.tile(np.r_[:context, context - 1 : -1 : -1], finer)
  starts = (np.repeat(zigzag, finer), dealt)
  return [zigzag, *(_improve(start, pairs, context) for start in starts)]


def _improve(device_of: np.ndarray, pairs: np.ndarray, context: int) -> np.ndarray:
  """Returns the blocks' devices after swapping the best two, as long as that helps.

  A swap of blocks a and b moves the row u = [a] - [b] of places by v = [b's device] - [a's]; so the
  pairs that devices meet become met + v (u P A)' + (A' P u) v' + v (u P u) v'.
  """
  device_of, eye = device_of.copy(), np.eye(context, dtype=np.int64)
  for _ in range(MAX_ROUNDS):
    places = eye[device_of]
    met, rows, columns = places.T @ pairs @ places, pairs @ places, pairs.T @ places
    one, other = np.nonzero(np.triu(device_of[:, None] != device_of[None]))
    move = (eye[device_of[other]] - eye[device_of[one]])[:, :, None]
    inner = pairs[one, one] - pairs[one, other] - pairs[other, one] + pairs[other, other]
    tried = met + move * (rows[one] - rows[other])[:, None, :]
    tried += (columns[one] - columns[other])[:, :, None] * move.swapaxes(1, 2)
    tried += inner[:, None, None] * move * move.swapaxes(1, 2)
    costs = _cost(tried)
    if not len(costs) or costs.min() >= _cost(met[None])[0]:
      break
    best = costs.argmin()
    device_of[[one[best], other[best]]] = device_of[[other[best], one[best]]]
  return device_of


def _cost(met: np.ndarray) -> np.ndarray:
  """Returns the busiest device's pairs summed over steps, of several (queries, keys) by device."""
  devices, steps = np.ogrid[: met.shape[1], : met.shape[1]]
  return met[:, devices, (devices - steps) % met.shape[1]].max(axis=1).sum(axis=1)
