"""Scores given token ids: the log probability of each next id.

jaxmoe score --workdir=runs/tiny --ids=ids.npy --out=scores.npz [--logits]
  [--record_routing=FILE.npz | --replay_routing=FILE.npz]

ids.npy holds int32 (B, L); scores.npz gets float32 `logprobs` (B, L-1), in nats, of each next id,
and with --logits `logits` (B, L, V). --record_routing writes which experts every token went to, and
--replay_routing sends tokens there again, whatever the routers say: the same weights give the same
scores, bit for bit, because both come from one compiled program.
"""

from __future__ import annotations

import os
import pathlib
from collections.abc import Sequence
from typing import IO

import numpy as np
from absl import flags

from jaxmoe.commands.process import command_line, run_flags
from jaxmoe.core.errors import InputError
from jaxmoe.core.output import check_output, write_output
from jaxmoe.models.transformer import TransformerConfig
from jaxmoe.runs.ids_file import read_ids
from jaxmoe.runs.scoring import score_ids
from jaxmoe.train.routing_record import (
  digests_of,
  experts_by_depth,
  read_routing,
  write_routing,
)

FLAGS = flags.FlagValues()
flags.DEFINE_string("workdir", None, "The run whose model scores.", flag_values=FLAGS)
flags.DEFINE_string("ids", None, "An .npy of int32 (B, L).", flag_values=FLAGS)
flags.DEFINE_string("out", None, "The .npz to write.", flag_values=FLAGS)
flags.DEFINE_bool("logits", False, "Also write logits (B, L, V).", flag_values=FLAGS)
flags.DEFINE_string("record_routing", None, "The .npz to write choices to.", flag_values=FLAGS)
flags.DEFINE_string("replay_routing", None, "An .npz of choices to take.", flag_values=FLAGS)


def main(arguments: list[str]) -> int:
  """Runs the command; returns the exit code."""
  del arguments
  if not FLAGS.ids or not FLAGS.out:
    raise InputError("--ids and --out are needed: an .npy to read and an .npz to write")
  workdir = run_flags.need_workdir(FLAGS.workdir)
  check_outputs(workdir.needed)
  experiment = workdir.experiment()
  vocab_size = experiment.data.tokenizer.vocab_size
  context = experiment.data.seq_len
  ids_BL = read_ids(FLAGS.ids, vocab_size, context, f"--ids={FLAGS.ids}")
  given = check_routing(experiment.model, vocab_size, ids_BL)
  run = run_flags.load_run(FLAGS.workdir)
  recorded = bool(FLAGS.record_routing)
  found = score_ids(run, ids_BL, given, recorded, FLAGS.logits)
  arrays = {"logprobs": found.logprobs}
  if found.logits is not None:
    arrays["logits"] = found.logits
  write_output(FLAGS.out, f"--out={FLAGS.out}", lambda file: save(file, arrays))
  if recorded and (routing := found.routing) is not None:
    labels = digests_of(experiment.model, vocab_size, ids_BL)
    write_output(
      FLAGS.record_routing, f"--record_routing={FLAGS.record_routing}",
      lambda file: write_routing(file, routing, labels),
    )  # fmt: skip
  shapes = ", ".join(f"{name} {array.shape}" for name, array in arrays.items())
  print(f"wrote {FLAGS.out}: {shapes} at step {run.step}")
  return 0


def save(file: IO[bytes], arrays: dict[str, np.ndarray]) -> None:
  """Writes an .npz."""
  np.savez(file, **arrays)  # type: ignore[arg-type]


def check_outputs(of_run: Sequence[pathlib.Path]) -> None:
  """Returns if all that is asked for can be written.

  Raises:
    InputError: a file is what is read, the other output, or cannot be written; or choices are to be
      recorded that are known.
  """
  record, replay = FLAGS.record_routing, FLAGS.replay_routing
  inputs = [*filter(os.path.isfile, (FLAGS.ids, replay or "")), *of_run]
  check_output(FLAGS.out, f"--out={FLAGS.out}", inputs)
  if not record:
    return
  if replay:
    raise InputError("--record_routing and --replay_routing: give one, replayed choices are known")
  if os.path.realpath(record) == os.path.realpath(FLAGS.out):
    raise InputError(f"--record_routing={record}: is what --out writes; choose another")
  check_output(record, f"--record_routing={record}", inputs)


def check_routing(
  model: TransformerConfig, vocab_size: int, ids_BL: np.ndarray
) -> np.ndarray | None:
  """Returns the checked choices to take, None where routers choose.

  Raises:
    InputError: the model has no experts, or the file does not fit it.
  """
  replay = FLAGS.replay_routing
  if not FLAGS.record_routing and not replay:
    return None
  flag = "replay_routing" if replay else "record_routing"
  if not any(experts_by_depth(model)):
    raise InputError(f"--{flag}: the model has no experts; leave it out")
  if not replay:
    return None
  return read_routing(replay, f"--replay_routing={replay}", model, vocab_size, ids_BL)


def run() -> None:
  """Runs the command as this process does, and exits."""
  command_line.run(main, FLAGS, __doc__)


if __name__ == "__main__":
  run()
