"""Multiple choice by likelihood: the answer a model finds likeliest of those given.

A line of a .jsonl file is {"question": TEXT, "choices": [TEXT, ...], "answer": INDEX}. An answer is
read behind its question, which begins as any prompt does, or a document's start where there is
none; it is tokenized by itself. What is scored is the sum of the log probabilities of its tokens,
as it is and over its UTF-8 bytes. Of two alike the first wins.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from jaxmoe.core.errors import InputError
from jaxmoe.data.tokenizers import Tokenizer
from jaxmoe.models.transformer import Decoder, Params
from jaxmoe.train.evaluate import least_row, score_tokens, scored_alone
from jaxmoe.train.hooks import encode_prompt
from jaxmoe.train.row_packing import Item, Window, batch_of, fitted_batches

_BUCKET = 64


@dataclasses.dataclass(frozen=True)
class Question:
  """A question, what may be answered, and which of it is right."""

  question: str
  choices: tuple[str, ...]
  answer: int


def read_questions(path: str | os.PathLike[str]) -> list[Question]:
  """Returns the questions of a .jsonl file.

  Raises:
    InputError: no such file, no line, or a line that is no question; with its number.
  """
  try:
    with open(path, encoding="utf-8-sig") as file:
      lines = [(number, line) for number, line in enumerate(file, 1) if line.strip()]
  except (OSError, UnicodeDecodeError) as error:
    raise InputError(f"{path}: cannot be read ({error}); give a .jsonl file") from None
  if not lines:
    raise InputError(f"{path}: has no line; give a question a line")
  return [_question(line, f"{path}:{number}") for number, line in lines]


def _question(line: str, where: str) -> Question:
  try:
    plain = json.loads(line)
    found = Question(plain["question"], tuple(plain["choices"]), plain["answer"])
    texts = (found.question, *found.choices)
    good = all(isinstance(text, str) for text in texts) and all(found.choices)
    good = good and type(found.answer) is int and 0 <= found.answer < len(found.choices)
    for text in texts if good else ():
      text.encode("utf-8")
  except (ValueError, KeyError, TypeError):
    good = False
  if not good or len(found.choices) < 2:
    raise InputError(
      f'{where}: needs {{"question": TEXT, "choices": [TEXT, TEXT, ...], "answer": INDEX}} in '
      "valid UTF-8, choices not empty; mend the line"
    )
  return found


def score_questions(
  decoder: Decoder,
  params: Params,
  tokenizer: Tokenizer,
  questions: Sequence[Question],
  shape: tuple[int, int],
  alive: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
  """Returns `{questions, accuracy, accuracy_by_byte, chance, cut}`.

  Args:
    decoder: The model.
    params: Its parameters.
    tokenizer: Its tokenizer.
    questions: At least one.
    shape: (the most rows scored at a time, the most tokens of question and answer).
    alive: Called after every batch.

  `chance` is the accuracy of a guess; `cut` the number of answers whose question lost its start
  because both together are longer than a row.

  Raises:
    InputError: an answer alone is longer than a row.
  """
  windows = [
    _window(tokenizer, question.question, choice, shape[1])
    for question in questions
    for choice in question.choices
  ]
  nats = _nats(decoder, params, [window for window, _ in windows], shape, alive)
  right, right_by_byte, at = 0, 0, 0
  for question in questions:
    mine = nats[at : at + len(question.choices)]
    sizes = np.array([len(choice.encode("utf-8")) for choice in question.choices])
    right += int(np.argmin(mine)) == question.answer
    right_by_byte += int(np.argmin(mine / sizes)) == question.answer
    at += len(mine)
  return {
    "questions": len(questions),
    "accuracy": right / len(questions),
    "accuracy_by_byte": right_by_byte / len(questions),
    "chance": math.fsum(1 / len(question.choices) for question in questions) / len(questions),
    "cut": sum(cut for _, cut in windows),
  }


def _window(
  tokenizer: Tokenizer, question: str, choice: str, length: int
) -> tuple[Window, bool]:
  """Returns inputs and labels of an answer behind its question, and whether that was cut."""
  before, after = encode_prompt(tokenizer, question), tokenizer.encode(choice)
  if not len(before):  # or the first token of the answer would follow nothing
    before = np.array([tokenizer.start_id], np.int32)
  if len(after) > length:
    raise InputError(
      f"the answer {choice[:20]!r}... has {len(after)} tokens, and the context is {length}; "
      "shorten it"
    )
  ids = np.concatenate([before, after])
  inputs, labels = ids[:-1], ids[1:].copy()
  labels[: len(before) - 1] = -1
  return (inputs[-length:], labels[-length:]), len(inputs) > length


def _nats(
  decoder: Decoder, params: Params, windows: Sequence[Window], shape: tuple[int, int],
  alive: Callable[[], None],
) -> np.ndarray:
  """Returns the summed nats of each window."""
  longest = max(len(inputs) for inputs, _ in windows)
  length = min(-(-longest // _BUCKET) * _BUCKET, shape[1])
  items = list(enumerate(windows))
  if scored_alone(decoder.config):
    least = least_row(decoder.config, length)
    batches = fitted_batches(items, (shape[0], length), least, apart=False)
  else:
    batches = _a_row_each(items, (shape[0], length))
  nats = np.zeros(len(windows))
  for batch, rows in batches:
    nats_BL = np.asarray(score_tokens(decoder, params, batch), np.float64)
    for nats_L, row in zip(nats_BL, rows):
      ends = np.cumsum([len(inputs) for _, (inputs, _) in row])
      for (index, (inputs, _)), end in zip(row, ends.tolist()):
        nats[index] = nats_L[end - len(inputs) : end].sum()
    alive()
  return nats


def _a_row_each(
  items: list[Item], shape: tuple[int, int]
) -> Iterator[tuple[dict[str, np.ndarray], list[list[Item]]]]:
  """Yields batches of one shape in which no two windows share a row, and what lies in them."""
  for start in range(0, len(items), shape[0]):
    rows = [[item] for item in items[start : start + shape[0]]]
    yield batch_of([[window] for [(_, window)] in rows], *shape), rows
