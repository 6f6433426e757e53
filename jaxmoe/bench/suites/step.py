"""A whole training step: forward, backward, clipping, AdamW, and what we do beside it.

Ours counts, guards against steps that would do harm, and logs; rivals do none of that. They start
from the same weights, and their first step must have our loss and our moments, which are the
gradient but for a factor.
"""

from __future__ import annotations

import math
import tempfile
from typing import Any

from jaxmoe.bench.ideal_work import step_work
from jaxmoe.bench.model_shapes import experiment_of
from jaxmoe.bench.program_counts import counted_row
from jaxmoe.bench.race import race
from jaxmoe.bench.results import Row, RowFile
from jaxmoe.bench.sides.own import lowered_step
from jaxmoe.bench.sides.process import Side
from jaxmoe.bench.suite import OURS, Asked, checked
from jaxmoe.cost import host
from jaxmoe.train.experiment import Experiment

_NEAR = {"loss": 1e-4, "norm": 1e-4}
"""Relative errors."""
_MOMENTS = 1e-2
"""Likewise of a tensor; a token whose best experts nearly tie may go to another one there."""
_ROUND_S = 0.4


def run(asked: Asked, results: RowFile) -> None:
  """Races or counts the steps of the shapes."""
  for shape in asked.shapes:
    if results.has(shape):
      continue
    asked.say(f"step at {shape} ...")
    rows = [_counted(shape)] if asked.count else _raced(asked, shape)
    results.add(shape, rows)


def recipe_of(experiment: Experiment) -> dict[str, Any]:
  """Returns what a rival must know of a recipe beside the weights."""
  optim: Any = experiment.optim
  moe = experiment.model.moe_records()[0]
  balance = {aux_loss.kind: aux_loss.weight for aux_loss in moe.balance}
  adam = {name: getattr(optim.optimizer, name) for name in ("b1", "b2", "eps", "weight_decay")}
  return {
    **adam,
    "learning_rate": optim.learning_rate,
    "clip_norm": optim.clip_norm,
    "num_active": moe.num_active,
    "load_balance": balance.get("load_balance", 0.0),
    "router_z": balance.get("router_z", 0.0),
  }


def _counted(shape: str) -> Row:
  experiment = experiment_of(shape)
  return counted_row(OURS, lowered_step(experiment)[1].compile(), step_work(experiment))


def _raced(asked: Asked, shape: str) -> list[Row]:
  experiment = experiment_of(shape)
  with (
    tempfile.TemporaryDirectory() as folder,
    asked.own_side() as own,
    asked.rival_sides({name: name for name in asked.rivals}) as (sides, rows),
  ):
    own.ask("prepare", kind="step", shape=shape, folder=folder)
    right = own.ask("first")
    counted = own.ask("counts")
    runners = {OURS: own}
    for name, side in sides.items():
      asked.say(f"checking {name} ...")

      def check(side: Side = side) -> str | None:
        side.ask("prepare", kind="step", folder=folder, recipe=recipe_of(experiment))
        return _difference(side.ask("first"), right)

      wrong = checked(name, check)
      if wrong:
        rows.append(wrong)
      else:
        runners[name] = side
    own.ask("steps", number=1)
    once = own.seconds("steps", number=1).wall
    number = min(max(math.ceil(_ROUND_S / once), 1), 20)
    asked.say(f"timing {', '.join(runners)}, {number} steps a round ...")
    runs = {
      name: lambda side=side: side.seconds("steps", number=number).over(number)
      for name, side in runners.items()
    }
    timed = race(runs, OURS, asked.rounds)
  peak = asked.peaks()[0]
  raced = [_with_mfu(row, experiment, peak) for row in timed]
  return [{**counted, **row} if row["name"] == OURS else row for row in raced] + rows


def _difference(found: dict[str, float], right: dict[str, float]) -> str | None:
  """Returns in what a rival's first step differs from ours; None if in nothing."""
  for name, near in _NEAR.items():
    if not math.isclose(found[name], right[name], rel_tol=near):
      return f"{name} {found[name]:.6g}, ours {right[name]:.6g}"
  if not found["error"] <= _MOMENTS:
    return f"gradients differ by {found['error']:.2g} of their norm"
  return None


def _with_mfu(row: Row, experiment: Experiment, peak: float) -> Row:
  """Returns a row with the share of the peak: by the clock, and of the processors it had."""
  tokens = experiment.train.batch_size * experiment.data.seq_len
  vocab_size = experiment.data.tokenizer.vocab_size
  flops = experiment.model.train_flops_per_token(vocab_size, experiment.data.seq_len) * tokens
  return {
    **row,
    "tokens_per_s": tokens / row["seconds"],
    "mfu": flops / row["seconds"] / peak,
    "cpu_mfu": flops / row["cpu_seconds"] / (peak / host.cores()),
    "model_flops": flops,
    "peak_flops_per_s": peak,
  }
