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
from typing import Any

import jax
from absl import flags
from rich.console import Console

from jaxmoe.bench.benchmark import TOLERANCES, as_table, run_benchmark, seconds_of
from jaxmoe.bench.expert_latency import family_of, latencies
from jaxmoe.bench.expert_layers import SHAPES, Shape, layer_benchmark, matmul_benchmark
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
  costs = latencies(family, *sizes, FLAGS.repeats, seconds_of)
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


def run() -> None:
  """Runs the command as this process does, and exits."""
  # Without what a machine that only runs benchmarks need not have, such as checkpoints and data.
  command_line.run(main, FLAGS, __doc__, takes=SUITES)


if __name__ == "__main__":
  run()
