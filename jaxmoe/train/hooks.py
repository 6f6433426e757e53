"""Hooks of the training loop: held-out evaluation and text samples."""

from __future__ import annotations

import io
import math
import os
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from jaxmoe.core.errors import NotFiniteError
from jaxmoe.data.tokenizers.tokenizer import BoundaryIds
from jaxmoe.models.generate import Sampling, generate
from jaxmoe.models.transformer import Decoder, Params
from jaxmoe.train.append_file import AppendFile
from jaxmoe.train.evaluate import evaluate, first_documents
from jaxmoe.train.experiment import Evaluation, Samples
from jaxmoe.train.held_out_slice import HeldOutSlice
from jaxmoe.train.observers import Observers
from jaxmoe.train.train_state import State


class EvaluationHook:
  """Scores a fixed part of the held-out documents of every domain: the line's `eval`.

  Attributes:
    domains: The documents that are scored, by domain.
    among: All held-out documents.
    slice: What part of these they are.
  """

  name = "evaluation"

  def __init__(
    self, config: Evaluation, decoder: Decoder, domains: Mapping[str, Sequence[Any]],
    text: tuple[BoundaryIds, int], observers: Observers,
  ):
    self.every = config.every
    self._decoder, self._observers, self.among = decoder, observers, domains
    self.domains = {
      name: first_documents(documents, config.max_bytes) for name, documents in domains.items()
    }
    self.slice = HeldOutSlice(*(
      {name: sum(document.scored_bytes for document in documents) for name, documents in of.items()}
      for of in (self.domains, domains)
    ))
    self._by_held_out = config.overall == "held_out"
    self._ends, length = text
    self._shape, self._fitted = (config.batch_size, length), config.rows == "fitted"

  def __call__(self, step: int, state: State) -> dict[str, Any]:
    """Returns {'eval': {bits_per_byte, domains, routing}}."""
    what = f"evaluating step {step}"

    def alive() -> None:
      self._observers.watchdog.beat(what)

    with self._observers.display.phase(what, brief=True):
      about = (self.domains, self._ends, self._shape)
      scores = evaluate(self._decoder, state.params, *about, alive, self._fitted)
    shown = "  ".join(f"{name} {_shown(value)}" for name, value in scores["domains"].items())
    self._observers.display.say(f"bits/byte at step {step} of {self.slice.name}: {shown}")
    if self._by_held_out:
      overall = self.slice.overall(scores["domains"], scores["bits_per_byte"])
      scores = {**scores, "bits_per_byte": overall}
    return {"eval": _with_none(scores)}


class SamplesHook:
  """Continues the prompts of the recipe and appends the texts to samples.md.

  A section may wait, so that nothing of what writes texts is compiled before the first step has
  been made; for that long parameters are in memory twice.
  """

  name = "samples"

  def __init__(
    self, config: Samples, decoder: Decoder, tokenizer: Any, context: int, file: AppendFile
  ):
    self.every = config.every if config.prompts else 0
    self._decoder, self._tokenizer, self._file = decoder, tokenizer, file
    self._prompts = config.prompts
    self._sampling = Sampling(config.max_tokens, config.temperature, config.top_p)
    self._limits = (context, tokenizer.eod_id)
    self._waiting: tuple[int, Params] | None = None

  def __call__(self, step: int, state: State) -> dict[str, Any]:
    """Writes a section, after one that waits; returns nothing for the line."""
    self.catch_up()
    self._write(step, state.params)
    return {}

  def wait(self, step: int, state: State) -> None:
    """Keeps the parameters of a section that is written later; the state may be donated."""
    if self.every:
      shardings = jax.tree.map(lambda leaf: leaf.sharding, state.params)
      self._waiting = step, jax.device_put(state.params, shardings, may_alias=False)

  @property
  def waits(self) -> bool:
    """Whether a section is still to be written."""
    return self._waiting is not None

  def catch_up(self) -> None:
    """Writes the section that waits, if any."""
    if self._waiting is not None:
      (step, params), self._waiting = self._waiting, None
      self._write(step, params)

  def _write(self, step: int, params: Params) -> None:
    prompts = [encode_prompt(self._tokenizer, text) for text in self._prompts]
    parts = [f"## step {step}\n"]
    try:
      rows = generate(self._decoder, params, prompts, self._sampling, self._limits)
    except NotFiniteError as error:  # whether that ends the run is for its steps to say
      rows, parts = [], [*parts, f"No samples: {error}\n"]
    for text, row in zip(self._prompts, rows):
      written = text + self._tokenizer.decode(row)
      fence = "`" * max(3, *(len(run) + 1 for run in re.findall("`+", written)), 3)
      parts.append(f"{fence}text\n{written}\n{fence}\n")
    self._file.append(("\n".join(parts) + "\n").encode())

  def forget(self, step: int) -> None:
    """Cuts off what was written after `step`."""
    self._file.flush()
    cut_samples(self._file.path, step)


def cut_samples(path: pathlib.Path, step: int) -> None:
  """Cuts samples.md after the section of `step`, so that no section is written twice."""
  if not path.exists():
    return
  start, fence = 0, b""
  for line in io.BytesIO(path.read_bytes()):  # "\r" is part of a text, not the end of a line
    if fence:  # what the model wrote may look like a heading
      fence = b"" if line == fence + b"\n" else fence
    elif opening := re.fullmatch(rb"(`{3,})text\n", line):
      fence = opening[1]
    else:
      heading = re.fullmatch(rb"## step (\d+)\n", line)
      if (heading and int(heading[1]) > step) or not line.endswith(b"\n"):
        os.truncate(path, start)
        return
    start += len(line)


def encode_prompt(tokenizer: Any, text: str) -> np.ndarray:
  """Returns the ids of a prompt, with what its tokenizer puts around one."""
  return tokenizer.encode_prompt(text)


def _with_none(scores: dict[str, Any]) -> dict[str, Any]:
  """Returns nested scores with None for what is not finite, which JSON cannot say."""
  return {
    name: _with_none(value) if isinstance(value, dict) else _finite(value)
    for name, value in scores.items()
  }


def _shown(bits: float | None) -> str:
  return "has nothing to score" if bits is None else f"{bits:.3f}"


def _finite(value: Any) -> Any:
  return None if isinstance(value, float) and not math.isfinite(value) else value
