"""Writing text: a token at a time in one row and in 16, and a prompt of 480 tokens.

All write the same tokens before they are timed: greedy ones, of the same weights, in float32. A
token's time is that of a long continuation without that of a short one, so that the prompt is in
neither.
"""

from __future__ import annotations

import dataclasses
import tempfile
from typing import Any

import numpy as np

from jaxmoe.bench.model_shapes import experiment_of
from jaxmoe.bench.program_counts import counted_draw
from jaxmoe.bench.race import Run, race
from jaxmoe.bench.results import Row, RowFile
from jaxmoe.bench.sides.process import Side
from jaxmoe.bench.suite import OURS, Asked, checked
from jaxmoe.train.experiment import Experiment


@dataclasses.dataclass(frozen=True)
class TextCase:
  """What is written.

  Attributes:
    rows: Prompts at once.
    prompt: Tokens of each.
    short: Tokens written in the run whose time is taken off; 0 for none.
    long: Tokens written in the run that is timed.
  """

  rows: int
  prompt: int
  short: int
  long: int

  @property
  def slots(self) -> int:
    """Tokens a row has in the end."""
    return self.prompt + self.long

  @property
  def number(self) -> int:
    """Tokens a time is divided by."""
    return self.long - self.short if self.short else 1


CASES = {
  "1 row": TextCase(1, 32, 1, 65),
  "16 rows": TextCase(16, 32, 1, 33),
  "prefill 480": TextCase(1, 480, 0, 1),
}
_THREADS = {"1 row": (1, 2), "16 rows": (2,), "prefill 480": (2,)}
"""Of llama.cpp; the one thread of one row is what its tokens cost least with."""


def run(asked: Asked, results: RowFile) -> None:
  """Races or counts the cases at the shapes."""
  for shape in asked.shapes:
    experiment = experiment_of(shape)
    for name, case in CASES.items():
      key = f"{shape}, {name}"
      if not results.has(key):
        asked.say(f"decode at {key} ...")
        results.add(key, _counted(experiment, case) if asked.count else _raced(asked, shape, name))


def _counted(experiment: Experiment, case: TextCase) -> list[Row]:
  """Returns the row of the program that makes the next token of each row, or reads a prompt."""
  new = 1 if case.short else case.prompt
  return [counted_draw(OURS, experiment, case.rows, new, case.slots)]


def _raced(asked: Asked, shape: str, name: str) -> list[Row]:
  experiment = experiment_of(shape)
  case = CASES[name]
  vocab_size = experiment.data.tokenizer.vocab_size
  numbers = np.random.default_rng(1)
  prompts = numbers.integers(0, vocab_size, (case.rows, case.prompt)).tolist()
  kinds = {kind: kind.split(",")[0] for kind in _contestants(asked.rivals, name)}
  with tempfile.TemporaryDirectory() as folder, asked.own_side() as own:
    own.ask("prepare", kind="text", shape=shape, folder=folder)
    right = own.ask("write", prompts=prompts, max_tokens=case.long)
    new = 1 if case.short else case.prompt
    counted = own.ask("counts", rows=case.rows, new=new, slots=case.slots)
    with asked.rival_sides(kinds) as (sides, rows):
      runners = {OURS: own}
      for kind, side in sides.items():
        asked.say(f"checking {kind} ...")
        more = _of_llama(kind, case) if kinds[kind] == "llama_cpp" else {}

        def check(side: Side = side, more: dict[str, Any] = more) -> str | None:
          side.ask("prepare", kind="text", folder=folder, **more)
          return _difference(side.ask("write", prompts=prompts, max_tokens=case.long), right)

        wrong = checked(kind, check)
        if wrong:
          rows.append(wrong)
        else:
          runners[kind] = side
      asked.say(f"timing {', '.join(runners)} ...")
      runs = {kind: _run(side, prompts, case) for kind, side in runners.items()}
      timed = race(runs, OURS, asked.rounds)
  tokens = case.rows if case.short else case.prompt
  raced = [{**row, "tokens_per_s": tokens / row["seconds"]} for row in timed]
  return [{**counted, **row} if row["name"] == OURS else row for row in raced] + rows


def _contestants(rivals: tuple[str, ...], name: str) -> list[str]:
  """Returns the rivals' sides; llama.cpp is one for each number of threads."""
  found = []
  for rival in rivals:
    threads = _THREADS[name] if rival == "llama_cpp" else ()
    found += [f"{rival}, {number} threads" for number in threads] or [rival]
  return [one.replace(", 1 threads", ", 1 thread") for one in found]


def _of_llama(kind: str, case: TextCase) -> dict[str, int]:
  return {"rows": case.rows, "slots": case.slots + 8, "threads": int(kind.split()[1])}


def _run(side: Side, prompts: list[list[int]], case: TextCase) -> Run:
  """Returns what times a token of each row, or the prompts."""

  def one() -> Any:
    seconds = side.seconds("seconds", prompts=prompts, max_tokens=case.long)
    if case.short:
      seconds = seconds - side.seconds("seconds", prompts=prompts, max_tokens=case.short)
    return seconds.over(case.number)

  return one


def _difference(found: list[list[int]], right: list[list[int]]) -> str | None:
  """Returns where tokens first differ from ours; None if nowhere."""
  for row, (one, ours) in enumerate(zip(found, right, strict=True)):
    if one != ours:
      at = next((i for i, (a, b) in enumerate(zip(one, ours)) if a != b), min(len(one), len(ours)))
      return f"row {row} differs from ours at token {at} of {len(ours)}"
  return None
