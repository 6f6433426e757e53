"""Text that a run writes: prompts to ids, tokens to text as they come, a chat's turn."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import numpy as np

from jaxmoe.conversion.hf_files import end_ids
from jaxmoe.core.errors import InputError
from jaxmoe.core.kept_programs import Compiler
from jaxmoe.data.tokenizers import Tokenizer
from jaxmoe.models.generate import Sampling, generate
from jaxmoe.runs.chat_prompt import Messages, PromptFormat
from jaxmoe.runs.run_loading import LoadedRun
from jaxmoe.train.hooks import encode_prompt


def encode_prompts(tokenizer: Tokenizer, prompts: Sequence[str], context: int) -> list[np.ndarray]:
  """Returns the ids of each prompt.

  Raises:
    InputError: one is empty, no text, or leaves no room in the context.
  """
  need_prompts(prompts)
  for text in prompts:
    check_text("prompt", text)
  rows = [encode_prompt(tokenizer, text) for text in prompts]
  for text, row in zip(prompts, rows):
    check_length(text, row, context)
  return rows


def encode_chat(
  tokenizer: Tokenizer, asked: PromptFormat, messages: Messages, context: int
) -> np.ndarray:
  """Returns the ids of messages up to where the assistant is to write.

  Raises:
    InputError: none is there, one is no text, or they leave no room in the context.
  """
  for message in messages:
    if not isinstance(message, tuple | list) or len(message) != 2:
      raise InputError(f"messages: expected pairs of role and text, got {message!r}")
  need_prompts([content for _, content in messages])
  for role, content in messages:
    check_text("system" if role == "system" else "prompt", content)
  row = asked.encode(tokenizer, messages)
  check_length(messages[-1][1], row, context)
  return row


def need_prompts(prompts: Sequence[str]) -> None:
  """Raises InputError where there is nothing to continue."""
  if not prompts or not all(prompts):
    raise InputError("--prompt is missing or empty; give the text to continue")


def check_length(prompt: str, row: np.ndarray, context: int) -> None:
  """Raises InputError for a prompt that leaves no room."""
  if len(row) >= context:
    raise InputError(
      f"--prompt={prompt[:20]!r}... has {len(row)} tokens, what stands around it included; the "
      f"context is {context} tokens; shorten it"
    )


def check_text(flag: str, text: str) -> None:
  """Raises InputError for what UTF-8 cannot hold, such as halves of bytes of a command line."""
  if not isinstance(text, str):
    raise InputError(f"--{flag}: expected text, got {text!r}")
  try:
    text.encode("utf-8")
  except UnicodeEncodeError:
    raise InputError(f"--{flag} is not valid UTF-8; give text") from None


def generate_text(
  run: LoadedRun,
  rows: Sequence[np.ndarray],
  sampling: Sampling,
  on_token: Callable[[int, int], None],
  special: bool = False,
  compiler: Compiler | None = None,
) -> list[str]:
  """Returns what a run writes after each row of ids; special tokens are left out unless asked for.

  Args:
    run: The run.
    rows: Ids of prompts.
    sampling: How tokens are drawn, and how many.
    on_token: Called with (row, id) of each, as it comes.
    special: Whether special tokens are shown.
    compiler: Where programs of the run come from, if they are kept.
  """
  ids: list[list[int]] = [[] for _ in rows]

  def take(row: int, token: int) -> None:
    ids[row].append(token)
    on_token(row, token)

  ends = run.experiment.data.seq_len, end_ids(run.origin.folder) | {run.tokenizer.eod_id}
  generate(run.decoder, run.params, rows, sampling, ends, take, compiler)
  decode = decoder_of(run.tokenizer, special)
  return [decode(of_row) for of_row in ids]


def decoder_of(tokenizer: Tokenizer, special: bool) -> Callable[[list[int]], str]:
  """Returns what makes text of ids, with special tokens or without."""
  return functools.partial(tokenizer.decode, special=True) if special else tokenizer.decode


class TextStream:
  """Writes rows one after the other as their characters become whole; a later row waits."""

  def __init__(
    self,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    write: Callable[[str], None],
    special: bool = False,
  ):
    self._prompts, self._write = prompts, write
    self._decode = decoder_of(tokenizer, special)
    self._ids: list[list[int]] = [[] for _ in prompts]
    self._row, self._shown = 0, 0
    self._begin()

  def token(self, row: int, token: int) -> None:
    """Takes a token of a row."""
    self._ids[row].append(token)
    if row == self._row:
      self._flush(final=False)

  def finish(self) -> None:
    """Writes what is left of all rows."""
    while self._row < len(self._prompts):
      self._flush(final=True)
      self._write("\n")
      self._row, self._shown = self._row + 1, 0
      if self._row < len(self._prompts):
        self._begin()

  def _begin(self) -> None:
    if len(self._prompts) > 1:
      self._write(f"--- {self._row + 1} of {len(self._prompts)}\n")
    self._write(self._prompts[self._row])

  def _flush(self, final: bool) -> None:
    text = self._decode(self._ids[self._row])
    # The end may be a part of a character whose other bytes are yet to come.
    stable = len(text) if final else len(text.rstrip("\ufffd"))
    self._write(text[self._shown : stable])
    self._shown = max(self._shown, stable)
