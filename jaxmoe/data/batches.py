"""Batches of all domains: packed by domain, mixed row by row, counted."""

from __future__ import annotations

import dataclasses
import threading
import time
from collections.abc import Sequence

import grain
import numpy as np

from jaxmoe.data.document import Document
from jaxmoe.data.loader_callbacks import CurrentDocument
from jaxmoe.data.packing import packed_rows
from jaxmoe.data.tokenizers.tokenizer import BoundaryIds

COUNTS = ("tokens", "documents", "bytes")
NAMES = ("ids", "labels", "position", "segment", "domain")
Batch = dict[str, np.ndarray]
ProducedBatch = tuple[Batch, np.ndarray, float]
"""A batch of this process, COUNTS of the global batch by domain, and processor seconds it took."""

_AHEAD_BYTES = 2**26  # batches made ahead: at most about this much, and 2 to 16 of them


@dataclasses.dataclass(frozen=True)
class DomainStream:
  """The documents of one domain and its share of the rows; shares sum to 1."""

  domain: str
  documents: Sequence[Document]
  share: float


@dataclasses.dataclass(frozen=True)
class BatchSpec:
  """How rows become batches.

  Attributes:
    shape: (rows of the global batch, tokens in a row).
    keep: The rows this process keeps.
    shuffle_tokens: The window of the shuffle, shared by the domains.
    ends: The ids that a document starts and ends with.
    seed: Of all orders.
  """

  shape: tuple[int, int]
  keep: slice
  shuffle_tokens: int
  ends: BoundaryIds
  seed: int

  @property
  def num_prefetched(self) -> int:
    """How many batches are made ahead."""
    return min(16, max(2, _AHEAD_BYTES // (self.shape[0] * self.shape[1] * 4 * len(NAMES))))


def endless_batches(
  streams: Sequence[DomainStream], spec: BatchSpec, reading: CurrentDocument
) -> grain.IterDataset:
  """Returns the dataset of `ProducedBatch`; `reading` is kept at the document being read."""
  batch_size, seq_len = spec.shape
  rows = []
  for index, stream in enumerate(streams):
    window, name = int(spec.shuffle_tokens * stream.share), f"{spec.seed}/{stream.domain}"
    packed = packed_rows(stream.documents, seq_len, window, spec.ends, name, reading)
    rows.append(packed.map(_AddDomain(index)))
  mixed = grain.IterDataset.mix(rows, [stream.share for stream in streams])
  return mixed.batch(batch_size).map(_CountAndSlice(spec.keep, len(streams)))


class _AddDomain:
  """Marks the rows of one domain."""

  def __init__(self, index: int):
    self._index = np.array(index, np.int32)

  def __call__(self, row: Batch) -> Batch:
    return {**row, "domain": self._index}


class _CountAndSlice:
  """Counts a global batch by domain, then keeps the rows of this process."""

  def __init__(self, keep: slice, num_domains: int):
    self._keep, self._num_domains = keep, num_domains
    self._thread = threading.local()

  def __call__(self, batch: Batch) -> ProducedBatch:
    batch = dict(batch)
    domain_B, bytes_BL = batch.pop("domain"), batch.pop("bytes")
    batch["domain"] = np.broadcast_to(domain_B[:, None], bytes_BL.shape)
    per_row = [
      np.full(len(domain_B), bytes_BL.shape[1]),
      (bytes_BL > 0).sum(axis=1),  # labels do not tell: an end may be masked
      bytes_BL.sum(axis=1, dtype=np.int64),
    ]
    counts = np.zeros((self._num_domains, len(COUNTS)), np.int64)
    np.add.at(counts, domain_B, np.stack(per_row, axis=1))
    now = time.thread_time()
    busy_s, self._thread.last = now - getattr(self._thread, "last", 0.0), now
    return {name: array[self._keep] for name, array in batch.items()}, counts, busy_s
