"""Lists the checkpoints of a run, verifies them, and tells two apart; it never changes them.

jaxmoe checkpoints --workdir=runs/tiny [--step=N] [--verify]
jaxmoe checkpoints --workdir=runs/tiny [--step=N] --diff=runs/other [--other_step=N]

It needs no model and takes no accelerator, so a live run is not disturbed; one array at a time is
in memory. --verify reads every array of each whole step, or of one; --diff compares the newest
whole steps, or those given, and reads only what their digests say differs. The exit code is 1 where
a step is damaged, or where two differ.
"""

from __future__ import annotations

import time

import jax
from absl import flags

from jaxmoe.checkpoint import STORES, open_store
from jaxmoe.checkpoint.directory_store import DirectoryStore
from jaxmoe.checkpoint.orbax_store import quiet_orbax
from jaxmoe.checkpoint.step_difference import differences, record_differences
from jaxmoe.checkpoint.step_listing import WHOLE, ListedStep, list_steps
from jaxmoe.checkpoint.step_reader import StepReader
from jaxmoe.commands.process import command_line
from jaxmoe.core.errors import CheckpointError, InputError
from jaxmoe.status.checkpoint_lines import difference_line, step_lines

FLAGS = flags.FlagValues()
flags.DEFINE_string("workdir", None, "The run, or its checkpoints.", flag_values=FLAGS)
flags.DEFINE_bool("verify", False, "Reads every array.", flag_values=FLAGS)
flags.DEFINE_string("diff", None, "Another run, or the same.", flag_values=FLAGS)
flags.DEFINE_integer("step", None, "Of --workdir; the newest by default.", 0, flag_values=FLAGS)
flags.DEFINE_integer("other_step", None, "Of --diff.", 0, flag_values=FLAGS)


def main(arguments: list[str]) -> int:
  """Runs the command; returns the exit code."""
  del arguments
  if not FLAGS.workdir:
    raise InputError("--workdir is missing; give the folder of the run, such as --workdir=runs/a")
  if FLAGS.other_step is not None and FLAGS.diff is None:
    raise InputError("--other_step is a step of --diff, which is missing; give the other run")
  if FLAGS.diff is not None and FLAGS.verify:
    raise InputError("--verify and --diff are two commands; give one of them")
  jax.config.update("jax_platforms", "cpu")
  quiet_orbax()
  store, steps = _steps_of(FLAGS.workdir)
  if FLAGS.diff is not None:
    other, others = _steps_of(FLAGS.diff)
    return _told_apart(
      store.open_step(_whole(store, steps, FLAGS.step)[-1].step),
      other.open_step(_whole(other, others, FLAGS.other_step)[-1].step),
    )
  if FLAGS.verify:
    return max(_verified(store, one) for one in _whole(store, steps, FLAGS.step))
  chosen = steps if FLAGS.step is None else _whole(store, steps, FLAGS.step)
  print(f"{store}, of the store {_kind(store)}:")
  print("\n".join(step_lines(chosen, time.time())))
  return 0


def _steps_of(path: str) -> tuple[DirectoryStore, list[ListedStep]]:
  store = open_store(path)
  assert isinstance(store, DirectoryStore)
  steps = list_steps(store)
  if not steps:
    raise InputError(f"{store}: holds no checkpoint; give the folder of a run that has some")
  return store, steps


def _whole(store: DirectoryStore, steps: list[ListedStep], asked: int | None) -> list[ListedStep]:
  """Returns the whole steps, or the one that is asked for.

  Raises:
    InputError: there is none.
  """
  whole = [one for one in steps if one.state == WHOLE]
  found = [one for one in whole if asked in (None, one.step)]
  if not found:
    there = ", ".join(str(one.step) for one in whole) or "none"
    raise InputError(f"{store}: step {asked or 'asked for'} is not there; whole steps: {there}")
  return found


def _verified(store: DirectoryStore, listed: ListedStep) -> int:
  """Says whether a step is as it was written; returns the exit code."""
  try:
    reader = store.open_step(listed.step)
  except CheckpointError as error:
    print(f"step {listed.step}: {error}")
    return 1
  wrong = 0
  for name in reader.manifest.arrays:
    try:
      reader.read(name)
    except CheckpointError as error:
      print(f"step {listed.step}: {error}", flush=True)
      wrong += 1
  total = len(reader.manifest.arrays)
  if wrong:
    print(f"step {listed.step}: {wrong} of {total} arrays are not as they were written")
    return 1
  print(f"step {listed.step}: all {total} arrays are as they were written", flush=True)
  return 0


def _told_apart(one: StepReader, other: StepReader) -> int:
  """Says how two steps differ; returns the exit code."""
  print(f"{one.where}\n{other.where}")
  number = 0
  for found in differences(one, other):
    print(difference_line(found), flush=True)
    number += 1
  records = record_differences(one.manifest.record, other.manifest.record)
  for path in records:
    print(f"record: {path}")
  total = len({*one.manifest.arrays, *other.manifest.arrays})
  print(f"{number} of {total} arrays differ, and {len(records)} places of the records")
  return 1 if number or records else 0


def _kind(store: DirectoryStore) -> str:
  return next(name for name, (kind, _) in STORES.items() if type(store) is kind)


def run() -> None:
  """Runs the command as this process does, and exits."""
  command_line.run(main, FLAGS, __doc__)


if __name__ == "__main__":
  run()
