"""Changes the experts of a trained run and writes a new run, which starts from them at step 0.

jaxmoe surgery --workdir=OLD --out=NEW
  --insert=2 [--like=0,3]    closed experts are added; outputs stay, bit for bit
  --open [--like=0,3]        closed experts are opened to the router
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

from collections.abc import Callable
from typing import Any

import numpy as np
from absl import flags

from jaxmoe.adapt import Surgery, Variety, clone, insert, open_closed, prune, upcycle
from jaxmoe.commands.process import command_line, jax_settings, run_flags
from jaxmoe.commands.process.command_line import follow_up, say
from jaxmoe.core.errors import InputError
from jaxmoe.data.corpus import Corpus, open_corpus
from jaxmoe.models.transformer import TransformerConfig
from jaxmoe.moe.layer import MoEConfig
from jaxmoe.runs import derived_run
from jaxmoe.runs.recipe_loading import PREFIX
from jaxmoe.train.expert_counts import (
  ExpertCounts,
  count_experts,
  held_out_batches,
  read_expert_counts,
)
from jaxmoe.train.run_store import need_store

FLAGS = flags.FlagValues()
flags.DEFINE_string("workdir", None, "The run whose model is changed.", flag_values=FLAGS)
flags.DEFINE_string("out", None, "The folder of the new run; must not exist.", flag_values=FLAGS)
flags.DEFINE_string("config", None, "A recipe for all but the model.", flag_values=FLAGS)
flags.DEFINE_integer("insert", None, "Closed experts to add a layer.", flag_values=FLAGS)
flags.DEFINE_bool("open", False, "Opens the closed experts.", flag_values=FLAGS)
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
  operate = operation(name)
  if FLAGS.drop and not FLAGS.reset_moments:
    raise InputError("--drop: hidden units drawn anew have no moments; set --reset_moments")
  workdir = run_flags.need_workdir(FLAGS.workdir)
  old = workdir.experiment()
  store = need_store(workdir)
  jax_settings.set_up_jax()
  counting = name == "prune_to" and not FLAGS.usage
  # Until choices are counted any usage tells what the new model is.
  surgery = operate(usage_of_none(old.model) if counting else read_given(name), old.model)
  new = derived_run.new_experiment(old, surgery, FLAGS.config, overrides)
  out = derived_run.check_out(FLAGS.out, new)
  derived_run.check_moments(old, new, FLAGS.reset_moments)
  corpus = open_corpus(new.data, jax_settings.cache_dir() / "tokenizers", progress=say)
  source = derived_run.read_source(workdir, store, corpus, run_flags.complain)
  if counting:
    surgery = operate(count(source, corpus), old.model)
  event_fields = {
    "operation": name,
    "flags": {flag: FLAGS[flag].value for flag in (name, *given(name))},
  }
  derived_run.write_run(out, source, surgery, new, corpus, event_fields, FLAGS.reset_moments)
  print(
    f"wrote {out}: step {source.step} of {workdir.path} after {name}; moments "
    f"{'start anew' if FLAGS.reset_moments else 'followed'}"
  )
  say(f"  go on:  {follow_up('train', f'--config={out}/config.json', f'--workdir={out}')}")
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
  if names[0] == "prune_to":
    if (FLAGS.usage is None) == (FLAGS.count_on is None):
      raise InputError("--prune_to needs one of --usage=FILE and --count_on=BATCHES")
    if FLAGS.held_out and FLAGS.usage:
      raise InputError("--held_out goes with --count_on; --usage has counts already")
  return names[0]


def given(name: str) -> list[str]:
  """Returns the flags beside an operation that were given."""
  return [flag for flag in OPERATIONS[name] if FLAGS[flag].value]


def operation(name: str) -> Callable[[Any, TransformerConfig], Surgery]:
  """Returns a function (usage, model) -> Surgery; usage is None where none is needed."""
  like = [number(text) for text in FLAGS.like]
  functions = {
    "insert": lambda usage, model: insert(model, FLAGS.insert, like),
    "open": lambda usage, model: open_closed(model, like),
    "prune_to": lambda usage, model: prune(model, usage, FLAGS.prune_to),
    "clone": lambda usage, model: clone(model, FLAGS.clone),
    "upcycle": lambda usage, model: upcycle(
      model, MoEConfig(FLAGS.upcycle, FLAGS.active or 2), Variety(FLAGS.noise, FLAGS.drop)
    ),
  }
  return functions[name]


def number(text: str) -> int:
  """Returns the expert that an item of --like names.

  Raises:
    InputError: it is no whole number.
  """
  try:
    return int(text)
  except ValueError:
    raise InputError(f"--like: expected numbers such as 0,3, got {text!r}") from None


def read_given(name: str) -> ExpertCounts | None:
  """Returns what --usage holds, None for an operation without usage."""
  return read_expert_counts(FLAGS.usage) if name == "prune_to" else None


def usage_of_none(model: TransformerConfig) -> ExpertCounts:
  """Returns zeros for every expert of every MoE layer."""
  return [np.zeros(ffn.num_routable) for ffn in model.ffns if isinstance(ffn, MoEConfig)]


def count(source: derived_run.LoadedState, corpus: Corpus) -> ExpertCounts:
  """Returns how often each expert is chosen on the batches asked for."""
  train = source.experiment.train
  if FLAGS.held_out:
    batches = held_out_batches(corpus, (train.batch_size, corpus.data.seq_len))
  else:
    batches = corpus.stream(train.batch_size, train.seed)
  some = [batch for _, batch in zip(range(FLAGS.count_on), batches)]
  return count_experts(source.decoder, source.state.params, some)


def run() -> None:
  """Runs the command as this process does, and exits."""
  command_line.run(main, FLAGS, __doc__, takes=(PREFIX,))


if __name__ == "__main__":
  run()
