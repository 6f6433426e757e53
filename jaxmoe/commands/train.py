"""Trains the model of a recipe; the same command goes on where it stopped.

jaxmoe train --config=configs/tiny.py --workdir=runs/tiny [--config.train.num_steps=50]
  [--sinks=tensorboard,wandb] [--profile_steps=10:12] [--config.parallel.data=8]
"""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Iterator, Sequence

import jax
from absl import flags

from jaxmoe.commands.process import command_line, jax_settings, run_flags
from jaxmoe.commands.process.command_line import follow_up, say
from jaxmoe.commands.process.multi_process import processes
from jaxmoe.commands.process.patient_output import lost, outlive_readers
from jaxmoe.commands.process.stop_signals import StopSignals
from jaxmoe.core import multihost
from jaxmoe.core.config_io import to_json
from jaxmoe.core.errors import InputError, UserFacingError
from jaxmoe.parity import selfcheck
from jaxmoe.report import write_report
from jaxmoe.runs.fit import check_run, train_run
from jaxmoe.runs.recipe_loading import PREFIX, kept_line, load_recipe, recipe_origin
from jaxmoe.sinks import make_sinks
from jaxmoe.train.chat_date import settle_chat_date
from jaxmoe.train.experiment import Experiment
from jaxmoe.train.goodput import goodput
from jaxmoe.train.held_table import hold_table
from jaxmoe.train.profile import Profiler, parse_steps
from jaxmoe.train.run_log import NoRunLog, RunLog, read_lines
from jaxmoe.train.run_options import RunOptions
from jaxmoe.train.sinks import Sink, Sinks
from jaxmoe.train.wall_clock import WallClock
from jaxmoe.train.workdir import Workdir

FLAGS = flags.FlagValues()
flags.DEFINE_string("config", None, "The recipe: PATH[:name=value,...].", flag_values=FLAGS)
flags.DEFINE_string("workdir", None, "Where the run lives.", flag_values=FLAGS)
flags.DEFINE_string(
  "sinks", "", "Where metrics also go: tensorboard, wandb, or both with a comma.", flag_values=FLAGS
)
flags.DEFINE_string(
  "profile_steps", "", "FIRST:LAST; traces these steps into WORKDIR/profile.", flag_values=FLAGS
)
flags.DEFINE_bool(
  "allow_unproven",
  False,
  "Train on a layout that was not shown equal to one device.",
  flag_values=FLAGS,
)
flags.DEFINE_bool(
  "selfcheck",
  False,
  "Compare the gradients of the first step with those of one device.",
  flag_values=FLAGS,
)


def main(overrides: list[str]) -> int:
  """Runs the command; returns the exit code."""
  outlive_readers()
  with processes():
    return train(jax_settings.process_clock(), overrides)


def train(clock: WallClock, overrides: list[str]) -> int:
  """Trains, as one of the processes of the run; returns the exit code."""
  with multihost.raise_on_all():
    workdir = run_flags.need_workdir(FLAGS.workdir)
    asked, begun = load_recipe(FLAGS.config, overrides), workdir.begun()
    kept = load_recipe(FLAGS.config, overrides, begun) if begun else asked
    experiment = settle_chat_date(hold_table(kept), begun)
    check_run(experiment, workdir, FLAGS.allow_unproven, say)
    if multihost.is_main_process() and kept != asked:
      print(kept_line(asked, kept))
  multihost.assert_equal("the recipe", to_json(experiment))
  # Before signals are caught: a recipe's `SystemExit` is its mistake, a signal's is not.
  with run_options(experiment, workdir, clock) as options:
    jax_settings.set_up_jax()
    stop, tokenizers = StopSignals(), jax_settings.cache_dir() / "tokenizers"
    try:
      result = train_run(experiment, workdir, options, stop, tokenizers, say)
    except InputError:
      raise
    except UserFacingError:
      report_end(workdir, clock)
      raise
  report_end(workdir, clock)
  if not result.done:
    print(f"stopped at step {result.step}, saved; the same command goes on")
    return stop.exit_code
  print(f"done: step {result.step}. In {workdir.path}: metrics.jsonl, samples.md, checkpoints/")
  here = f"--workdir={workdir.path}"
  say(f"  score it:    {follow_up('evaluate', here)}")
  say(f"  write text:  {follow_up('generate', here, '--prompt=def main(')}")
  print("  go on:       the same command with a larger --config.train.num_steps")
  if ends := experiment.optim.schedule.kept_ends(experiment.train.num_steps):
    shown = ",".join(map(str, ends))
    print(f"               and --config.optim.schedule.earlier_ends={shown},")
    print("               or the learning rate rises again")
  return 0


def report_end(workdir: Workdir, clock: WallClock) -> None:
  """Says where the wall time went, and writes the report; a disk that refuses it is told."""
  if not multihost.is_main_process():
    return
  print(goodput(read_lines(workdir.metrics), read_lines(workdir.events)))
  try:
    print(f"what happened, as a page: {write_report(workdir.path)}")
  except OSError as error:
    later = follow_up("report", f"--workdir={workdir.path}")
    print(f"report.html cannot be written ({error.strerror}); {later} makes it later")
  log = RunLog(workdir.metrics, workdir.events)
  log.event("report", time={"seconds": clock.take("report")})
  if why := lost():
    log.event("output_lost", why=why)


@contextlib.contextmanager
def run_options(experiment: Experiment, workdir: Workdir, clock: WallClock) -> Iterator[RunOptions]:
  """Gives what the flags say that a run is given besides its recipe, and ends it with the run.

  Raises:
    InputError: no such sink, its package is missing, or no such steps.
  """
  profiler = None
  targets: Sequence[Sink] = ()
  log = RunLog(workdir.metrics, workdir.events) if multihost.is_main_process() else NoRunLog()
  with multihost.raise_on_all():
    if FLAGS.profile_steps:
      steps = parse_steps(FLAGS.profile_steps, experiment.train.num_steps)
      profiler = Profiler(*steps, workdir.path / "profile") if multihost.is_main_process() else None
      # Or a program from the compile cache would carry the names of the code that compiled it.
      jax.config.update("jax_compilation_cache_include_metadata_in_key", True)
    if multihost.is_main_process():
      targets = make_sinks(FLAGS.sinks, workdir.path, os.environ)
  sinks = Sinks(targets, log.event, print)
  wait_s = 5.0
  try:
    first = functools.partial(selfcheck, experiment) if FLAGS.selfcheck else None
    origin, peaks = recipe_origin(FLAGS.config, experiment), jax_settings.cache_dir() / "peaks"
    programs = jax_settings.kept_programs()
    yield RunOptions(origin, clock, (sinks,), profiler, first, peaks, programs=programs)
  except KeyboardInterrupt:
    wait_s = 0.5  # the person does not want to wait
    raise
  finally:
    if profiler is not None:
      profiler.close()
    sinks.close(wait_s)


def run() -> None:
  """Runs the command as this process does, and exits."""
  command_line.run(main, FLAGS, __doc__, takes=(PREFIX,), spreads=True)


if __name__ == "__main__":
  run()
