"""Completion times of asynchronously dispatched steps, whose results are asked for later.

A step is dispatched while the one before still computes, and its metrics are fetched a step later:
neither moment says when it was done. A thread waits for each; who comes by and sees results that
are there says so, too, where that thread is late because the cores are busy.
"""

from __future__ import annotations

import contextlib
import math
import queue
import threading
import time
from typing import Any

import jax


class Completion:
  """The moment at which some arrays were computed.

  Attributes:
    at: In the seconds of `time.perf_counter`; infinity until somebody saw it.
  """

  def __init__(self, arrays: Any):
    self._leaves = jax.tree.leaves(arrays)
    self.at = math.inf

  def look(self) -> None:
    """Notes the moment if the arrays are there and nobody has noted it."""
    if self.at == math.inf and all(leaf.is_ready() for leaf in self._leaves if _is_lazy(leaf)):
      self.at = time.perf_counter()

  def before_dispatch(self) -> None:
    """Notes the moment before something else is dispatched; on a CPU it is waited for.

    There a dispatch may compute at once, and what it had to wait for would look like a part of it.
    """
    if jax.default_backend() == "cpu":
      self.wait()
    self.look()

  def wait(self) -> None:
    """Returns once they are there, and notes the moment."""
    jax.block_until_ready(self._leaves)
    self.at = min(self.at, time.perf_counter())


class CompletionWatcher:
  """Notes when arrays arrive, in the order in which they are expected, until it is closed."""

  def __init__(self) -> None:
    self._expected: queue.SimpleQueue[Completion | None] = queue.SimpleQueue()
    threading.Thread(target=self._wait, daemon=True, name="completions").start()

  def expect(self, arrays: Any) -> Completion:
    """Returns the completion of arrays that are being computed."""
    completion = Completion(arrays)
    self._expected.put(completion)
    return completion

  def close(self) -> None:
    """Ends once everything that was expected has arrived; waits for nothing."""
    self._expected.put(None)

  def _wait(self) -> None:
    for completion in iter(self._expected.get, None):
      with contextlib.suppress(Exception):  # whoever fetches the results is told
        completion.wait()


def _is_lazy(leaf: Any) -> bool:
  return isinstance(leaf, jax.Array)
