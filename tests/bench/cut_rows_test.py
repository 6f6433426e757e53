"""Blocks and bytes of rows over context devices, against counts by hand."""

import itertools

import numpy as np
import pytest

from jaxmoe.bench import cut_rows
from jaxmoe.bench.cut_rows import (
  BLOCK,
  DEVICES,
  DOCUMENTS,
  HEADS,
  LENGTH,
  SIZE,
  blocks_visited,
  rows_of,
  segment_of,
  sent,
)

NUM = LENGTH // BLOCK
ALL = NUM * (NUM + 1) // 2  # pairs of blocks of a causal row


def blocks_by_hand(lengths, of_device):
  """Returns the pairs of blocks in which a query of a device's blocks sees a key, by loops."""
  segment = segment_of(lengths).reshape(NUM, BLOCK)
  met = 0
  for query, key in itertools.product(of_device, range(NUM)):
    met += key <= query and bool(set(segment[query]) & set(segment[key]))
  return met


@pytest.mark.parametrize("documents", DOCUMENTS)
def test_a_ring_in_plain_order_visits_what_a_loop_counts(documents):
  lengths = DOCUMENTS[documents]
  parts = np.arange(NUM).reshape(DEVICES, -1)
  by_hand = [blocks_by_hand(lengths, part) for part in parts]
  for attend in ("ring", "token_ring", "gather"):
    assert list(blocks_visited(segment_of(lengths), attend, "plain")) == by_hand
  whole = blocks_visited(segment_of(lengths), "ulysses", "plain")
  assert list(whole) == [sum(by_hand) / DEVICES] * DEVICES


def test_orders_visit_as_much_in_all_and_zigzag_is_even_for_one_document():
  segment = segment_of(DOCUMENTS["one document"])
  assert list(blocks_visited(segment, "ring", "zigzag")) == [ALL / DEVICES] * DEVICES
  uneven = segment_of(DOCUMENTS["a long one and short ones"])
  plain, zigzag, balanced = (
    blocks_visited(uneven, "ring", order) for order in ("plain", "zigzag", "balanced")
  )
  assert plain.sum() == zigzag.sum() == balanced.sum()
  assert balanced.max() <= zigzag.max() < plain.max()


def test_a_token_ring_sends_half_as_much_one_way_as_a_ring():
  part = 4 * LENGTH // DEVICES * HEADS * SIZE
  assert sent("ring", "plain")["hop_bytes"] == 2 * part
  assert sent("token_ring", "plain")["hop_bytes"] == part * (SIZE + 1) / SIZE


def test_a_row_is_told_for_every_strategy_and_order():
  nothing = {f"{attend} {order}": {"hop_bytes": 1.0, "sent_bytes": 2.0}
             for attend, order in cut_rows.CHOICES}  # fmt: skip
  rows = rows_of("one document", nothing)
  assert [row["name"] for row in rows] == list(nothing) and len(rows) == 12
  assert all(row["blocks"] >= row["mean_blocks"] and row["busiest_pairs"] >= 1 for row in rows)
