"""Trains the model of a recipe; the same command goes on where it stopped.

python -m launch.train --config=configs/tiny.py --workdir=runs/tiny [--config.train.num_steps=50]
"""

from __future__ import annotations

from absl import flags

from jaxmoe.core.layout import one_device
from jaxmoe.data.corpus import open_corpus
from jaxmoe.optim import make_schedule
from jaxmoe.train.goodput import goodput
from jaxmoe.train.journal import read_lines
from jaxmoe.train.session import Around, Session
from launch import cli
from launch.recipes import PREFIX, load_recipe, recipe_origin

FLAGS = flags.FlagValues()
flags.DEFINE_string("config", None, "The recipe: PATH[:name=value,...].", flag_values=FLAGS)
flags.DEFINE_string("workdir", None, "Where the run lives.", flag_values=FLAGS)


def main(overrides: list[str]) -> int:
  """Runs the command; returns the exit code."""
  ledger = cli.process_ledger()
  experiment = load_recipe(FLAGS.config, overrides)
  workdir = cli.need_workdir(FLAGS.workdir)
  workdir.check(experiment)
  make_schedule(experiment.optim, experiment.train.num_steps)  # its checks, before anything is read
  # Before signals are caught: a recipe's `SystemExit` is its mistake, a signal's is not.
  around = Around(recipe_origin(FLAGS.config, experiment), ledger)
  cli.set_up_jax()
  stop = cli.StopSignals()
  corpus = open_corpus(experiment.data, cli.cache_dir() / "tokenizers", progress=print)
  session = Session(experiment, workdir, corpus, one_device(), around)
  outcome = session.train(stop)
  print(goodput(read_lines(workdir.metrics), read_lines(workdir.events)))
  if not outcome.done:
    print(f"stopped at step {outcome.step}, saved; the same command goes on")
    return stop.exit_code
  print(f"done: step {outcome.step}. In {workdir.path}: metrics.jsonl, samples.md, checkpoints/")
  print(f"  score it:    python -m launch.evaluate --workdir={workdir.path}")
  print(f"  write text:  python -m launch.generate --workdir={workdir.path} --prompt='def main('")
  print("  go on:       the same command with a larger --config.train.num_steps")
  return 0


if __name__ == "__main__":
  cli.run(main, FLAGS, __doc__, takes=(PREFIX,))
