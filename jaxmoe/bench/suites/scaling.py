"""Growth of the cost of a step with experts, tokens, layers, length and devices.

Each sweep changes one size of a small model. Its curve is fitted by a power of the size, of what is
counted and, unless only that is asked for, of seconds of the processor and of compiling. Devices
are virtual ones of one processor: of these bytes and FLOPs alone are told.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from jaxmoe.bench.exponents import fit
from jaxmoe.bench.ideal_work import step_work
from jaxmoe.bench.model_shapes import small
from jaxmoe.bench.program_counts import counted_row
from jaxmoe.bench.race import Run, race, timed
from jaxmoe.bench.results import Row, RowFile
from jaxmoe.bench.sides.own import batch_of, lowered_step
from jaxmoe.bench.sides.process import OWN, Side
from jaxmoe.bench.suite import Asked
from jaxmoe.train.experiment import Experiment
from jaxmoe.train.train_state import StateSpec

COSTS = ("flops", "bytes", "temp_bytes", "instructions", "cpu_seconds", "compile_cpu_seconds")


@dataclasses.dataclass(frozen=True)
class Sweep:
  """One size that grows.

  Attributes:
    sizes: Its values.
    make: Returns the recipe of one.
    bends: What keeps the curve from being a power of it.
  """

  sizes: tuple[int, ...]
  make: Callable[[int], Experiment]
  bends: str


def _of(rows: int = 4, length: int = 256, experts: int = 8, layers: int = 2) -> Experiment:
  """Returns a small recipe: width 256, experts top-2 of 256."""
  experiment = small(256, experts, 2, 256, layers)
  return dataclasses.replace(
    experiment,
    train=dataclasses.replace(experiment.train, batch_size=rows),
    data=dataclasses.replace(experiment.data, seq_len=length),
  )


SWEEPS = {
  "experts": Sweep(
    (8, 16, 32, 64, 128), lambda number: _of(experts=number),
    "A token's FLOPs stay but for rows that pad each expert. What grows is what is held: every "
    "expert's weights, gradients and moments are passed over whether a token came or not.",
  ),
  "tokens": Sweep(
    (1024, 2048, 4096, 8192), lambda tokens: _of(rows=tokens // 256),
    "Bytes are below 1 where there are few tokens: the optimizer passes over all weights however "
    "many there are. FLOPs step up at 4,096, from where logits are made in chunks, and again on "
    "the way back.",
  ),
  "layers": Sweep(
    (2, 6, 16, 48), lambda number: _of(rows=1, length=128, layers=number),
    "Embedding, head and loss do not grow with layers. A program has its layers once: "
    "instructions, and what compiling takes, stay.",
  ),
  "length": Sweep(
    (256, 512, 1024, 2048), lambda length: _of(rows=1, length=length),
    "Seconds end above 1: attention's pairs of tokens grow with the square, all else with tokens. "
    "FLOPs and bytes do not show it: one visit of attention's blocks is counted, however many "
    "a row's documents ask for.",
  ),
}  # fmt: skip
DEVICES = (1, 2, 4, 8)
_HELD = "Bytes of one device that do not fall are those of what each device holds whole."
_AXES = {
  "data": "FLOPs fall less than devices grow: few tokens are left for rows that pad each expert.",
  "expert": "FLOPs fall at once with two devices: rows that come from others are multiplied in a "
  "loop whose length is found while it runs, of which one pass is counted.",
}


def run(asked: Asked, results: RowFile) -> None:
  """Sweeps each size, and devices; the last row of a sweep is its fit."""
  for name, sweep in SWEEPS.items():
    if not results.has(name):
      asked.say(f"cost against {name} ...")
      rows = _swept(asked, name, sweep)
      results.add(name, [*rows, fitted(rows, sweep.bends)])
  for axis in _AXES:
    if not results.has(f"{axis} devices"):
      asked.say(f"cost against devices of the axis {axis} ...")
      rows = _on_devices(asked, axis)
      results.add(f"{axis} devices", [*rows, fitted(rows, f"{_HELD} {_AXES[axis]}")])


def fitted(rows: list[Row], bends: str) -> Row:
  """Returns the row of the exponents of each cost that all rows of a sweep have."""
  sizes = [row["size"] for row in rows]
  fits = {}
  for cost in COSTS:
    costs = [row.get(cost, 0) for row in rows]
    if min(costs) > 0:
      found = fit(sizes, costs)
      fits[cost] = {**dataclasses.asdict(found), "ends": costs[-1] / costs[0]}
  return {"name": "fit", "fits": fits, "bends": bends}


def _swept(asked: Asked, name: str, sweep: Sweep) -> list[Row]:
  rows, runs = [], {}
  for size in sweep.sizes:
    experiment = sweep.make(size)
    spec, lowered = lowered_step(experiment)
    compiled: list[jax.stages.Compiled] = []
    seconds = timed(partial(_compile, lowered, compiled))
    row = counted_row(f"{name} {size}", compiled[0], step_work(experiment))
    if not asked.count:
      row["compile_cpu_seconds"] = seconds.cpu
      runs[row["name"]] = _stepping(experiment, spec, compiled[0])
    rows.append({**row, "size": size})
  if asked.count:
    return rows
  timed_rows = {row["name"]: row for row in race(runs, rows[0]["name"], asked.rounds)}
  return [{**row, **timed_rows[row["name"]]} for row in rows]


def _compile(lowered: jax.stages.Lowered, compiled: list[jax.stages.Compiled]) -> None:
  compiled.append(lowered.compile())


def _stepping(experiment: Experiment, spec: StateSpec, step: jax.stages.Compiled) -> Run:
  """Returns what does a step after another and tells the seconds of each."""
  held: list[Any] = [spec.init(experiment.train.seed)]
  batch = {name: jnp.asarray(rows) for name, rows in batch_of(experiment).items()}

  def one() -> Any:
    held[0], metrics = step(held[0], batch)
    return held[0], metrics

  return partial(timed, one)


def _on_devices(asked: Asked, axis: str) -> list[Row]:
  """Returns what one of so many virtual devices computes, moves and sends, all together alike."""
  env = {**asked.env, "JAX_NUM_CPU_DEVICES": str(max(DEVICES)), "JAX_PLATFORMS": "cpu"}
  with Side(OWN, asked.pythons[0], env) as own:
    rows = [own.ask("on_devices", axis=axis, number=number) for number in DEVICES]
  return [{**row, "size": number} for row, number in zip(rows, DEVICES, strict=True)]
