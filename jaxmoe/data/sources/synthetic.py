"""Seeded tasks whose answers can be scored exactly; they keep tests bit-stable.

Document i is a pure function of (task, size, seed, i). A document is `task: question -> answer` and
a newline; the answer follows from the question by the rule of the task.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable, Iterator
from typing import Literal

from jaxmoe.core.errors import InputError
from jaxmoe.data.raw_example import RawExample

_LETTERS = "abcdefghijklmnopqrstuvwxyz"
_PAIRS = {"(": ")", "[": "]", "{": "}"}
Draw = Callable[[int], int]
"""draw(n) is the next integer of the document in [0, n)."""


@dataclasses.dataclass(frozen=True)
class Synthetic:
  """One exactly scorable task.

  Attributes:
    task: `copy` repeats a word; `recall` gives the value of one of several keys; `add` adds two
      numbers of equally many digits; `brackets` closes the brackets that are still open.
    size: Letters to copy, pairs to choose from, digits to add, or steps of the bracket walk.
    num_documents: How many documents there are.
    seed: Another seed, other documents.
  """

  task: Literal["copy", "recall", "add", "brackets"] = "copy"
  size: int = 4
  num_documents: int = 1000
  seed: int = 0

  def __post_init__(self) -> None:
    if self.size < 1 or self.num_documents < 1:
      raise InputError(
        "size and num_documents must be at least 1, got "
        f"size={self.size} num_documents={self.num_documents}"
      )
    if self.task == "recall" and self.size > len(_LETTERS):
      raise InputError(f"recall has {len(_LETTERS)} keys, got size={self.size}; make it smaller")

  @property
  def domain(self) -> str:
    """The name of the task."""
    return self.task

  def example(self, index: int) -> tuple[str, str]:
    """Returns (prompt, answer) of document `index`; the document ends with a newline."""
    # Of all methods of Random only random() is the same in every Python version.
    generator = random.Random(f"{self.task}/{self.size}/{self.seed}/{index}")
    question, answer = _TASKS[self.task](lambda n: int(generator.random() * n), self.size)
    return f"{self.task}: {question} -> ", answer

  def scan(self, max_bytes: int) -> Iterator[RawExample]:
    """Yields every document; equal documents share a key, so no answer leaks over the split."""
    for index in range(self.num_documents):
      prompt, answer = self.example(index)
      text = f"{prompt}{answer}\n"
      span = (len(prompt), len(prompt) + len(answer))
      name = f"{index:09d}"
      yield RawExample(f"{self.task}/{index}", name, text, text, text, locator=index, answer=span)

  def read(self, locator: int) -> str:
    """Returns the text of document `locator`."""
    return "{}{}\n".format(*self.example(locator))


def _copy(draw: Draw, size: int) -> tuple[str, str]:
  word = "".join(_LETTERS[draw(len(_LETTERS))] for _ in range(size))
  return word, word


def _recall(draw: Draw, size: int) -> tuple[str, str]:
  left = list(_LETTERS)
  keys = [left.pop(draw(len(left))) for _ in range(size)]
  values = [str(draw(10)) for _ in range(size)]
  chosen = draw(size)
  pairs = " ".join(f"{key}={value}" for key, value in zip(keys, values))
  return f"{pairs} ; {keys[chosen]}", values[chosen]


def _add(draw: Draw, size: int) -> tuple[str, str]:
  a, b = (draw(10**size) for _ in range(2))
  return f"{a:0{size}d}+{b:0{size}d}", str(a + b)


def _brackets(draw: Draw, size: int) -> tuple[str, str]:
  """Walks up and down; a step down is only taken where a bracket stays open."""
  text, closing = "", ""
  for _ in range(size):
    if len(closing) > 1 and draw(2):
      text, closing = text + closing[0], closing[1:]
    else:
      opening = "([{"[draw(3)]
      text, closing = text + opening, _PAIRS[opening] + closing
  return text, closing


_TASKS = {"copy": _copy, "recall": _recall, "add": _add, "brackets": _brackets}
