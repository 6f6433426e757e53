"""Endless training batches with a state that can be saved and restored bit for bit.

Every process tokenizes, packs, shuffles and mixes the whole global stream and keeps its rows of
each batch: packing after slicing would make the batches depend on the number of processes. One
thread works ahead; the state always describes the batches that were handed out, not those made.
"""

from __future__ import annotations

import dataclasses
import json
import threading
import time
import weakref
from collections.abc import Sequence
from typing import Any

import grain
import numpy as np

from jaxmoe.core.errors import InputError
from jaxmoe.data.document import Document
from jaxmoe.data.packing import packed_rows

_AHEAD_BYTES = 2**26  # batches made ahead: at most about this much, and 2 to 16 of them
_COUNTS = ("tokens", "documents", "bytes")
Batch = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Lane:
  """The documents of one domain and its share of the rows; shares sum to 1."""

  domain: str
  documents: Sequence[Document]
  share: float


class Stream:
  """An iterator of batches: dicts of int32 arrays (rows of this process, L).

  `ids`, `labels` (the next id, or -1 where it is not learned), `position` (from 0 in every piece
  of a document) and `segment` (from 1 in every row). There is no padding, as the stream never ends.
  Made by `Corpus.stream`.
  """

  def __init__(
    self,
    *,
    lanes: Sequence[Lane],
    shape: tuple[int, int],
    keep: slice,
    shuffle_tokens: int,
    eod_id: int,
    seed: int,
    fingerprint: str,
  ):
    self._lanes, self._fingerprint = list(lanes), fingerprint
    batch_size, seq_len = shape
    rows = []
    for index, lane in enumerate(lanes):
      window, name = int(shuffle_tokens * lane.share), f"{seed}/{lane.domain}"
      rows.append(packed_rows(lane.documents, seq_len, window, eod_id, name).map(_Tag(index)))
    mixed = grain.IterDataset.mix(rows, [lane.share for lane in lanes])
    batches = mixed.batch(batch_size).map(_Finish(keep, len(lanes)))
    ahead = min(16, max(2, _AHEAD_BYTES // (batch_size * seq_len * 4 * 4)))
    prefetched = grain.experimental.ThreadPrefetchIterDataset(batches, prefetch_buffer_size=ahead)
    iterator = iter(prefetched)
    self._counts = np.zeros((len(lanes), len(_COUNTS)), np.int64)
    self._num_batches = 0
    self._time = {"busy_s": 0.0, "wait_s": 0.0, "tokens": 0, "bytes": 0}
    # Runs at exit too, while the thread can still be joined. It empties the list, because grain's
    # iterator closes itself again when deleted and fails if modules are gone by then.
    self._open = [iterator]
    self._close = weakref.finalize(self, _close, self._open)

  def __iter__(self) -> Stream:
    return self

  def __next__(self) -> Batch:
    start = time.perf_counter()
    batch, counts, busy_s = next(self._iterator)
    self._counts += counts
    self._num_batches += 1
    self._time["wait_s"] += time.perf_counter() - start
    self._time["busy_s"] += busy_s
    self._time["tokens"] += int(counts[:, 0].sum())
    self._time["bytes"] += int(counts[:, 2].sum())
    return batch

  def state(self) -> dict[str, Any]:
    """Returns JSON-able values that `restore` continues from, after the batches handed out."""
    state = {
      "fingerprint": self._fingerprint,
      "batches": self._num_batches,
      "counts": {
        lane.domain: counts.tolist() for lane, counts in zip(self._lanes, self._counts)
      },
      "iterator": self._iterator.get_state(),
    }
    return json.loads(json.dumps(state))

  def restore(self, state: dict[str, Any]) -> None:
    """Continues after the batches that had been handed out when `state` was taken.

    Raises:
      InputError: the state is of other data, another tokenizer, batch size or seed.
    """
    if state.get("fingerprint") != self._fingerprint:
      raise InputError(
        "the saved data state is of other data (recipe, files, tokenizer, batch size or seed: "
        f"fingerprint {str(state.get('fingerprint'))[:12]}, now {self._fingerprint[:12]}); "
        "use the same, or start in a new workdir"
      )
    self._iterator.set_state(_with_tuples(state["iterator"]))
    self._num_batches = state["batches"]
    self._counts = np.array([state["counts"][lane.domain] for lane in self._lanes], np.int64)

  def stats(self) -> dict[str, Any]:
    """Returns what was handed out since the first batch, and under `time` the cost since start.

    `batches` and `domains` ({name: tokens, documents, bytes, epochs}; documents and bytes count
    when a document's last token is handed out) cover all processes and are restored with the
    state. `time.busy_s` is processor time of the thread that works ahead, `time.wait_s` what the
    caller waited, and the rates are per busy second.
    """
    domains = {}
    for lane, counts in zip(self._lanes, self._counts):
      values = dict(zip(_COUNTS, map(int, counts)))
      domains[lane.domain] = {**values, "epochs": values["documents"] / len(lane.documents)}
    busy_s = max(self._time["busy_s"], 1e-9)
    clock = {
      "busy_s": self._time["busy_s"],
      "wait_s": self._time["wait_s"],
      "tokens_per_s": self._time["tokens"] / busy_s,
      "mb_per_s": self._time["bytes"] / busy_s / 1e6,
    }
    return {"batches": self._num_batches, "domains": domains, "time": clock}

  @property
  def num_batches(self) -> int:
    """How many batches were handed out, before a restart too."""
    return self._num_batches

  def close(self) -> None:
    """Stops the thread; no batch or state can be taken afterwards."""
    self._close()

  @property
  def _iterator(self) -> grain.DatasetIterator:
    if not self._open:
      raise ValueError("the stream is closed; take another from the corpus")
    return self._open[0]


def _close(iterators: list[grain.DatasetIterator]) -> None:
  while iterators:
    iterators.pop().close()


class _Tag:
  """Marks the rows of one domain."""

  def __init__(self, index: int):
    self._index = np.array(index, np.int32)

  def __call__(self, row: Batch) -> Batch:
    return {**row, "domain": self._index}


class _Finish:
  """Counts a global batch by domain, then keeps the rows of this process."""

  def __init__(self, keep: slice, num_domains: int):
    self._keep, self._num_domains = keep, num_domains
    self._thread = threading.local()

  def __call__(self, batch: Batch) -> tuple[Batch, np.ndarray, float]:
    batch = dict(batch)
    domain_B, bytes_BL = batch.pop("domain"), batch.pop("bytes")
    per_row = [
      np.full(len(domain_B), bytes_BL.shape[1]),
      (bytes_BL > 0).sum(axis=1),  # labels do not tell: an end may be masked
      bytes_BL.sum(axis=1, dtype=np.int64),
    ]
    counts = np.zeros((self._num_domains, len(_COUNTS)), np.int64)
    np.add.at(counts, domain_B, np.stack(per_row, axis=1))
    now = time.thread_time()
    busy_s, self._thread.last = now - getattr(self._thread, "last", 0.0), now
    return {name: array[self._keep] for name, array in batch.items()}, counts, busy_s


def _with_tuples(plain: Any) -> Any:
  """Returns grain's state with pairs of numbers as tuples again.

  JSON made them lists, and grain compares them with a tuple: a row that starts a document would be
  taken for the rest of one.
  """
  if isinstance(plain, dict):
    return {name: _with_tuples(value) for name, value in plain.items()}
  if isinstance(plain, list):
    values = [_with_tuples(value) for value in plain]
    return tuple(values) if all(type(value) is int for value in values) else values
  return plain
