"""Callbacks of a loader: told when a batch is late or a document cannot be read."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from jaxmoe.core.errors import InputError


def _ignore(*_: Any) -> None:
  """Tells nobody."""


@dataclasses.dataclass(frozen=True)
class LoaderCallbacks:
  """What a stream says of itself; everything is called inside `next`, on the caller's thread.

  Attributes:
    on_slow: (domain, document, waited_s): for so long no batch has come, and the document is the
      one being read. Called after `slow_s` and again whenever the wait has doubled.
    on_retry: (domain, document, why): the system could not read a document, which is tried again.
    on_worker: (what, restarts): the data worker 'died' or 'stalled', and another one was started
      for the `restarts`-th time; no batch is lost or repeated.
    slow_s: A wait this long is worth a word.
    stall_s: A worker that says nothing for so long while a batch is awaited counts as stalled.
  """

  on_slow: Callable[[str, str, float], None] = _ignore
  on_retry: Callable[[str, str, str], None] = _ignore
  on_worker: Callable[[str, int], None] = _ignore
  slow_s: float = 5.0
  stall_s: float = 60.0

  def __post_init__(self) -> None:
    if not (self.slow_s > 0 and self.stall_s > 0):
      raise InputError(f"slow_s and stall_s must be positive: {self.slow_s}, {self.stall_s}")


class CurrentDocument:
  """The document that is being read, for whoever waits for it.

  Attributes:
    document: (domain, document), set as a whole, since another thread looks at it.
  """

  def __init__(self) -> None:
    self.document = ("", "")
