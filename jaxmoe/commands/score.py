"""Scores given token ids: the log probability of each next id.

jaxmoe score --workdir=runs/tiny --ids=ids.npy --out=scores.npz [--logits]
  [--record_routing=FILE.npz | --replay_routing=FILE.npz]

ids.npy holds int32 (B, L); scores.npz gets float32 `logprobs` (B, L-1), in nats, of each next id,
and with --logits `logits` (B, L, V). --record_routing writes which experts every token went to, and
--replay_routing sends tokens there again, whatever the routers say: the same weights give the same
scores, bit for bit, because both come from one compiled program.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import pathlib
from collections.abc import Sequence
from typing import IO

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from jaxmoe.commands.process import command_line, run_flags
from jaxmoe.core.errors import InputError
from jaxmoe.core.output import check_output, write_output
from jaxmoe.core.tokens import Tokens
from jaxmoe.models.transformer import Decoder, Params, TransformerConfig
from jaxmoe.train.routing_record import (
  choices_of,
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
  ids_BL = read_ids(FLAGS.ids, vocab_size, experiment.data.seq_len)
  given = check_routing(experiment.model, vocab_size, ids_BL)
  run = run_flags.load_run(FLAGS.workdir)
  if FLAGS.record_routing:
    each = [np.asarray(route(run.decoder, run.params, row[None])) for row in ids_BL]
    given = np.concatenate(each, axis=1)
  rows = [
    score(
      run.decoder,
      FLAGS.logits,
      run.params,
      row[None],
      None if given is None else given[:, index : index + 1],
    )
    for index, row in enumerate(ids_BL)
  ]
  arrays = {"logprobs": np.concatenate([np.asarray(row[0]) for row in rows])}
  if FLAGS.logits:
    arrays["logits"] = np.concatenate([np.asarray(row[1]) for row in rows])
  write_output(FLAGS.out, f"--out={FLAGS.out}", lambda file: save(file, arrays))
  if FLAGS.record_routing and given is not None:
    labels = digests_of(experiment.model, vocab_size, ids_BL)
    write_output(
      FLAGS.record_routing, f"--record_routing={FLAGS.record_routing}",
      lambda file: write_routing(file, given, labels),
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


def read_ids(path: str, vocab_size: int, context: int) -> np.ndarray:
  """Returns the checked ids of an .npy file.

  Raises:
    InputError: not an .npy, one that needs pickle, another dtype or rank, no or too many ids in a
      row, or an id outside the vocabulary.
  """
  try:
    with open(path, "rb") as file:
      ids = np.load(file, allow_pickle=False)
  except OSError as error:
    raise InputError(f"--ids={path}: cannot be read ({error.strerror}); give an .npy") from None
  except Exception as error:  # NumPy raises whatever its parsers raise
    raise InputError(
      f"--ids={path}: not a plain .npy file ({error}); write it with np.save, without pickle"
    ) from None
  if not isinstance(ids, np.ndarray) or ids.dtype != np.int32 or ids.ndim != 2:
    kind = f"{ids.dtype} {ids.shape}" if isinstance(ids, np.ndarray) else "an archive"
    raise InputError(f"--ids={path}: needs an int32 array (B, L), got {kind}")
  if ids.shape[0] < 1 or not 2 <= ids.shape[1] <= context:
    raise InputError(
      f"--ids={path}: needs at least one row of 2 to {context} ids (the context), got {ids.shape}"
    )
  if ids.min() < 0 or ids.max() >= vocab_size:
    bad = ids.min() if ids.min() < 0 else ids.max()
    raise InputError(f"--ids={path}: id {bad} is outside the vocabulary of {vocab_size}")
  return ids


@functools.partial(jax.jit, static_argnums=(0, 1))
def score(
  decoder: Decoder,
  with_logits: bool,
  params: Params,
  ids_BL: jax.Array,
  given: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array | None]:
  """Returns the log probabilities (B, L-1) of each next id, and the logits (B, L, V) if asked.

  Rows are scored as given: no start of text is put before them. `replayed_experts` are choices to
  take in
  place of the routers' own, (layers, B, L, A).
  """
  given = None if given is None else given.astype(jnp.int32)
  tokens = dataclasses.replace(Tokens.of_ids(ids_BL), replayed_experts=given)
  hidden_BLD, _, _ = decoder.hidden(params, tokens)
  labels_BL = jnp.pad(ids_BL[:, 1:], ((0, 0), (0, 1)), constant_values=-1)
  logprobs = -decoder.nll(params, hidden_BLD, labels_BL)[:, :-1]
  return logprobs, decoder.logits(params, hidden_BLD) if with_logits else None


@functools.partial(jax.jit, static_argnums=0)
def route(decoder: Decoder, params: Params, ids_BL: jax.Array) -> jax.Array:
  """Returns the routers' choices, int16 (layers, B, L, A)."""
  return choices_of(
    decoder, params, dataclasses.replace(Tokens.of_ids(ids_BL), return_routing=True)
  )


def run() -> None:
  """Runs the command as this process does, and exits."""
  command_line.run(main, FLAGS, __doc__)


if __name__ == "__main__":
  run()
