"""Says what a recipe needs before it runs: arrays, collectives, FLOPs, memory. Allocates nothing.

With --topology it compiles for TPU chips or GPUs that are not there, and exits with 1 if it does
not fit.
On the devices that are there it says whether it does.

jaxmoe explain --config=configs/tiny.py --devices=8 --config.parallel.data=8 \\
  --config.train.batch_size=8 [--json=FILE] [--nocompile]
jaxmoe explain --config=configs/tiny.py --devices=4 --config.parallel.context=4 \\
  --links=links.json [--lengths=lengths.npy] [--flops_per_s=4e14]
jaxmoe explain --config=configs/tiny.py --topology=v5e:4x4 --config.parallel.data=16 \\
  --config.train.batch_size=16
"""

from __future__ import annotations

import json
import os
import sys
import textwrap
from dataclasses import asdict

import jax
from absl import flags

from jaxmoe.commands.process import command_line, jax_settings
from jaxmoe.core.errors import InputError
from jaxmoe.core.layout import Layout
from jaxmoe.core.output import check_output, write_output
from jaxmoe.cost.links import read_links
from jaxmoe.parallel import make_layout
from jaxmoe.plan import explain, explain_text
from jaxmoe.plan.advice_text import context_text, pipeline_text
from jaxmoe.plan.context_summary import ContextSummary, context_summary, read_lengths
from jaxmoe.plan.device_memory import memory_of_device
from jaxmoe.plan.topology import topology_devices
from jaxmoe.runs.recipe_loading import PREFIX, file_of, load_recipe
from jaxmoe.train.experiment import Experiment
from jaxmoe.train.idle_devices import idle_devices

FLAGS = flags.FlagValues()
flags.DEFINE_string("config", None, "The recipe: PATH[:name=value,...].", flag_values=FLAGS)
flags.DEFINE_integer(
  "devices", 0, "As if on so many devices, virtual ones of this CPU; 0 for those there are.",
  upper_bound=1 << 16, flag_values=FLAGS,
)  # fmt: skip
flags.DEFINE_string(
  "topology", None,
  "As if on a TPU slice, such as v5e:4x4, or GPUs, such as h200:1x1x8; needs their compiler.",
  flag_values=FLAGS,
)  # fmt: skip
flags.DEFINE_bool("compile", True, "Whether to compile; --nocompile for tables alone.",
                  flag_values=FLAGS)  # fmt: skip
flags.DEFINE_string(
  "links", None, "A JSON profile of the links between context devices: tells times of strategies.",
  flag_values=FLAGS,
)  # fmt: skip
flags.DEFINE_string(
  "lengths", None, "With --links: an .npy of document lengths; else a row is one document.",
  flag_values=FLAGS,
)  # fmt: skip
flags.DEFINE_float(
  "flops_per_s", 1e14, "With --links: the products that a device is taken to do a second.",
  lower_bound=1.0, flag_values=FLAGS,
)  # fmt: skip
flags.DEFINE_string("json", None, "A file for all of it as JSON.", flag_values=FLAGS)


def main(overrides: list[str]) -> int:
  """Runs the command; returns the exit code."""
  experiment = load_recipe(FLAGS.config, overrides)
  if FLAGS.devices < 0 or (FLAGS.devices and FLAGS.topology):
    raise InputError(
      f"--devices={FLAGS.devices} must not be negative, and not stand beside --topology; leave one"
    )
  if FLAGS.lengths and not FLAGS.links:
    raise InputError("--lengths is for times by a link profile; give --links=FILE.json, too")
  context = context_advice(experiment)
  if FLAGS.json:
    check_output(FLAGS.json, f"--json={FLAGS.json}", [file_of(FLAGS.config)])
  jax_settings.set_up_jax()
  if FLAGS.topology:
    devices = slice_of(FLAGS.topology)
  else:
    devices = virtual_devices(FLAGS.devices) if FLAGS.devices else jax.devices()
  layout = layout_of(experiment, devices)
  room = memory_of_device(layout, there=not (FLAGS.devices or FLAGS.topology))
  found = explain(experiment, layout, FLAGS.compile, say, room)
  if FLAGS.json:
    record = json.dumps({**found.record(), "context": list(map(asdict, context))}, indent=1)
    write_output(FLAGS.json, f"--json={FLAGS.json}", record + "\n")
  print(explain_text(found))
  for line in (*pipeline_text(found.pipeline), *context_text(context)):
    print(line)
  if idle := idle_devices(experiment, layout, devices):
    print(textwrap.fill(f"note: {idle}", 80, break_on_hyphens=False))
  return 1 if FLAGS.topology and found.fits is False else 0


def context_advice(experiment: Experiment) -> tuple[ContextSummary, ...]:
  """Returns the times of strategies by the links that are asked about; none where none are.

  Raises:
    InputError: a file is no link profile or no lengths, or the recipe has one context device.
  """
  if not FLAGS.links:
    return ()
  lengths = read_lengths(FLAGS.lengths) if FLAGS.lengths else None
  return context_summary(experiment, read_links(FLAGS.links), lengths, FLAGS.flops_per_s)


def slice_of(name: str) -> list[jax.Device]:
  """Returns the devices of a slice or of GPUs that are not there, of which nobody looks for any.

  Raises:
    InputError: As `topology_devices`.
  """
  os.environ["TPU_SKIP_MDS_QUERY"] = "1"
  jax.config.update("jax_platforms", "cpu")
  return topology_devices(name)


def virtual_devices(number: int) -> list[jax.Device]:
  """Returns so many devices of this CPU; JAX sees no others.

  Raises:
    InputError: JAX has started with fewer.
  """
  try:
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", number)
  except RuntimeError:  # JAX has started: who calls this chose the devices
    if len(jax.devices()) < number:
      raise InputError(f"--devices={number}: JAX has started with {len(jax.devices())}") from None
  return jax.devices()[:number]


def layout_of(experiment: Experiment, devices: list[jax.Device]) -> Layout:
  """Returns the layout of a recipe over these devices.

  Raises:
    InputError: there are fewer devices than the degrees ask for.
  """
  try:
    return make_layout(experiment.parallel, devices)
  except InputError as error:
    raise InputError(f"{error}; or --devices={experiment.parallel.num_devices}") from None


def say(line: str) -> None:
  """Tells what takes long, beside the output."""
  print(f"{line} ...", file=sys.stderr, flush=True)


def run() -> None:
  """Runs the command as this process does, and exits."""
  command_line.run(main, FLAGS, __doc__, takes=(PREFIX,))


if __name__ == "__main__":
  run()
