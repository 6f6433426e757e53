"""Times back ends against a dense layer of equal FLOPs, values checked first.

jaxmoe bench experts [--tokens=1024 --dim=512 --mlp_dim=512 --num_experts=8
  --num_active=2 --dtype=float32 --repeats=7 --skew=0 --json=FILE]

jaxmoe bench latency --experts=dense,shift,low_rank,identity --num_experts=4

The second measures what a row costs at each expert, and prints it for LatencyAware(latency=...).

Without sizes the first runs 8 experts top-2, 64 top-8 and 128 top-8. All contestants of a benchmark
run in turn, round by round, so that a busy machine slows all of them alike; a ratio is the median
over the rounds of a contestant's time over the dense one's. What does not equal the oracle, in
values and gradients, is not timed, and the exit code is 1.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from rich.console import Console
from rich.table import Table

from jaxmoe.bench.expert_latency import family_of, latencies
from jaxmoe.bench.expert_layers import SHAPES, Benchmark, Shape, layer_benchmark, matmul_benchmark
from jaxmoe.commands.process import command_line
from jaxmoe.commands.process.malloc import keep_freed_memory
from jaxmoe.core.errors import InputError
from jaxmoe.core.output import check_output, write_output

FLAGS = flags.FlagValues()
SUITES = ("experts", "latency")
SIZES = ("tokens", "dim", "mlp_dim", "num_experts", "num_active")
for _size in SIZES:
  flags.DEFINE_integer(_size, None, "One size instead of the three shapes.", flag_values=FLAGS)
flags.DEFINE_string("dtype", "float32", "float32 or bfloat16.", flag_values=FLAGS)
flags.DEFINE_integer("repeats", 7, "Rounds of each benchmark.", flag_values=FLAGS)
flags.DEFINE_float("skew", 0.0, "Expert i is chosen with weight i^-skew.", flag_values=FLAGS)
flags.DEFINE_string(
  "experts", "swiglu", "Experts of `latency`: a name of EXPERTS, or kinds.", flag_values=FLAGS
)
flags.DEFINE_string("json", None, "A file for the results.", flag_values=FLAGS)

# Largest error of a row over the rows' root mean square. Float32 leaves room for GPUs' TF32.
TOLERANCES = {"float32": 5e-3, "bfloat16": 8e-2}
PASSES = ("forward", "forward_backward")


def main(arguments: list[str]) -> int:
  """Runs the command; returns the exit code."""
  keep_freed_memory()
  if len(arguments) != 1 or arguments[0] not in SUITES:
    got = " ".join(arguments) or "none"
    raise InputError(f"expected one suite, {' or '.join(SUITES)}, got {got}")
  if FLAGS.dtype not in TOLERANCES:
    raise InputError(f"--dtype={FLAGS.dtype} is not one of {', '.join(TOLERANCES)}")
  if FLAGS.repeats < 1:
    raise InputError(f"--repeats={FLAGS.repeats} must be at least 1")
  if FLAGS.json:
    check_output(FLAGS.json, f"--json={FLAGS.json}")
  shapes = asked_shapes()
  if arguments == ["latency"]:
    return print_latencies(shapes[0])
  device = jax.devices()[0]
  console = Console()
  versions = f"{device.device_kind}, jax {jax.__version__}"
  console.print(f"{versions}, {FLAGS.dtype}, {FLAGS.repeats} rounds")
  results: list[dict[str, Any]] = []
  for shape in shapes:
    for make in (matmul_benchmark, layer_benchmark):
      benchmark = make(shape, FLAGS.dtype)
      rows = run_benchmark(benchmark, FLAGS.dtype, FLAGS.repeats, console)
      console.print(as_table(f"{benchmark.title}, T={shape.tokens}, D={shape.dim}", rows))
      results.append({"race": benchmark.title, "shape": vars(shape), "rows": rows})
  if FLAGS.json:
    record = {"device": device.device_kind, "jax": jax.__version__, "dtype": FLAGS.dtype}
    record |= {"repeats": FLAGS.repeats, "races": results}
    write_output(FLAGS.json, f"--json={FLAGS.json}", json.dumps(record, indent=1) + "\n")
  wrong = [row["name"] for result in results for row in result["rows"] if row["wrong"]]
  return 1 if wrong else 0


def print_latencies(shape: Shape) -> int:
  """Prints microseconds a row of each expert as a setting of the loss; returns the exit code."""
  family = family_of(FLAGS.experts, shape.mlp_dim, shape.num_experts)
  sizes = shape.tokens, shape.dim, shape.num_experts, shape.num_active
  costs = latencies(family, *sizes, FLAGS.repeats, _time)
  print(f"LatencyAware(latency={costs})")
  if FLAGS.json:
    record = {"experts": FLAGS.experts, "shape": vars(shape), "latency_us": costs}
    write_output(FLAGS.json, f"--json={FLAGS.json}", json.dumps(record, indent=1) + "\n")
  return 0


def asked_shapes() -> list[Shape]:
  """Returns the shape of the flags, or the three shapes where no size is given."""
  asked = {name: FLAGS[name].value for name in SIZES if FLAGS[name].value is not None}
  shapes = (Shape(),) if asked else SHAPES
  return [Shape(**{**vars(shape), **asked, "skew": FLAGS.skew}) for shape in shapes]


def run_benchmark(
  benchmark: Benchmark, dtype: str, repeats: int, console: Console
) -> list[dict[str, Any]]:
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
        seconds[name][index, max(round_index, 0)] = _time(run)
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


def _time(run: Callable[[], Any]) -> float:
  start = time.perf_counter()
  jax.block_until_ready(run())
  return time.perf_counter() - start


def run() -> None:
  """Runs the command as this process does, and exits."""
  # Without what a machine that only runs benchmarks need not have, such as checkpoints and data.
  command_line.run(main, FLAGS, __doc__, takes=SUITES)


if __name__ == "__main__":
  run()
