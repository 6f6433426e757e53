"""Recorded routing: the experts of every token, in a file that a forward pass replays.

An .npz of plain arrays: `choices` int16 (layers, B, L, A) by depth, best first, -1 where there is
none (all of a dense layer); `model` and `ids`, the SHA-256 of the model's record and of the token
ids; `version`. It is believed only where all of that fits the model and the ids at hand; weights
may be others, so that a step later in training can take the choices of an earlier one.
"""

from __future__ import annotations

import hashlib
import pathlib
from typing import IO, Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxmoe.core.config_io import to_json
from jaxmoe.core.errors import InputError
from jaxmoe.core.param_names import by_layer
from jaxmoe.core.tokens import Tokens
from jaxmoe.models.transformer import Decoder, Params, TransformerConfig
from jaxmoe.moe.layer import MoEConfig

VERSION = 1


def experts_by_depth(model: TransformerConfig) -> list[int]:
  """Returns how many experts the router of each layer knows, 0 for a dense layer."""
  return [ffn.num_routable if isinstance(ffn, MoEConfig) else 0 for ffn in model.ffns]


def choices_of(decoder: Decoder, params: Params, tokens: Tokens) -> jax.Array:
  """Returns (layers, B, L, A) int16 of tokens with `record`; A is the most choices of a layer."""
  _, _, sums = decoder.hidden(params, tokens)
  routings = {depth: of.routing for depth, of in by_layer(sums, decoder.layer_groups).items()}
  width = max(routing.expert_TA.shape[1] for routing in routings.values())
  layers = [jnp.full((*tokens.id.shape, width), -1, jnp.int16)] * decoder.config.num_layers
  for depth, routing in routings.items():
    chosen_TA = jnp.where(routing.valid_TA, routing.expert_TA, -1).astype(jnp.int16)
    padding = ((0, 0), (0, width - chosen_TA.shape[1]))
    layers[depth] = jnp.pad(chosen_TA, padding, constant_values=-1).reshape(layers[depth].shape)
  return jnp.stack(layers)


def write_routing(
  file: IO[bytes] | pathlib.Path, choices: np.ndarray, labels: dict[str, str]
) -> None:
  """Writes choices and `digests_of` their model and ids."""
  np.savez_compressed(file, choices=choices, version=np.int64(VERSION), **labels)  # type: ignore[arg-type]


def digests_of(model: TransformerConfig, vocab_size: int, ids_BL: np.ndarray) -> dict[str, str]:
  """Returns the SHA-256 of a model's record and of token ids."""
  ids = repr(ids_BL.shape).encode() + np.ascontiguousarray(ids_BL, "<i4").tobytes()
  text = f"{vocab_size} {to_json(model)}".encode()
  return {"model": hashlib.sha256(text).hexdigest(), "ids": hashlib.sha256(ids).hexdigest()}


def read_routing(
  path: str, where: str, model: TransformerConfig, vocab_size: int, ids_BL: np.ndarray
) -> np.ndarray:
  """Returns the choices of a file, int16 (layers, B, L, A).

  Raises:
    InputError: it cannot be read, is damaged, of another model or of other ids, or names experts
      that a layer does not have or one twice for a token.
  """
  content = _read(path, where)
  labels = digests_of(model, vocab_size, ids_BL)
  for name, what in (("model", "another model"), ("ids", "other token ids")):
    if str(content[name]) != labels[name]:
      raise InputError(f"{where}: was recorded with {what}; record these ids with this model")
  check_choices(content["choices"], model, ids_BL, where)
  return content["choices"]


def check_choices(
  choices: np.ndarray, model: TransformerConfig, ids_BL: np.ndarray, where: str
) -> None:
  """Returns if choices can be taken by a model for ids.

  Raises:
    InputError: another shape or dtype, or experts that a layer does not have or one twice for a
      token.
  """
  experts = experts_by_depth(model)
  shape, most = (len(experts), *ids_BL.shape), max(experts)
  if choices.dtype != np.int16 or choices.shape[:-1] != shape or not 1 <= choices.shape[-1] <= most:
    raise InputError(
      f"{where}: choices must be int16 {(*shape, f'1 to {most}')}, not {choices.dtype} "
      f"{choices.shape}; record again"
    )
  for depth, of_layer in enumerate(choices):
    _check_layer(of_layer, experts[depth], f"{where}: layer {depth}")


def _check_layer(choices_BLA: np.ndarray, num_experts: int, where: str) -> None:
  """Refuses ids outside of a layer's and choices of one expert twice."""
  low, high = choices_BLA.min(), choices_BLA.max()
  if low < -1 or high >= num_experts:
    bad = low if low < -1 else high
    raise InputError(f"{where} has {num_experts} experts, not one called {bad}; record again")
  ranked = np.sort(choices_BLA, axis=-1)
  if np.any((ranked[..., 1:] == ranked[..., :-1]) & (ranked[..., 1:] >= 0)):
    raise InputError(f"{where} sends a token to one expert twice; record again")


def _read(path: str, where: str) -> dict[str, Any]:
  """Returns the arrays of a file of this version."""
  try:
    with open(path, "rb") as file:
      loaded = np.load(file, allow_pickle=False)
      content = dict(loaded) if isinstance(loaded, np.lib.npyio.NpzFile) else {}
  except OSError as error:
    raise InputError(f"{where}: cannot be read ({error.strerror}); give an .npz") from None
  except Exception as error:  # NumPy and zipfile raise whatever their parsers raise
    reason = " ".join(str(error).split())
    raise InputError(f"{where}: is damaged or no .npz ({reason}); record again") from None
  fields = {"choices", "model", "ids", "version"}
  if content.keys() != fields or content["version"] != VERSION or content["choices"].ndim != 4:
    raise InputError(f"{where}: holds no routing of this version; write it with --record_routing")
  return content
