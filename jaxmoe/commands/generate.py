"""Continues prompts with the model of a run.

jaxmoe generate --workdir=runs/tiny --prompt='def main(' [--prompt=... --max_tokens=64]

With --chat a prompt is what a user says, after what --system says, and stands in the format that
the run was trained in: the chat template that came with the tokenizer, or that of data.chat.
Special tokens that it spells are text; those that the model writes are left out, unless --special
asks for them. A terminal is shown escapes in the place of control characters; a pipe or a file gets
the text as it is.
"""

from __future__ import annotations

import functools
import sys

import numpy as np
from absl import flags

from jaxmoe.commands.process import command_line, run_flags
from jaxmoe.conversion.hf_files import FOLDER, end_ids
from jaxmoe.core.errors import InputError
from jaxmoe.core.terminal import escaped
from jaxmoe.data.tokenizers import Tokenizer
from jaxmoe.models.generate import Sampling, generate
from jaxmoe.runs.chat_prompt import asked_in
from jaxmoe.train.hooks import encode_prompt
from jaxmoe.train.run_store import is_trained

FLAGS = flags.FlagValues()
flags.DEFINE_string("workdir", None, "The run whose model writes.", flag_values=FLAGS)
flags.DEFINE_multi_string("prompt", None, "What to continue; may be repeated.", flag_values=FLAGS)
flags.DEFINE_bool("chat", False, "Prompts are messages of a user.", flag_values=FLAGS)
flags.DEFINE_string("system", "", "Said before a user speaks; with --chat.", flag_values=FLAGS)
flags.DEFINE_bool("special", False, "Show special tokens, too.", flag_values=FLAGS)
flags.DEFINE_integer("max_tokens", 128, "The most tokens to write.", flag_values=FLAGS)
flags.DEFINE_float("temperature", 0.8, "0 takes the likeliest token.", flag_values=FLAGS)
flags.DEFINE_float("top_p", 0.95, "Share of probability to sample from.", flag_values=FLAGS)
flags.DEFINE_integer("seed", 0, "Of the draws.", flag_values=FLAGS)


class Printer:
  """Streams rows to standard output, one after the other: a later row waits for its turn."""

  def __init__(self, tokenizer: Tokenizer, prompts: list[str], special: bool = False):
    self._prompts = prompts
    decode = tokenizer.decode
    self._decode = functools.partial(decode, special=True) if special else decode
    self._ids: list[list[int]] = [[] for _ in prompts]
    self._row, self._shown = 0, 0
    self._begin()

  def token(self, row: int, token: int) -> None:
    """Takes a token of a row."""
    self._ids[row].append(token)
    if row == self._row:
      self._flush(final=False)

  def finish(self) -> None:
    """Prints what is left of all rows."""
    while self._row < len(self._prompts):
      self._flush(final=True)
      print(flush=True)
      self._row, self._shown = self._row + 1, 0
      if self._row < len(self._prompts):
        self._begin()

  def _begin(self) -> None:
    if len(self._prompts) > 1:
      print(f"--- {self._row + 1} of {len(self._prompts)}")
    self._show(self._prompts[self._row])

  def _flush(self, final: bool) -> None:
    text = self._decode(self._ids[self._row])
    # The end may be a part of a character whose other bytes are yet to come.
    stable = len(text) if final else len(text.rstrip("\ufffd"))
    self._show(text[self._shown : stable])
    self._shown = max(self._shown, stable)

  def _show(self, text: str) -> None:
    sys.stdout.write(escaped(text) if sys.stdout.isatty() else text)
    sys.stdout.flush()


def main(arguments: list[str]) -> int:
  """Runs the command; returns the exit code."""
  del arguments
  sampling = Sampling(FLAGS.max_tokens, FLAGS.temperature, FLAGS.top_p, FLAGS.seed)
  prompts = FLAGS.prompt or []
  if not prompts or not all(prompts):
    raise InputError("--prompt is missing or empty; give the text to continue")
  if FLAGS.system and not FLAGS.chat:
    raise InputError("--system is said in a chat; give --chat, too, or leave it out")
  workdir = run_flags.need_workdir(FLAGS.workdir)
  experiment = workdir.experiment()
  context = experiment.data.seq_len
  also_ends = end_ids(workdir.path / FOLDER)
  texts = [_text("prompt", prompt) for prompt in prompts]
  first = [("system", _text("system", FLAGS.system))] if FLAGS.system else []
  asked = asked_in(workdir.path / FOLDER, experiment, is_trained(workdir)) if FLAGS.chat else None

  def encode(tokenizer: Tokenizer) -> list[np.ndarray]:
    if asked is None:
      rows = [encode_prompt(tokenizer, text) for text in texts]
    else:
      rows = [asked.encode(tokenizer, [*first, ("user", text)]) for text in texts]
    check_length(prompts, rows, context)
    return rows

  run = run_flags.load_run(FLAGS.workdir, check=encode)
  ids = encode(run.tokenizer)
  if asked is not None:
    print(f"asked with {asked.name}", file=sys.stderr)
  printer = Printer(run.tokenizer, [""] * len(prompts) if FLAGS.chat else prompts, FLAGS.special)
  ends = context, also_ends | {run.tokenizer.eod_id}
  generate(run.decoder, run.params, ids, sampling, ends, printer.token)
  printer.finish()
  return 0


def check_length(prompts: list[str], rows: list[np.ndarray], context: int) -> None:
  """Raises InputError for a prompt that leaves no room."""
  for prompt, row in zip(prompts, rows):
    if len(row) >= context:
      raise InputError(
        f"--prompt={prompt[:20]!r}... has {len(row)} tokens, what stands around it included; the "
        f"context is {context} tokens; shorten it"
      )


def _text(flag: str, text: str) -> str:
  try:
    text.encode("utf-8")
  except UnicodeEncodeError:
    raise InputError(f"--{flag} is not valid UTF-8; give text") from None
  return text


def run() -> None:
  """Runs the command as this process does, and exits."""
  command_line.run(main, FLAGS, __doc__)


if __name__ == "__main__":
  run()
