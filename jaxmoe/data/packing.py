"""Packing of documents to rows: concatenate, then split, with segments and positions.

A document of ids t1..tn is the pairs (eod, t1), (t1, t2), ..., (tn, eod) of input and label, so
every token is predicted once and every document starts from the end-of-document id. The pairs of a
domain's documents are laid end to end and cut into rows; a document cut at the end of a row goes on
in the next one as a segment of its own with positions from 0, so no row attends to another.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import grain
import numpy as np

from jaxmoe.data.document import Document, without_start_id
from jaxmoe.data.loader_callbacks import CurrentDocument
from jaxmoe.data.tokenizers.tokenizer import BoundaryIds

_PAIRS = "pairs"
INPUT, LABEL, BYTES = range(3)  # columns of a pair
_ENDLESS = 2**62  # documents until the stream ends


class TokenPairs:
  """The documents of one domain, epoch after epoch, as pairs.

  Element i is document i % n in the order of epoch i // n: {'pairs': int32 (length + 1, 3)} with
  columns input, label and bytes: the bytes of the whole document on its last pair and 0 elsewhere,
  so that a sum counts finished documents.
  """

  def __init__(
    self, documents: Sequence[Document], ends: BoundaryIds, seed: str, reading: CurrentDocument
  ):
    self._documents, self._ends, self._seed = documents, ends, seed
    self._reading = reading
    self._epoch, self._order = -1, np.zeros(0, np.int64)

  def __call__(self, index: int) -> dict[str, np.ndarray]:
    """Returns element `index`."""
    epoch, place = divmod(index, len(self._documents))
    if epoch != self._epoch:
      self._epoch = epoch
      self._order = permutation(len(self._documents), f"{self._seed}/documents/{epoch}")
    document = self._documents[self._order[place]]
    self._reading.document = document.source.domain, document.name
    ids, scored = document.ids_and_scored
    ids, scored = without_start_id(ids, scored, self._ends[0])
    pairs = np.zeros((len(ids) + 1, 3), np.int32)
    pairs[0, INPUT], pairs[-1, LABEL] = self._ends
    pairs[1:, INPUT] = pairs[:-1, LABEL] = ids
    if scored is not None:
      pairs[~scored, LABEL] = -1
    pairs[-1, BYTES] = document.num_bytes
    return {_PAIRS: pairs}


def permutation(length: int, name: str) -> np.ndarray:
  """Returns an order of range(length) that depends on `name` alone: ranks of SplitMix64 numbers.

  NumPy may change its own between versions. Grain's takes 30 ms to go once through anything shorter
  than 65,536, however short: 1 ms a document in a corpus of 30.
  """
  start = int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "big")
  z = np.arange(1, length + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(start)
  z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
  z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
  return np.argsort(z ^ (z >> np.uint64(31)), kind="stable")


def packed_rows(
  documents: Sequence[Document],
  seq_len: int,
  shuffle_tokens: int,
  ends: BoundaryIds,
  seed: str,
  reading: CurrentDocument,
) -> grain.IterDataset:
  """Returns the endless rows of one domain; `reading` is kept at the document being read.

  Documents are in another order in every epoch. If they are longer than a row on average, rows then
  change places inside a window, because a long document fills many rows one after the other and a
  batch of its pieces is a poor sample. A window is no longer than the documents are in bytes, so
  that a small corpus does not pass through it many times before the first batch.
  """
  num_bytes = sum(document.num_bytes for document in documents)
  # No reader threads: the corpus is small or cached, and one prefetch thread runs all of this.
  options = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
  pairs = grain.MapDataset.range(_ENDLESS).map(TokenPairs(documents, ends, seed, reading))
  rows: grain.IterDataset = grain.experimental.ConcatThenSplitIterDataset(
    pairs.to_iter_dataset(options), length_struct={_PAIRS: seq_len}
  )
  window = min(shuffle_tokens, num_bytes) // seq_len
  if window > 1 and num_bytes > seq_len * len(documents):
    rows = grain.experimental.WindowShuffleIterDataset(
      rows, window_size=window, seed=_seed(f"{seed}/rows")
    )
  return rows.map(_row)


def _row(packed: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
  pairs = packed[_PAIRS]
  return {
    "ids": pairs[:, INPUT],
    "labels": pairs[:, LABEL],
    "position": packed[f"{_PAIRS}_positions"],
    "segment": packed[f"{_PAIRS}_segment_ids"],
    "bytes": pairs[:, BYTES],
  }


def _seed(name: str) -> int:
  """Returns a seed below 2**31; grain adds the number of the window to it, below 2**32.

  Hashing keeps seed s + 1 from repeating the windows of seed s one later.
  """
  return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=4).digest(), "big") >> 1
