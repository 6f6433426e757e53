"""Changes the experts of a trained run and writes a new run, which starts from them at step 0.

jaxmoe surgery --workdir=OLD --out=NEW
  --insert=2 [--like=0,3]    inactive experts are added; outputs stay, bit for bit
  --open [--like=0,3]        inactive experts are opened to the router
  --prune_to=4 --usage=FILE  the most used experts of each layer stay; or, in place of --usage,
                             --count_on=16 [--held_out] counts on so many batches
  --clone=2                  every expert becomes 2; outputs stay
  --upcycle=8 [--active=2]   dense blocks become MoE, every expert a copy; outputs stay, unless
    [--noise=0.01 --drop=0.5]  copies get noise, or new hidden units in place of such a share

Parameters and the optimizer's moments follow. The schedule and the data start anew. Data, schedule
and all else but the model are those of OLD, or of --config=RECIPE, changed by --config.FIELD=VALUE:
--config.optim.frozen='layers/*/moe/experts/*@0:4' holds the first four experts still. Then

jaxmoe train --config=NEW/config.json --workdir=NEW
"""

from __future__ import annotations

import dataclasses

from absl import flags

from jaxmoe.commands.process import command_line, jax_settings, run_flags
from jaxmoe.commands.process.command_line import follow_up, say
from jaxmoe.core.errors import InputError
from jaxmoe.runs.recipe_loading import PREFIX
from jaxmoe.runs.surgery import (
  ONE_SOURCE_OF_COUNTS,
  NewRun,
  Operation,
  cloning,
  derive,
  inserting,
  opening,
  pruning,
  upcycling,
)
from jaxmoe.train.expert_counts import ExpertCounts, read_expert_counts

FLAGS = flags.FlagValues()
flags.DEFINE_string("workdir", None, "The run whose model is changed.", flag_values=FLAGS)
flags.DEFINE_string("out", None, "The folder of the new run; must not exist.", flag_values=FLAGS)
flags.DEFINE_string("config", None, "A recipe for all but the model.", flag_values=FLAGS)
flags.DEFINE_integer("insert", None, "Inactive experts to add a layer.", flag_values=FLAGS)
flags.DEFINE_bool("open", False, "Opens the inactive experts.", flag_values=FLAGS)
flags.DEFINE_integer("prune_to", None, "Experts to keep a layer.", flag_values=FLAGS)
flags.DEFINE_integer("clone", None, "How many each expert becomes.", flag_values=FLAGS)
flags.DEFINE_integer("upcycle", None, "Experts to make of a dense block.", flag_values=FLAGS)
flags.DEFINE_list("like", [], "Experts that new ones are copies of.", flag_values=FLAGS)
flags.DEFINE_integer("active", None, "Active experts of an upcycled block.", flag_values=FLAGS)
flags.DEFINE_float("noise", 0.0, "Noise of upcycled experts, by deviation.", flag_values=FLAGS)
flags.DEFINE_float("drop", 0.0, "Share of their hidden units drawn anew.", flag_values=FLAGS)
flags.DEFINE_string("usage", None, ".json, .npy or metrics.jsonl of choices.", flag_values=FLAGS)
flags.DEFINE_integer("count_on", None, "Batches to count choices on.", 1, flag_values=FLAGS)
flags.DEFINE_bool("held_out", False, "Counts on held-out documents.", flag_values=FLAGS)
flags.DEFINE_bool("reset_moments", False, "Starts the optimizer anew.", flag_values=FLAGS)

OPERATIONS = {
  "insert": ("like",),
  "open": ("like",),
  "prune_to": ("usage", "count_on", "held_out"),
  "clone": (),
  "upcycle": ("active", "noise", "drop"),
}
"""Each operation's flag, and the flags that go with it."""


def main(overrides: list[str]) -> int:
  """Runs the command; returns the exit code."""
  name = chosen()
  operation = operation_of(name)
  workdir = run_flags.need_workdir(FLAGS.workdir)
  jax_settings.set_up_jax()
  new_run = NewRun(FLAGS.config, overrides, FLAGS.reset_moments)
  tokenizers = jax_settings.cache_dir() / "tokenizers"
  step = derive(workdir, operation, FLAGS.out, new_run, tokenizers, say, run_flags.complain)
  moments = "start anew" if FLAGS.reset_moments else "followed"
  print(f"wrote {FLAGS.out}: step {step} of {workdir.path} after {name}; moments {moments}")
  go_on = follow_up("train", f"--config={FLAGS.out}/config.json", f"--workdir={FLAGS.out}")
  say(f"  go on:  {go_on}")
  return 0


def chosen() -> str:
  """Returns the one operation that the flags name.

  Raises:
    InputError: none or several, or a flag of another one.
  """
  values = {name: FLAGS[name].value for name in OPERATIONS}
  names = [name for name, value in values.items() if value is not None and value is not False]
  if len(names) != 1:
    every = ", ".join(f"--{name}" for name in OPERATIONS)
    raise InputError(f"give one of {every}: {len(names)} given; several take a run each")
  others = {flag for flags_of in OPERATIONS.values() for flag in flags_of}
  stray = sorted(flag for flag in others if FLAGS[flag].value and flag not in OPERATIONS[names[0]])
  if stray:
    raise InputError(f"--{stray[0]} does not go with --{names[0]}; leave it out")
  return names[0]


def operation_of(name: str) -> Operation:
  """Returns the operation as the flags have it, and the flags that were given for its event."""
  like = [number(text) for text in FLAGS.like]
  operations = {
    "insert": lambda: inserting(FLAGS.insert, like),
    "open": lambda: opening(like),
    "prune_to": lambda: pruning(FLAGS.prune_to, usage(), FLAGS.count_on, FLAGS.held_out),
    "clone": lambda: cloning(FLAGS.clone),
    "upcycle": lambda: upcycling(FLAGS.upcycle, FLAGS.active or 2, FLAGS.noise, FLAGS.drop),
  }
  given = [flag for flag in OPERATIONS[name] if FLAGS[flag].value]
  fields = {flag: FLAGS[flag].value for flag in (name, *given)}
  return dataclasses.replace(operations[name](), fields=fields)


def usage() -> ExpertCounts | None:
  """Returns what --usage holds.

  Raises:
    InputError: it cannot be read, or choices are to be counted, too.
  """
  if FLAGS.usage and FLAGS.count_on is not None:
    raise InputError(ONE_SOURCE_OF_COUNTS)
  return read_expert_counts(FLAGS.usage) if FLAGS.usage else None


def number(text: str) -> int:
  """Returns the expert that an item of --like names.

  Raises:
    InputError: it is no whole number.
  """
  try:
    return int(text)
  except ValueError:
    raise InputError(f"--like: expected numbers such as 0,3, got {text!r}") from None


def run() -> None:
  """Runs the command as this process does, and exits."""
  command_line.run(main, FLAGS, __doc__, takes=(PREFIX,))


if __name__ == "__main__":
  run()
