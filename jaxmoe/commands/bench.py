"""Times us against rivals and back ends against each other, values checked first.

jaxmoe bench step|decode [--shape=NAME,...] [--rivals=torch,llama_cpp] [--count] [--json=FILE]
jaxmoe bench attention [--rivals=torch,tokamax] [--count] [--json=FILE]
jaxmoe bench kernels [--shape=NAME,... --dtype=float32] [--rivals=torch,tokamax] [--json=FILE]
jaxmoe bench start|scaling [--count] [--json=FILE]
jaxmoe bench page --out=bench.html FILE...
jaxmoe bench links --out=links.json [--topology=ring --devices=4 --repeats=9]
jaxmoe bench experts [--tokens=1024 --dim=512 --mlp_dim=512 --num_experts=8
  --num_active=2 --dtype=float32 --repeats=7 --skew=0 --json=FILE]
jaxmoe bench latency --experts=dense,shift,low_rank,identity --num_experts=4

Contestants run in turn, round by round, so that a busy machine slows all of them alike; a ratio is
the median over the rounds, of seconds of the processor. What does not equal the oracle or the
rival, in values and gradients, is not timed, and the exit code is 1. With --count programs are
compiled, and their work is counted beside the least that is needed; nothing is timed. A suite that
was killed goes on from the file that --json names; `page` makes one page of such files. On a
device that is no CPU `auto` goes by what `kernels` measured there, from then on.

`links` measures latency and bytes a second between devices, for `jaxmoe explain --links`.
`experts` compares expert layers with a dense one of equal FLOPs; without sizes it runs 8 experts
top-2, 64 top-8 and 128 top-8. `latency` measures what a row costs at each expert, and prints it for
LatencyAware(latency=...).
"""

from __future__ import annotations

import functools
import importlib
import json
import os
import pathlib
import sys
from typing import Any

import jax
from absl import flags
from rich.console import Console

from jaxmoe.bench.benchmark import TOLERANCES, as_table, run_benchmark, seconds_of
from jaxmoe.bench.expert_latency import family_of, latencies
from jaxmoe.bench.expert_layers import SHAPES, Shape, layer_benchmark, matmul_benchmark
from jaxmoe.bench.page import result_files
from jaxmoe.bench.suites import SUITES
from jaxmoe.commands.process import command_line
from jaxmoe.commands.process.malloc import keep_freed_memory
from jaxmoe.core import measured
from jaxmoe.core.errors import InputError
from jaxmoe.core.output import check_output, write_output
from jaxmoe.cost.link_probe import measure_links
from jaxmoe.cost.links import write_links
from jaxmoe.cost.peak import best_memory_rate, best_peak

FLAGS = flags.FlagValues()
LAYERS = ("experts", "latency")
SIZES = ("tokens", "dim", "mlp_dim", "num_experts", "num_active")
for _size in SIZES:
  flags.DEFINE_integer(_size, None, "One size instead of the three shapes.", flag_values=FLAGS)
flags.DEFINE_string(
  "dtype", None, "float32 or bfloat16; float32, but bfloat16 of `kernels` on what is no CPU.",
  flag_values=FLAGS,
)  # fmt: skip
flags.DEFINE_integer("repeats", None, "Rounds of each race; 9, of layers 7.", flag_values=FLAGS)
flags.DEFINE_float("skew", 0.0, "Expert i is chosen with weight i^-skew.", flag_values=FLAGS)
flags.DEFINE_string(
  "experts", "swiglu", "Experts of `latency`: a name of EXPERTS, or kinds.", flag_values=FLAGS
)
flags.DEFINE_string("json", None, "A file for the results.", flag_values=FLAGS)
flags.DEFINE_string("out", None, "The page, or link profile, to write.", flag_values=FLAGS)
flags.DEFINE_enum(
  "topology", "full_mesh", ["full_mesh", "ring"], "Of `links`: how devices are joined.",
  flag_values=FLAGS,
)  # fmt: skip
flags.DEFINE_integer(
  "devices", 0, "Of `links`: virtual devices of this CPU; 0 for those there are.",
  lower_bound=0, upper_bound=1 << 10, flag_values=FLAGS,
)  # fmt: skip
flags.DEFINE_string("shape", None, "Of a suite: NAME,...", flag_values=FLAGS)
flags.DEFINE_string("rivals", None, "Of a suite: NAME,...; empty for none.", flag_values=FLAGS)
flags.DEFINE_string(
  "measured", None, "Of `kernels`, on what is no CPU: the file for what `auto` goes by, such as "
  "jaxmoe/ops/measured.json; by default this machine's own, in the folder of caches.",
  flag_values=FLAGS,
)  # fmt: skip
flags.DEFINE_bool("count", False, "Whether work is counted and nothing timed.", flag_values=FLAGS)
flags.DEFINE_string(
  "rivals_python", None, "The Python that rivals are installed in; this one by default.",
  flag_values=FLAGS,
)  # fmt: skip


def main(arguments: list[str]) -> int:
  """Runs the command; returns the exit code."""
  if arguments[:1] == ["page"]:
    return write_page(arguments[1:])
  names = (*SUITES, *LAYERS, "links", "page")
  if len(arguments) != 1 or arguments[0] not in names:
    got = " ".join(arguments) or "none"
    raise InputError(f"expected one suite, {', '.join(names[:-1])} or {names[-1]}, got {got}")
  if FLAGS.dtype not in (None, *TOLERANCES):
    raise InputError(f"--dtype={FLAGS.dtype} is not one of {', '.join(TOLERANCES)}")
  if FLAGS.repeats is not None and FLAGS.repeats < 1:
    raise InputError(f"--repeats={FLAGS.repeats} must be at least 1")
  if FLAGS.json:
    check_output(FLAGS.json, f"--json={FLAGS.json}")
  if arguments == ["links"]:
    return write_profile()
  if arguments[0] in SUITES:
    return race_suite(arguments[0])
  keep_freed_memory()
  shapes = asked_shapes()
  return print_latencies(shapes[0]) if arguments == ["latency"] else compare_layers(shapes)


def race_suite(name: str) -> int:
  """Runs a suite of the table; returns the exit code."""
  # Without what a machine that compares layers alone need not have, such as checkpoints and data.
  suite_run = importlib.import_module("jaxmoe.bench.suite_run")
  jax_settings = importlib.import_module("jaxmoe.commands.process.jax_settings")
  suite = SUITES[name]
  jax_settings.set_up_jax()
  on_cpu = jax.default_backend() == "cpu"
  shapes = suite.default_shapes if on_cpu else suite.on_devices or suite.default_shapes
  asked = suite_run.Asked(
    shapes=suite_run.chosen("shape", FLAGS.shape, suite.shapes, shapes),
    rivals=suite_run.chosen("rivals", FLAGS.rivals, suite.rivals, len(suite.rivals)),
    count=FLAGS.count,
    rounds=FLAGS.repeats or 9,
    pythons=(sys.executable, FLAGS.rivals_python or sys.executable),
    env=dict(os.environ),
    peaks=functools.cache(lambda: best_rates(jax_settings.cache_dir() / "peaks")),
    say=lambda line: print(line, file=sys.stderr, flush=True),
    dtype=FLAGS.dtype or ("float32" if on_cpu or name != "kernels" else "bfloat16"),
    keep=None if on_cpu else functools.partial(keep_races, jax_settings.measured_path()),
  )
  if name == "scaling" and not asked.count:  # which times compiling, too
    jax.config.update("jax_enable_compilation_cache", False)
  return 0 if suite_run.run_suite(name, asked, FLAGS.json, Console()) else 1


def keep_races(own: pathlib.Path, rows: list[measured.MeasuredRow]) -> None:
  """Keeps how back ends did, in the file that --measured names or in this machine's own."""
  path = pathlib.Path(FLAGS.measured) if FLAGS.measured else own
  measured.write_measured(rows, path)
  print(f"`auto` goes by {path} from now on", file=sys.stderr, flush=True)


def best_rates(folder: pathlib.Path) -> tuple[float, float]:
  """Returns the best FLOP/s and bytes per second that this machine ever had."""
  return best_peak("float32", folder), best_memory_rate(folder)


def write_page(paths: list[str]) -> int:
  """Writes the page of files of suites; returns the exit code."""
  if not FLAGS.out:
    raise InputError("--out is missing: the page to write, such as --out=bench.html")
  check_output(FLAGS.out, f"--out={FLAGS.out}", paths)
  files = result_files.read_files(paths)
  page_file = importlib.import_module("jaxmoe.bench.page.page_file")
  write_output(FLAGS.out, f"--out={FLAGS.out}", page_file.bench_page(files))
  print(f"wrote {FLAGS.out}")
  return 0


def write_profile() -> int:
  """Measures links between devices and writes their profile; returns the exit code."""
  if not FLAGS.out:
    raise InputError("--out is missing: the profile to write, such as --out=links.json")
  check_output(FLAGS.out, f"--out={FLAGS.out}")
  if FLAGS.devices:
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", FLAGS.devices)
  importlib.import_module("jaxmoe.commands.process.jax_settings").set_up_jax()
  profile = measure_links(jax.devices(), FLAGS.topology, FLAGS.repeats or 9)
  write_output(FLAGS.out, f"--out={FLAGS.out}", write_links(profile))
  for side, way in (("right", profile.right), ("left", profile.left)):
    print(f"{side}: {way.latency_s * 1e6:.1f} us, {way.bytes_per_s / 1e9:.2f} GB/s")
  print(f"wrote {FLAGS.out}")
  return 0


def compare_layers(shapes: list[Shape]) -> int:
  """Compares layers of experts at shapes; returns the exit code."""
  rounds, dtype = FLAGS.repeats or 7, FLAGS.dtype or "float32"
  device = jax.devices()[0]
  console = Console()
  versions = f"{device.device_kind}, jax {jax.__version__}"
  console.print(f"{versions}, {dtype}, {rounds} rounds")
  results: list[dict[str, Any]] = []
  for shape in shapes:
    for make in (matmul_benchmark, layer_benchmark):
      benchmark = make(shape, dtype)
      rows = run_benchmark(benchmark, dtype, rounds, console)
      console.print(as_table(f"{benchmark.title}, T={shape.tokens}, D={shape.dim}", rows))
      results.append({"race": benchmark.title, "shape": vars(shape), "rows": rows})
  if FLAGS.json:
    record = {"device": device.device_kind, "jax": jax.__version__, "dtype": dtype}
    record |= {"repeats": rounds, "races": results}
    write_output(FLAGS.json, f"--json={FLAGS.json}", json.dumps(record, indent=1) + "\n")
  wrong = [row["name"] for result in results for row in result["rows"] if row["wrong"]]
  return 1 if wrong else 0


def print_latencies(shape: Shape) -> int:
  """Prints microseconds a row of each expert as a setting of the loss; returns the exit code."""
  family = family_of(FLAGS.experts, shape.mlp_dim, shape.num_experts)
  sizes = shape.tokens, shape.dim, shape.num_experts, shape.num_active
  costs = latencies(family, *sizes, FLAGS.repeats or 7, seconds_of)
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
  files = [word for word in sys.argv[2:] if not word.startswith("-")]
  files = files if sys.argv[1:2] == ["page"] else []
  command_line.run(main, FLAGS, __doc__, takes=(*SUITES, *LAYERS, "links", "page", *files))


if __name__ == "__main__":
  run()
