"""Rows of packed documents against a loop that packs by the definition."""

import collections
import hashlib
import itertools

import numpy as np
import pytest

from jaxmoe.data.document import Document, DocumentReader, content_digest
from jaxmoe.data.loader_callbacks import CurrentDocument
from jaxmoe.data.packing import packed_rows, permutation
from jaxmoe.data.tokenizers.byte import ByteTokenizer

EOD = 256


class _Memory:
  domain = "memory"

  def scan(self, max_bytes):
    return iter(())

  def read(self, locator):
    return locator


def _documents(texts):
  reader = DocumentReader(ByteTokenizer(), 10**6)
  return [
    Document(f"{i:03d}", len(text), content_digest(text), None, _Memory(), text, reader)
    for i, text in enumerate(texts)
  ]


TEXTS = ["a", "bc" * 20, "defg", "h" * 7, "ijklmnop", "qr" * 37, "s", "tuvw"]


def _rows(number, seq_len, shuffle_tokens=1, texts=TEXTS, seed="0"):
  dataset = packed_rows(
    _documents(texts), seq_len, shuffle_tokens, (EOD, EOD), seed, CurrentDocument()
  )
  return list(itertools.islice(iter(dataset), number))


def _packed_by_definition(order, seq_len, number):
  """Rows of (ids, labels, position, segment) made token by token from texts in `order`."""
  rows, row, segment = [], [], 0
  for text in order:
    ids, position = list(text.encode()), 0
    segment += 1
    for pair in zip([EOD, *ids], [*ids, EOD]):
      if len(row) == seq_len:
        rows.append(row)
        row, segment, position = [], 1, 0
      row.append((*pair, position, segment))
      position += 1
    if len(row) == seq_len:
      rows.append(row)
      row, segment = [], 0
  return np.array(rows[:number])


def _texts_in(rows):
  """Returns the documents found by reading the labels of consecutive rows."""
  labels = np.concatenate([row["labels"] for row in rows])
  ends = np.flatnonzero(labels == EOD)
  pieces = np.split(labels, ends + 1)[:-1]
  return [bytes(piece[:-1].tolist()).decode() for piece in pieces]


@pytest.mark.parametrize("seq_len", [1, 5, 16, 64])
def test_rows_equal_those_packed_by_the_definition(seq_len):
  rows = _rows(60, seq_len)
  order = _texts_in(rows)
  expected = _packed_by_definition(order, seq_len, 60)
  names = ("ids", "labels", "position", "segment")
  ours = np.stack([np.stack([row[name] for row in rows]) for name in names], axis=-1)
  np.testing.assert_array_equal(ours[: len(expected)], expected)
  assert len(expected) > 0
  assert all(row[name].dtype == np.int32 for row in rows for name in names)


def test_every_epoch_holds_every_document_once_in_another_order():
  order = _texts_in(_rows(100, 16))
  epochs = [order[i : i + len(TEXTS)] for i in range(0, 4 * len(TEXTS), len(TEXTS))]
  assert all(sorted(epoch) == sorted(TEXTS) for epoch in epochs)
  assert len({tuple(epoch) for epoch in epochs}) == 4


def test_a_label_is_the_next_input_of_its_document():
  for row in _rows(50, 16):
    same = row["segment"][1:] == row["segment"][:-1]
    np.testing.assert_array_equal(row["labels"][:-1][same], row["ids"][1:][same])
    starts = row["ids"] == EOD
    np.testing.assert_array_equal(row["position"][starts], 0)


def test_shuffling_rows_keeps_every_row_of_a_window():
  plain = [row["ids"].tolist() for row in _rows(40, 16)]
  mixed = [row["ids"].tolist() for row in _rows(40, 16, shuffle_tokens=16 * 8)]
  for start in range(0, 40, 8):
    assert sorted(mixed[start : start + 8]) == sorted(plain[start : start + 8])
    assert mixed[start : start + 8] != plain[start : start + 8]


def test_a_window_is_no_longer_than_the_documents():
  num_bytes = sum(map(len, TEXTS))
  plain = [row["ids"].tolist() for row in _rows(40, 16)]
  mixed = [row["ids"].tolist() for row in _rows(40, 16, shuffle_tokens=10**6)]
  window = num_bytes // 16
  assert sorted(mixed[:window]) == sorted(plain[:window])


def test_bytes_of_a_document_are_counted_where_it_ends():
  rows = _rows(100, 16)
  labels = np.concatenate([row["labels"] for row in rows])
  counted = np.concatenate([row["bytes"] for row in rows])
  sizes = [len(text) for text in _texts_in(rows)]
  assert counted[labels == EOD].tolist() == sizes
  assert not counted[labels != EOD].any()


def test_rows_of_documents_shorter_than_a_row_are_not_shuffled():
  short = [f"{i:02d}" for i in range(80)]
  plain, mixed = (_rows(40, 16, shuffle, short) for shuffle in (1, 10**6))
  assert [row["ids"].tolist() for row in plain] == [row["ids"].tolist() for row in mixed]


def test_a_permutation_is_one_and_every_order_is_as_likely():
  assert sorted(permutation(1000, "a").tolist()) == list(range(1000))
  counts = collections.Counter(tuple(permutation(3, str(i)).tolist()) for i in range(6000))
  # Six orders, 1000 each; five standard deviations of a binomial.
  assert len(counts) == 6 and all(abs(n - 1000) < 5 * 29 for n in counts.values())


def test_a_permutation_sorts_by_the_published_generator():
  """SplitMix64 (Steele, Lea and Flood 2014) in Python integers; its output for seed 0 is known."""

  def numbers(state, count):
    mask = 2**64 - 1
    for _ in range(count):
      state = z = (state + 0x9E3779B97F4A7C15) & mask
      z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
      z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
      yield z ^ (z >> 31)

  assert next(numbers(0, 1)) == 0xE220A8397B1DCDAF
  seed = int.from_bytes(hashlib.blake2b(b"name", digest_size=8).digest(), "big")
  drawn = list(numbers(seed, 50))
  assert permutation(50, "name").tolist() == sorted(range(50), key=drawn.__getitem__)


def test_one_document_shorter_than_a_row_fills_rows():
  rows = _rows(3, 8, texts=["ab"])
  assert rows[0]["labels"].tolist() == [97, 98, EOD, 97, 98, EOD, 97, 98]
  assert rows[0]["segment"].tolist() == [1, 1, 1, 2, 2, 2, 3, 3]
  assert rows[1]["position"].tolist() == [0, 0, 1, 2, 0, 1, 2, 0]


def test_seeds_give_other_orders_and_neighbours_share_no_epoch():
  orders = [_texts_in(_rows(80, 16, seed=str(seed))) for seed in range(2)]
  epochs = [[tuple(order[i : i + 8]) for i in range(0, 24, 8)] for order in orders]
  assert not set(epochs[0]) & set(epochs[1])


def test_a_document_starts_with_one_id_and_ends_with_another():
  rows = packed_rows(_documents(["ab"]), 3, 1, (7, 9), "seed", CurrentDocument())
  row = next(iter(rows))
  a, b = b"ab"
  assert row["ids"].tolist() == [7, a, b] and row["labels"].tolist() == [a, b, 9]
