"""Endless training batches with a state that can be saved and restored bit for bit.

Every process tokenizes, packs, shuffles and mixes the whole global stream and keeps its rows of
each batch: packing after slicing would make the batches depend on the number of processes. A thread
or another process works ahead; the state always describes the batches that were handed out.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxmoe.core.errors import InputError
from jaxmoe.data.batches import COUNTS, Batch, ProducedBatch
from jaxmoe.data.loader_callbacks import LoaderCallbacks
from jaxmoe.data.prefetch import BatchProducer

_LOOK_S = 1.0  # how often a wait is interrupted to pass on what was noticed meanwhile


class BatchStream:
  """An iterator of batches: dicts of int32 arrays (rows of this process, L).

  `ids`, `labels` (the next id, or -1 where it is not learned), `position` (from 0 in every piece
  of a document), `segment` (from 1 in every row) and `domain` (of the row, from 0 in the order of
  the recipe). There is no padding, as the stream never ends. Made by `Corpus.stream`.

  Args:
    producer: Makes the batches.
    num_documents: By domain; the domains in the order of the counts.
    fingerprint: Of all that the batches depend on.
    callbacks: Who is told of trouble.
  """

  def __init__(
    self,
    producer: BatchProducer,
    num_documents: Mapping[str, int],
    fingerprint: str,
    callbacks: LoaderCallbacks,
  ):
    self._num_documents, self._fingerprint, self._callbacks = num_documents, fingerprint, callbacks
    self._producers = [producer]
    self._counts = np.zeros((len(num_documents), len(COUNTS)), np.int64)
    self._num_batches = 0
    self._time = {"busy_s": 0.0, "wait_s": 0.0, "tokens": 0, "bytes": 0}

  def __iter__(self) -> BatchStream:
    return self

  def __next__(self) -> Batch:
    start = time.perf_counter()
    batch, counts, busy_s = self._wait(start)
    self._counts += counts
    self._num_batches += 1
    self._time["wait_s"] += time.perf_counter() - start
    self._time["busy_s"] += busy_s
    self._time["tokens"] += int(counts[:, 0].sum())
    self._time["bytes"] += int(counts[:, 2].sum())
    return batch

  def state(self) -> dict[str, Any]:
    """Returns JSON-able values that `restore` continues from, after the batches handed out."""
    return {
      "fingerprint": self._fingerprint,
      "batches": self._num_batches,
      "counts": dict(zip(self._num_documents, self._counts.tolist())),
      "iterator": self._producer.state(),
    }

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
    self._producer.restore(state["iterator"])
    self._num_batches = state["batches"]
    self._counts = np.array([state["counts"][name] for name in self._num_documents], np.int64)

  def stats(self) -> dict[str, Any]:
    """Returns what was handed out since the first batch, and under `time` the cost since start.

    `batches` and `domains` ({name: tokens, documents, bytes, epochs}; documents and bytes count
    when a document's last token is handed out) cover all processes and are restored with the
    state. `time.busy_s` is processor time of the thread that works ahead, `time.wait_s` what the
    caller waited, and the rates are per busy second. Costs about 10 microseconds.
    """
    domains = {}
    for (name, documents), counts in zip(self._num_documents.items(), self._counts.tolist()):
      domains[name] = {**dict(zip(COUNTS, counts)), "epochs": counts[1] / documents}
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
    """Stops what works ahead; no batch or state can be taken afterwards."""
    while self._producers:
      self._producers.pop().close()

  def _wait(self, start: float) -> ProducedBatch:
    """Returns what the producer made; meanwhile says what is noticed."""
    producer, due = self._producer, self._callbacks.slow_s
    while True:
      try:
        made = producer.take(min(_LOOK_S, start + due - time.perf_counter()))
      finally:
        for failure in producer.failures():
          self._callbacks.unread(*failure)
      if made is not None:
        return made
      waited_s = time.perf_counter() - start
      if waited_s >= due:
        self._callbacks.slow(*producer.reading(), waited_s)
        due *= 2

  @property
  def _producer(self) -> BatchProducer:
    if not self._producers:
      raise ValueError("the stream is closed; take another from the corpus")
    return self._producers[0]
