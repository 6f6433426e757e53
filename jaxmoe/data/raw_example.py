"""A raw example: one record as a source finds it, or why it cannot be used.

It says how to read the record again, too. A source is a frozen record with three members: `domain`,
the name its documents are trained and scored under; `scan`, which visits every record once, in an
order that is a function of the corpus alone; and `read`, which returns the content of one record
again from its locator, so that the corpus need not hold all text in memory.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import numpy as np

from jaxmoe.data.message import Conversation, PromptCompletion

Content = str | np.ndarray | Conversation | PromptCompletion
"""Text, ids of a document that was tokenized elsewhere, messages, or a text and what follows."""


@dataclasses.dataclass(frozen=True)
class RawExample:
  """One record of a source.

  Attributes:
    place: Where it lies, for reports: a path, or `path:line`.
    name: What it is called inside its source: unique, independent of the machine.
    split_key: Its hash decides whether it is held out.
    unit: Examples of one unit (one file) are on one side of the split in every domain.
    content: The text, ids or messages; None where it has an error.
    error: Why the record cannot be used; empty when it can.
    locator: What `read` needs to return `content` again.
    answer: Start and end, in UTF-8 bytes, of the part that can be scored by exact match.
    lost_bytes: Of a file of records that ends early or cannot be opened, how many of its bytes gave
      no record; None for a record.
  """

  place: str
  name: str
  split_key: str
  unit: str
  content: Content | None = None
  error: str = ""
  locator: Any = None
  answer: tuple[int, int] | None = None
  lost_bytes: int | None = None


class Source(Protocol):
  """One domain of documents."""

  @property
  def domain(self) -> str:
    """The name of the domain."""

  def scan(self, max_bytes: int) -> Iterator[RawExample]:
    """Yields every record once; one larger than `max_bytes` has an error and is not read whole."""

  def read(self, locator: Any) -> Content:
    """Returns the content of the example with this locator."""


INVALID_UTF8 = "invalid UTF-8"


def too_large(max_bytes: int) -> str:
  """Returns the error of a record over the size limit."""
  return f"larger than {max_bytes} bytes"


def unreadable(error: Exception) -> str:
  """Returns the error of a file that the system or its format's reader refuses to read."""
  why = getattr(error, "strerror", None) or getattr(error, "reason", None) or error
  why = " ".join(str(why).split())
  return f"cannot be read ({why[:200]})"


def broken_file(path: str, name: str, error: Exception, lost: Callable[[], int]) -> RawExample:
  """Returns the example of a file of records that ends early or cannot be opened.

  Args:
    path: Where it lies.
    name: Below its folder.
    error: What went wrong.
    lost: Returns how many of its bytes gave no record.
  """
  try:
    lost_bytes = lost()
  except OSError:  # not even its size can be read
    lost_bytes = 0
  return RawExample(path, name, name, name, error=unreadable(error), lost_bytes=lost_bytes)
