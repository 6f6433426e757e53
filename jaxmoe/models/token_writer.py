"""Rows that are written: caches, and the programs that read prompts into them and write on.

A prompt is read in chunks, and the head makes logits of its last token alone. Then a dispatch
writes several tokens of each row, in a loop on the device that ends where all rows have. Layers
stand apart in memory, and caches are written in place.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxmoe.core.kept_programs import Compiler, Program
from jaxmoe.core.tokens import Tokens
from jaxmoe.models.next_token import Chance, draw
from jaxmoe.models.transformer import Decoder, Params

_BUCKET = 32  # prompts and caches are padded to multiples of this, so that few sizes compile
_CHUNK = 512  # tokens of a row that are read at once
_MOST = 32  # tokens of a row that a dispatch writes
_PATIENCE_S = 0.1  # how long a reader may wait for more text than a token


class TokenWriter:
  """Writes tokens after prompts.

  Args:
    decoder: The model.
    params: Its parameters, as they are stored.
    room: (slots of a row, padded; slots it may use).
    ends: Ids that end a row.
    chance: How tokens are drawn.
    greedy: Whether they are not, and the likeliest is taken.
    compiler: Where programs come from, if they are to be kept from process to process.
  """

  def __init__(
    self,
    decoder: Decoder,
    params: Params,
    room: tuple[int, int],
    ends: frozenset[int],
    chance: Chance,
    greedy: bool,
    compiler: Compiler | None = None,
  ):
    self._decoder, self._greedy, self._compiler = decoder, greedy, compiler
    self._programs: dict[str, Any] = {}
    self._stored, self._slots = params, padded(*room)
    self._params: Params = {}
    self._rules = _Rules(chance, np.array(sorted(ends), np.int32), np.int32(room[1]))
    self._number = 1
    self._caches: Any = None
    self._rows: _Rows | None = None

  def read(self, prompts: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Returns the first id of each row, (1, B), and whether all logits were finite, (1,)."""
    decoder, lengths = self._decoder, np.array([len(prompt) for prompt in prompts], np.int32)
    longest = int(lengths.max())
    # Chunks are of one size: another would be another program.
    width = padded(longest, self._slots) if longest <= _CHUNK else _CHUNK
    starts = range(0, longest, width)
    whole = _prompt_tokens(prompts, lengths, len(starts) * width)
    chunks = [_cut(whole, start, width) for start in starts]
    wanted: Any = lengths - 1, np.zeros((len(prompts), decoder.config.dim), decoder.dtype)
    self._params, caches = self._run(_begin, (len(prompts), self._slots), self._stored)
    for tokens in chunks[:-1]:
      wanted, caches = self._run(_read, (), self._params, tokens, caches, wanted, donate=2)
    given = self._params, chunks[-1], caches, wanted, self._rules
    self._rows, finite, self._caches = self._run(_read_last, (self._greedy,), *given, donate=2)
    return np.asarray(self._rows.id_B)[None], np.asarray(finite)[None]

  def write(self, most: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns the next ids, (some number, B), at most so many, and whether logits were finite.

    The number grows for as long as a dispatch takes a moment, so that text still streams.
    """
    begin, number = time.perf_counter(), min(most, self._number)
    given = self._params, self._caches, self._rows, np.int32(number), self._rules
    state, *found = self._run(_write, (self._greedy,), *given, donate=1)
    self._rows, self._caches = state
    done, ids_NB, finite_N = map(np.asarray, found)
    took = time.perf_counter() - begin
    if took < _PATIENCE_S and number == self._number:
      self._number = min(2 * number, _MOST)
    elif took > 2 * _PATIENCE_S:
      self._number = max(1, number // 2)
    return ids_NB[:done], finite_N[:done]

  def _run(
    self, function: Any, fixed: tuple[int, ...], *args: Any, donate: int | None = None
  ) -> Any:
    """Runs a jitted function of this module, or the program that is kept of it.

    Args:
      function: Takes the decoder and what is fixed first.
      fixed: What a program is made for; a writer makes one program for each.
      *args: The others.
      donate: The number among them of the one that is used up.
    """
    if self._compiler is None:
      return function(self._decoder, *fixed, *args)
    name = "_".join([function.__name__.strip("_"), *(str(int(each)) for each in fixed)])
    if name not in self._programs:
      traced = functools.partial(function.__wrapped__, self._decoder, *fixed)
      program = Program(name, traced, () if donate is None else (donate,))
      self._programs[name] = self._compiler(program, *args)
    return self._programs[name](*args)


def padded(size: int, limit: int) -> int:
  """Returns a size that few others share, at most `limit`."""
  return min(limit, -(-size // _BUCKET) * _BUCKET)


def lower_draw(decoder: Decoder, rows: int, new: int, slots: int) -> jax.stages.Lowered:
  """Returns the program that reads `new` tokens of each row and draws the likeliest next one.

  Of one token it is the loop that writes on, whose length is not known before it runs. It is
  lowered from shapes alone; `slots` is the room that prompt and continuation need.
  """
  shape = lambda shape, dtype: jax.ShapeDtypeStruct(shape, dtype)  # noqa: E731
  caches = jax.eval_shape(lambda: decoder.caches_apart(rows, padded(slots, slots + _BUCKET)))
  params = jax.eval_shape(decoder.apart, decoder.shapes)
  ids_B: Any = shape((rows,), jnp.int32)
  rules: Any = jax.eval_shape(
    lambda: _Rules(Chance.of(0.0, 1.0, 0), np.zeros(1, np.int32), np.int32(0))
  )
  if new == 1:
    alive_B: Any = shape((rows,), bool)
    state = _Rows(ids_B, ids_B, alive_B)
    return _write.lower(decoder, True, params, caches, state, shape((), jnp.int32), rules)
  ids_BL: Any = shape((rows, padded(new, slots)), jnp.int32)
  tokens = Tokens(ids_BL, ids_BL, ids_BL, ids_BL)
  wanted = ids_B, shape((rows, decoder.config.dim), decoder.dtype)
  return _read_last.lower(decoder, True, params, tokens, caches, wanted, rules)


class _Rows(NamedTuple):
  """Rows as they go on.

  Attributes:
    id_B: The newest id of each.
    slot_B: The slot of that one, which is not in the cache yet.
    alive_B: Whether it is read, and more follows.
  """

  id_B: jax.Array
  slot_B: jax.Array
  alive_B: jax.Array


class _Rules(NamedTuple):
  """How ids are drawn, and where rows end: at one of these ids, and with the last slot."""

  chance: Chance
  ends_E: Any
  slots: Any

  def rows(self, id_B: jax.Array, slot_B: jax.Array, alive_B: jax.Array) -> _Rows:
    """Returns rows with new ids, of which some have ended."""
    ended_B = jnp.any(id_B[:, None] == self.ends_E[None], axis=1) | (slot_B >= self.slots)
    return _Rows(id_B, slot_B, alive_B & ~ended_B)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _begin(decoder: Decoder, batch: int, slots: int, params: Params) -> tuple[Params, Any]:
  return decoder.apart(params), decoder.caches_apart(batch, slots)


def _stream(
  decoder: Decoder, params: Params, tokens: Tokens, caches: Any, wanted: tuple[jax.Array, jax.Array]
) -> tuple[tuple[jax.Array, jax.Array], Any]:
  """Reads a chunk; returns the last slots of rows, the stream there once it is read, and caches."""
  last_B, wanted_BD = wanted
  hidden_BLD, caches, _ = decoder.hidden(params, tokens, caches)
  at_B = last_B - tokens.slot[:, 0]
  here_B = (at_B >= 0) & (at_B < hidden_BLD.shape[1])
  found_BD = hidden_BLD[jnp.arange(at_B.size), jnp.clip(at_B, 0, hidden_BLD.shape[1] - 1)]
  return (last_B, jnp.where(here_B[:, None], found_BD, wanted_BD)), caches


_read = jax.jit(_stream, static_argnums=0, donate_argnums=3)


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=4)
def _read_last(
  decoder: Decoder,
  greedy: bool,
  params: Params,
  tokens: Tokens,
  caches: Any,
  wanted: tuple[jax.Array, jax.Array],
  rules: _Rules,
) -> tuple[_Rows, jax.Array, Any]:
  """Reads the last chunk and draws; returns rows, whether logits are finite, and the caches."""
  (last_B, wanted_BD), caches = _stream(decoder, params, tokens, caches, wanted)
  logits_BV = decoder.logits(params, wanted_BD[:, None])[:, 0]
  alive_B = jnp.ones(last_B.shape, bool)
  id_B, finite = draw(logits_BV, last_B, alive_B, rules.chance.rooted(), greedy)
  return rules.rows(id_B, last_B + 1, alive_B), finite, caches


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=3)
def _write(
  decoder: Decoder,
  greedy: bool,
  params: Params,
  caches: Any,
  rows: _Rows,
  number: jax.Array,
  rules: _Rules,
) -> Any:
  """Writes up to `number` tokens of each row.

  Returns:
    Rows and caches, how many tokens were written, their ids (_MOST, B), and whether their logits
    were finite.
  """

  def goes_on(carry: Any) -> jax.Array:
    (rows, _), at, *_ = carry
    return (at < number) & jnp.any(rows.alive_B)

  def step(carry: Any) -> Any:
    (rows, caches), at, ids_NB, finite_N = carry
    rows, finite, caches = _next(decoder, greedy, params, caches, rows, rules)
    return (rows, caches), at + 1, ids_NB.at[at].set(rows.id_B), finite_N.at[at].set(finite)

  rules = rules._replace(chance=rules.chance.rooted())
  none = jnp.zeros((_MOST, rows.id_B.size), jnp.int32)
  carry = (rows, caches), jnp.int32(0), none, jnp.ones(_MOST, bool)
  return jax.lax.while_loop(goes_on, step, carry)


def _next(
  decoder: Decoder, greedy: bool, params: Params, caches: Any, rows: _Rows, rules: _Rules
) -> tuple[_Rows, jax.Array, Any]:
  """Reads the newest token of each row and draws the next one."""
  slot_B1 = rows.slot_B[:, None]
  segment_B1 = rows.alive_B[:, None].astype(jnp.int32)
  tokens = Tokens(rows.id_B[:, None], slot_B1, segment_B1, slot_B1)
  hidden_B1D, caches, _ = decoder.hidden(params, tokens, caches)
  logits_BV = decoder.logits(params, hidden_B1D)[:, 0]
  id_B, finite = draw(logits_BV, rows.slot_B, rows.alive_B, rules.chance, greedy)
  return rules.rows(id_B, rows.slot_B + 1, rows.alive_B), finite, caches


def _cut(tokens: Tokens, start: int, width: int) -> Tokens:
  return jax.tree.map(lambda x_BL: x_BL[:, start : start + width], tokens)


def _prompt_tokens(prompts: Sequence[np.ndarray], lengths: np.ndarray, width: int) -> Tokens:
  """Returns prompts, each a document from slot 0, padded to `width`; of NumPy."""
  ids_BL = np.zeros((len(prompts), width), np.int32)
  for row, prompt in enumerate(prompts):
    ids_BL[row, : len(prompt)] = prompt
  slot_BL = np.broadcast_to(np.arange(width, dtype=np.int32), ids_BL.shape)
  segment_BL = (slot_BL < lengths[:, None]).astype(np.int32)
  return Tokens(ids_BL, slot_BL, segment_BL, slot_BL)  # type: ignore[arg-type]
