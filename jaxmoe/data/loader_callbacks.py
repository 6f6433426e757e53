"""Callbacks of a loader: told when a batch is late or a document cannot be read."""

from __future__ import annotations


class LoaderCallbacks:
  """What a stream calls inside `next`, on the caller's thread; these methods tell nobody.

  Attributes:
    slow_s: A wait this long is worth a word.
    stall_s: A worker that says nothing for so long while a batch is awaited counts as stalled.
  """

  slow_s = 5.0
  stall_s = 60.0

  def slow(self, domain: str, document: str, waited_s: float) -> None:
    """For so long no batch has come, and the document is the one being read.

    Called after `slow_s` and again whenever the wait has doubled.
    """

  def unread(self, domain: str, document: str, why: str) -> None:
    """The system could not read a document, which is tried again."""

  def worker(self, what: str, restarts: int) -> None:
    """The data worker 'died' or 'stalled', and another one was started: no batch is lost."""


class CurrentDocument:
  """The document that is being read, for whoever waits for it.

  Attributes:
    document: (domain, document), set as a whole, since another thread looks at it.
  """

  def __init__(self) -> None:
    self.document = ("", "")
