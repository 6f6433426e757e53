"""Scores of token ids: log probabilities, logits, and which experts every token goes to.

Choices that were recorded can be taken again, whatever the routers say: the same weights give the
same scores, bit for bit, because both come from one compiled program.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from jaxmoe.core.errors import InputError
from jaxmoe.core.tokens import Tokens
from jaxmoe.models.transformer import Decoder, Params
from jaxmoe.runs.run_loading import LoadedRun
from jaxmoe.train.routing_record import choices_of


@dataclasses.dataclass(frozen=True)
class Scores:
  """Scores of ids (B, L).

  Attributes:
    logprobs: Float32 (B, L-1), in nats, of each next id.
    logits: (B, L, V), where asked for.
    routing: The experts of each token, int16 (layers, B, L, A) by depth, best first, -1 where there
      is none; where it was asked for or given.
  """

  logprobs: np.ndarray
  logits: np.ndarray | None = None
  routing: np.ndarray | None = None


def score_ids(
  run: LoadedRun,
  ids_BL: np.ndarray,
  routing: np.ndarray | None = None,
  return_routing: bool = False,
  return_logits: bool = False,
) -> Scores:
  """Returns the scores of checked ids; rows are scored one by one, as they are given.

  Args:
    run: The run.
    ids_BL: Int32.
    routing: Checked choices to take in place of the routers' own.
    return_routing: Whether the choices are returned, and taken from their record.
    return_logits: Whether logits are.
  """
  if return_routing and routing is None:
    each = [np.asarray(route(run.decoder, run.params, row[None])) for row in ids_BL]
    routing = np.concatenate(each, axis=1)
  rows = [
    score(
      run.decoder, return_logits, run.params, row[None],
      None if routing is None else routing[:, index : index + 1],
    )
    for index, row in enumerate(ids_BL)
  ]  # fmt: skip
  logprobs = np.concatenate([np.asarray(row[0]) for row in rows])
  logits = np.concatenate([np.asarray(row[1]) for row in rows]) if return_logits else None
  return Scores(logprobs, logits, routing)


def check_ids(ids: np.ndarray, vocab_size: int, context: int, where: str) -> None:
  """Returns if ids can be scored.

  Raises:
    InputError: another dtype or rank, no or too many ids in a row, or an id outside the vocabulary.
  """
  if ids.dtype != np.int32 or ids.ndim != 2:
    raise InputError(f"{where}: needs an int32 array (B, L), got {ids.dtype} {ids.shape}")
  if ids.shape[0] < 1 or not 2 <= ids.shape[1] <= context:
    raise InputError(
      f"{where}: needs at least one row of 2 to {context} ids (the context), got {ids.shape}"
    )
  if ids.min() < 0 or ids.max() >= vocab_size:
    bad = ids.min() if ids.min() < 0 else ids.max()
    raise InputError(f"{where}: id {bad} is outside the vocabulary of {vocab_size}")


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
