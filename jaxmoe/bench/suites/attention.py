"""Attention alone, forward and backward: one row, 8 heads of 64, causal, in float32.

Back ends of `ops/attention` are held against `reference`, values and gradients, and so are
PyTorch's SDPA and tokamax. Counted are temporaries, too, at lengths that nobody runs, and of rows
over four devices what each strategy and order visits and sends.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from jaxmoe.bench import cut_rows
from jaxmoe.bench.benchmark import TOLERANCES, largest_error
from jaxmoe.bench.ideal_work import Work
from jaxmoe.bench.kernel_cases import attention_call, both_ways, fitting
from jaxmoe.bench.program_counts import counted_row
from jaxmoe.bench.race import Run, race, timed
from jaxmoe.bench.results import Row, RowFile
from jaxmoe.bench.rival_operations import rivals_of
from jaxmoe.bench.sides.process import OWN, Side
from jaxmoe.bench.suite import Asked
from jaxmoe.ops import attention

HEADS, SIZE = 8, 64
LENGTHS = (128, 256, 1024, 4096)
COUNTED = (*LENGTHS, 8192, 32768)
DOCUMENTS = 16
BASE = "reference"


def run(asked: Asked, results: RowFile) -> None:
  """Races or counts each length; and documents of 512 in a row of 8,192 against one document."""
  for length in COUNTED if asked.count else LENGTHS:
    name = f"{length} tokens"
    if not results.has(name):
      asked.say(f"attention over {name} ...")
      results.add(name, _counted(length) if asked.count else _raced(asked, length))
  if asked.count:
    _cut(asked, results)
  elif not results.has("documents"):
    asked.say("attention over documents ...")
    results.add("documents", _documents(asked))


def _cut(asked: Asked, results: RowFile) -> None:
  """Counts rows over context devices, virtual ones of a process of its own."""
  names = [f"{documents}, {cut_rows.DEVICES} devices" for documents in cut_rows.DOCUMENTS]
  if all(map(results.has, names)):
    return
  asked.say(f"attention over {cut_rows.DEVICES} context devices ...")
  number = str(cut_rows.DEVICES)
  env = {**asked.env, "JAX_NUM_CPU_DEVICES": number, "JAX_PLATFORMS": "cpu"}
  with Side(OWN, asked.pythons[0], env) as own:
    sent = {
      f"{attend} {order}": own.ask("sent", attend=attend, order=order)
      for attend, order in cut_rows.CHOICES
    }
  for name, documents in zip(names, cut_rows.DOCUMENTS, strict=True):
    if not results.has(name):
      results.add(name, cut_rows.rows_of(documents, sent))


def arrays(length: int) -> tuple[jax.Array, ...]:
  """Returns queries, keys, values and the cotangent of the output, (1, L, N, H)."""
  keys = jax.random.split(jax.random.key(0), 4)
  return tuple(jax.random.normal(key, (1, length, HEADS, SIZE)) for key in keys)


def segments(length: int, documents: int) -> jax.Array:
  """Returns the document of each token, (1, L), of documents of one length."""
  return jnp.arange(length)[None] // (length // documents) + 1


def work(length: int) -> Work:
  """Returns the least of a causal pass forward and backward: what is seen, and each array once."""
  pairs = length * (length + 1) / 2
  return Work(12.0 * pairs * HEADS * SIZE, 4.0 * 11 * length * HEADS * SIZE)


def _function(name: str, length: int, documents: int = 1) -> Callable[..., Any]:
  return both_ways(attention_call(attention.BACKENDS[name], segments(length, documents)))


def _backends(length: int) -> list[str]:
  sizes = {"B": 1, "L": length, "S": length, "N": HEADS, "K": HEADS, "H": SIZE, "P": SIZE}
  return [name for name, back in attention.BACKENDS.items() if fitting(back, sizes) is None]


def _compiled(length: int) -> dict[str, jax.stages.Compiled]:
  shapes = [jax.ShapeDtypeStruct((1, length, HEADS, SIZE), jnp.float32)] * 4
  return {
    name: jax.jit(_function(name, length)).lower(*shapes).compile() for name in _backends(length)
  }


def _counted(length: int) -> list[Row]:
  return [counted_row(name, made, work(length)) for name, made in _compiled(length).items()]


def _raced(asked: Asked, length: int) -> list[Row]:
  given = arrays(length)
  functions = _compiled(length)
  right = jax.tree.leaves(functions[BASE](*given))
  runs: dict[str, Run] = {}
  wrong: list[Row] = []
  for name, function in functions.items():
    error = largest_error(jax.tree.leaves(function(*given)), right)
    if error <= TOLERANCES["float32"]:
      runs[name] = partial(timed, partial(function, *given))
    else:
      wrong.append({"name": name, "wrong": f"error {error:.2g}"})
  with rivals_of(asked, "attention", {}, given, right) as (rivals, rows):
    raced = race({**runs, **rivals}, BASE, asked.rounds)
  counted = {name: counted_row(name, made, work(length)) for name, made in functions.items()}
  return [{**counted.get(row["name"], {}), **row} for row in raced] + wrong + rows


def _documents(asked: Asked) -> list[Row]:
  """Returns rows of back ends that need not hold all pairs, over one document and over 16."""
  length = 8192
  given = arrays(length)
  runs: dict[str, Run] = {}
  for name in _backends(length):
    if name == BASE or name == "xla":
      continue
    for documents in (1, DOCUMENTS):
      function = jax.jit(_function(name, length, documents))
      label = f"{name}, {documents} of {length // documents}"
      runs[label] = partial(timed, partial(function, *given))
  return race(runs, next(iter(runs)), asked.rounds) if runs else []
