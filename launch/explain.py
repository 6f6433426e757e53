"""Says what a recipe needs before it runs: arrays, collectives, FLOPs, memory. Allocates nothing.

python -m launch.explain --config=configs/tiny.py --devices=8 --config.parallel.data=8 \\
  --config.train.batch_size=8 [--json=FILE] [--nocompile]
python -m launch.explain --config=configs/tiny.py --topology=v5e:4x4 --config.parallel.data=16 \\
  --config.train.batch_size=16
"""

from __future__ import annotations

import json
import pathlib
import sys

import jax
from absl import flags

from jaxmoe.core.errors import InputError
from jaxmoe.core.layout import Layout
from jaxmoe.parallel import make_mesh
from jaxmoe.parallel.degrees import TOKEN_AXES
from jaxmoe.plan import explain, page
from jaxmoe.train.experiment import Experiment
from launch import cli
from launch.recipes import PREFIX, load_recipe

FLAGS = flags.FlagValues()
flags.DEFINE_string("config", None, "The recipe: PATH[:name=value,...].", flag_values=FLAGS)
flags.DEFINE_integer(
  "devices", 0, "As if on so many devices, virtual ones of this CPU; 0 for those there are.",
  flag_values=FLAGS,
)  # fmt: skip
flags.DEFINE_bool("compile", True, "Whether to compile; --nocompile for tables alone.",
                  flag_values=FLAGS)  # fmt: skip
flags.DEFINE_string("json", None, "A file for all of it as JSON.", flag_values=FLAGS)


def main(overrides: list[str]) -> int:
  """Runs the command; returns the exit code."""
  experiment = load_recipe(FLAGS.config, overrides)
  if FLAGS.devices < 0:
    raise InputError(f"--devices must not be negative: --devices={FLAGS.devices}")
  cli.set_up_jax()
  if FLAGS.devices:
    virtual_devices(FLAGS.devices)
  layout = layout_of(experiment, jax.devices())
  found = explain(experiment, layout, FLAGS.compile, say)
  if FLAGS.json:
    write(pathlib.Path(FLAGS.json), json.dumps(found.record(), indent=1))
  print(page(found))
  return 0


def virtual_devices(number: int) -> None:
  """Makes JAX see so many devices of this CPU, and no others."""
  try:
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", number)
  except RuntimeError:  # JAX has started: a program that calls this one chose the devices
    if len(jax.devices()) < number:
      raise


def layout_of(experiment: Experiment, devices: list[jax.Device]) -> Layout:
  """Returns the layout of a recipe over these devices.

  Raises:
    InputError: there are fewer devices than the degrees ask for.
  """
  try:
    mesh = make_mesh(experiment.parallel, devices)
  except InputError as error:
    raise InputError(f"{error}; or --devices={experiment.parallel.num_devices}") from None
  return Layout(mesh, {"activations": {"batch": TOKEN_AXES}})


def say(line: str) -> None:
  """Tells what takes long, beside the output."""
  print(f"{line} ...", file=sys.stderr, flush=True)


def write(path: pathlib.Path, text: str) -> None:
  """Writes a file.

  Raises:
    InputError: it cannot be written.
  """
  try:
    path.write_text(text + "\n", encoding="utf-8")
  except OSError as error:
    raise InputError(f"--json={path}: cannot be written ({error.strerror})") from None


if __name__ == "__main__":
  cli.run(main, FLAGS, __doc__, takes=(PREFIX,))
