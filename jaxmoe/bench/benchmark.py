"""Benchmarks: contestants over the same arrays, values checked first, timed in turn.

All contestants run round by round, so that a busy machine slows all of them alike; a ratio is the
median over the rounds of a contestant's time over the dense one's.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table

# Largest error of a row over the rows' root mean square. Float32 leaves room for GPUs' TF32.
TOLERANCES = {"float32": 5e-3, "bfloat16": 8e-2}
PASSES = ("forward", "forward_backward")


@dataclasses.dataclass(frozen=True)
class Benchmark:
  """Functions over the same `args`, with the right values, and a dense one that sets the scale."""

  title: str
  contestants: dict[str, Callable[..., jax.Array]]
  args: tuple[jax.Array, ...]
  oracle: Callable[..., jax.Array]
  dense: Callable[..., jax.Array]
  dense_args: tuple[jax.Array, ...]


def run_benchmark(
  benchmark: Benchmark, dtype: str, repeats: int, console: Console) -> list[dict[str, Any]]:
  """Returns a row for the dense function and each contestant: errors, seconds and ratios."""
  expected = _values(benchmark.oracle, [x.astype(jnp.float32) for x in benchmark.args])
  rows: list[dict[str, Any]] = [{"name": "dense", "error": 0.0, "wrong": False}]
  runs = {"dense": _passes(benchmark.dense, benchmark.dense_args)}
  for name, function in benchmark.contestants.items():
    console.print(f"[dim]checking {name} ...[/]")
    try:
      error = largest_error(_values(function, benchmark.args), expected)
    except jax.errors.JaxRuntimeError as failure:  # No memory, or no code for the type.
      console.print(f"{name} fails: {str(failure).splitlines()[0]}", markup=False)
      error = math.inf
    wrong = not error <= TOLERANCES[dtype]
    rows.append({"name": name, "error": error, "wrong": wrong})
    if not wrong:
      runs[name] = _passes(function, benchmark.args)
  console.print(f"[dim]timing {', '.join(runs)} ...[/]")
  seconds = {name: np.empty((len(PASSES), repeats)) for name in runs}
  for round_index in range(-1, repeats):  # Round -1 warms up.
    for name, passes in runs.items():
      for index, run in enumerate(passes):
        seconds[name][index, max(round_index, 0)] = seconds_of(run)
  for row in rows:
    if not row["wrong"]:
      row |= summary(seconds[row["name"]], seconds["dense"])
  return rows


def summary(seconds: np.ndarray, dense: np.ndarray) -> dict[str, Any]:
  """Returns by pass the median, the quartiles and the median ratio to dense, of (pass, round)."""
  out = {}
  for index, name in enumerate(PASSES):
    low, median, high = np.quantile(seconds[index], (0.25, 0.5, 0.75))
    ratio = np.median(seconds[index] / dense[index])
    numbers = {"median_s": median, "q1_s": low, "q3_s": high, "ratio_to_dense": ratio}
    out[name] = {key: float(value) for key, value in numbers.items()}
  return out


def largest_error(got: Any, expected: Any) -> float:
  """Returns the largest error of any row of any array over its array's root mean square row."""
  worst = 0.0
  for one, right in zip(got, expected, strict=True):
    one, right = (np.asarray(x, np.float32).reshape(-1, x.shape[-1]) for x in (one, right))
    size = math.sqrt(np.mean(np.sum(right**2, -1)))
    worst = max(worst, float(np.sqrt(np.max(np.sum((one - right) ** 2, -1)))) / size)
    if not np.isfinite(one).all():
      return math.inf
  return worst


def as_table(title: str, rows: list[dict[str, Any]]) -> Table:
  """Returns the table of a benchmark: milliseconds, median and quartiles, and ratios to dense."""
  table = Table(title=title, title_justify="left", min_width=78)
  table.add_column("", no_wrap=True)
  for heading in ("forward ms", "x", "forward+backward ms", "x"):
    table.add_column(heading, justify="right")
  for row in rows:
    if row["wrong"]:
      table.add_row(row["name"], f"wrong: error {row['error']:.2g}", "", "not timed", "")
      continue
    cells = []
    for name in PASSES:
      median, low, high = (row[name][key] * 1e3 for key in ("median_s", "q1_s", "q3_s"))
      spread = f"({_short(low)}-{_short(high)})"
      cells += [f"{_short(median)} {spread}", f"{row[name]['ratio_to_dense']:.2f}"]
    table.add_row(row["name"], *cells)
  return table


def _values(function: Callable[..., jax.Array], args: Any) -> list[jax.Array]:
  """Returns the output and the gradients of its products with fixed numbers."""

  def loss(*args: jax.Array) -> tuple[jax.Array, jax.Array]:
    out = function(*args)
    numbers = jnp.cos(jnp.arange(out.size, dtype=jnp.float32)).reshape(out.shape)
    return jnp.sum(out.astype(jnp.float32) * numbers), out

  indices = tuple(range(len(args)))
  grads, out = jax.jit(jax.grad(loss, indices, has_aux=True))(*args)
  return [out, *grads]


def _passes(function: Callable[..., jax.Array], args: Any) -> list[Callable[[], Any]]:
  """Returns what runs the forward pass, and the forward and backward pass."""
  forward = jax.jit(function)

  def both(grad_out: jax.Array, *args: jax.Array) -> Any:
    out, vjp = jax.vjp(function, *args)
    return out, vjp(grad_out)

  grad_out = jnp.ones_like(forward(*args))
  forward_backward = jax.jit(both)
  return [lambda: forward(*args), lambda: forward_backward(grad_out, *args)]


def _short(number: float) -> str:
  return f"{number:.{2 if number < 10 else 1 if number < 100 else 0}f}"


def seconds_of(run: Callable[[], Any]) -> float:
  """Returns how long a call takes, until what it returns is there."""
  start = time.perf_counter()
  jax.block_until_ready(run())
  return time.perf_counter() - start
