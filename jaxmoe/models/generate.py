"""Writing text with a cache: one pass over the prompts, then a token at a time.

A row's tokens depend on its prompt, the seed and its number. Only a dispatcher that drops
(capacity) makes them depend on the other rows too.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxmoe.core.errors import InputError, NotFiniteError
from jaxmoe.core.rng import Keys
from jaxmoe.core.tokens import Tokens
from jaxmoe.models.transformer import Decoder, Params

_BUCKET = 32  # prompts and caches are padded to multiples of this, so that few sizes compile


@dataclasses.dataclass(frozen=True)
class Sampling:
  """How the next token is drawn.

  Attributes:
    max_tokens: The most tokens a row gets.
    temperature: Divides the logits; 0 takes the likeliest token.
    top_p: Draws from the smallest set of tokens that holds this much probability (Holtzman et al.
      2020, equation 2).
    seed: Of the draws.
  """

  max_tokens: int = 128
  temperature: float = 0.8
  top_p: float = 0.95
  seed: int = 0

  def __post_init__(self) -> None:
    if self.max_tokens < 1:
      raise InputError(f"max_tokens must be at least 1: max_tokens={self.max_tokens}")
    if not 0 <= self.temperature < float("inf"):
      raise InputError(
        f"temperature must be 0 or above and finite: temperature={self.temperature}"
      )
    if not 0 < self.top_p <= 1:
      raise InputError(f"top_p must lie in (0, 1]: top_p={self.top_p}")
    if not 0 <= self.seed < 2**32:
      raise InputError(f"seed must lie in [0, 2**32): seed={self.seed}")


def generate(
  decoder: Decoder,
  params: Params,
  prompts: Sequence[np.ndarray],
  sampling: Sampling,
  limits: tuple[int, int | frozenset[int]],
  emit: Callable[[int, int], None] = lambda row, token: None,
) -> list[list[int]]:
  """Returns the new token ids of each prompt, without the end of document.

  Args:
    decoder: The model.
    params: Its parameters.
    prompts: Ids of each prompt, at least one each, each starting with the end of document id.
    sampling: How tokens are drawn.
    limits: (context length in tokens, id of the end of document, or of all that end a row). A row
      ends at either.
    emit: Called with (row, id) as soon as a token is known.

  Raises:
    InputError: no prompt, an empty one, or one that leaves no room in the context.
    NotFiniteError: the model's logits are not finite.
  """
  context, ends = limits
  ends = frozenset([ends]) if isinstance(ends, int) else ends
  if not prompts:
    raise InputError("there is no prompt to continue; give at least one")
  lengths = np.array([len(prompt) for prompt in prompts])
  longest = int(lengths.max())
  for row, length in enumerate(lengths.tolist()):
    if not 0 < length < context:
      raise InputError(
        f"prompt {row} has {length} tokens; a prompt needs 1 to {context - 1} "
        f"(the context is {context} tokens)"
      )
  slots = _round_up(longest + sampling.max_tokens, context)
  draw = functools.partial(_draw, decoder, sampling.temperature == 0)
  # Logits over less than this overflow float32, and what is drawn would not change any more.
  temperature, top_p = jnp.float32(max(sampling.temperature, 1e-6)), jnp.float32(sampling.top_p)
  chance = _Chance(temperature, top_p, Keys.from_seed(sampling.seed)("sample"))
  caches = decoder.empty_caches(len(prompts), slots)
  tokens = _prompt_tokens(prompts, lengths, _round_up(longest, context))
  ids_B, finite, caches = draw(params, tokens, caches, lengths - 1, chance)
  rows: list[list[int]] = [[] for _ in prompts]
  alive = np.ones(len(prompts), bool)
  for written in range(sampling.max_tokens):
    if not bool(finite):
      raise NotFiniteError("the model's logits are not finite; was its training stopped in time?")
    for row in np.flatnonzero(alive).tolist():
      token = int(ids_B[row])
      alive[row] = token not in ends
      if alive[row]:
        rows[row].append(token)
        emit(row, token)
    slot_B = lengths + written
    alive &= slot_B < context
    if not alive.any() or written + 1 == sampling.max_tokens:
      break
    tokens = _next_tokens(ids_B, slot_B, alive)
    ids_B, finite, caches = draw(params, tokens, caches, np.zeros_like(lengths), chance)
  return rows


def lower_draw(decoder: Decoder, rows: int, new: int, slots: int) -> jax.stages.Lowered:
  """Returns the program that reads `new` tokens of each row and draws the likeliest next one.

  It is lowered from shapes alone; `slots` is the room that prompt and continuation need.
  """
  padded = 1 if new == 1 else _round_up(new, slots)
  rows_BL: Any = jax.ShapeDtypeStruct((rows, padded), jnp.int32)
  caches = jax.eval_shape(lambda: decoder.empty_caches(rows, _round_up(slots, slots + _BUCKET)))
  scalar: Any = jax.ShapeDtypeStruct((), jnp.float32)
  chance = _Chance(scalar, scalar, jax.eval_shape(lambda: Keys.from_seed(0).root))
  last_B = jax.ShapeDtypeStruct((rows,), jnp.int32)
  tokens = Tokens(rows_BL, rows_BL, rows_BL, rows_BL)
  return _draw.lower(decoder, True, decoder.shapes, tokens, caches, last_B, chance)


class _Chance(NamedTuple):
  """What a draw depends on besides logits: the key of all draws is `root`."""

  temperature: jax.Array
  top_p: jax.Array
  root: jax.Array


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=4)
def _draw(
  decoder: Decoder,
  greedy: bool,
  params: Params,
  tokens: Tokens,
  caches: Any,
  last_B: jax.Array,
  chance: _Chance,
) -> tuple[jax.Array, jax.Array, Any]:
  """Returns the next id of each row, whether all logits are finite, and the caches."""
  hidden_BLD, caches, _ = decoder.hidden(params, tokens, caches)
  rows_B = jnp.arange(last_B.shape[0])
  logits_BV = decoder.logits(params, hidden_BLD[rows_B, last_B][:, None])[:, 0]
  slot_B = tokens.slot[rows_B, last_B]
  alive_B = tokens.valid[rows_B, last_B]
  finite = jnp.all(jnp.isfinite(logits_BV) | ~alive_B[:, None])
  if greedy:
    return jnp.argmax(logits_BV, axis=-1), finite, caches

  def of_row(row: jax.Array, slot: jax.Array, logits_V: jax.Array) -> jax.Array:
    key = Keys(chance.root).at(row).at(slot)("draw")
    return jax.random.categorical(key, nucleus(logits_V / chance.temperature, chance.top_p))

  return jax.vmap(of_row)(rows_B, slot_B, logits_BV), finite, caches


def nucleus(logits_V: jax.Array, top_p: jax.Array) -> jax.Array:
  """Returns the logits with -inf outside the smallest set that holds `top_p` probability."""
  order_V = jnp.argsort(-logits_V)
  sorted_V = jax.nn.softmax(logits_V[order_V])
  # The likeliest token is always in the set: nothing comes before it.
  inside_V = jnp.cumsum(sorted_V) - sorted_V < top_p
  keep_V = jnp.zeros_like(inside_V).at[order_V].set(inside_V)
  return jnp.where(keep_V | (top_p >= 1), logits_V, -jnp.inf)


def _round_up(size: int, limit: int) -> int:
  return min(limit, -(-size // _BUCKET) * _BUCKET)


def _prompt_tokens(prompts: Sequence[np.ndarray], lengths: np.ndarray, padded: int) -> Tokens:
  ids_BL = np.zeros((len(prompts), padded), np.int32)
  for row, prompt in enumerate(prompts):
    ids_BL[row, : len(prompt)] = prompt
  slot_BL = np.broadcast_to(np.arange(ids_BL.shape[1], dtype=np.int32), ids_BL.shape)
  segment_BL = (slot_BL < lengths[:, None]).astype(np.int32)
  slots_BL = jnp.asarray(slot_BL)
  return Tokens(jnp.asarray(ids_BL), slots_BL, jnp.asarray(segment_BL), slots_BL)


def _next_tokens(ids_B: jax.Array, slot_B: np.ndarray, alive: np.ndarray) -> Tokens:
  slot_B1 = jnp.asarray(slot_B, jnp.int32)[:, None]
  segment_B1 = jnp.asarray(alive, jnp.int32)[:, None]
  return Tokens(jnp.asarray(ids_B, jnp.int32)[:, None], slot_B1, segment_B1, slot_B1)
