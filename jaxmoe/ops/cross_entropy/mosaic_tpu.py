"""The loss as TPU kernels (Pallas): logits exist in tiles, and are made again on the way back.

Tiles have the vocabulary along sublanes and tokens along lanes, so that what is kept of each token
is a row: the running maximum and sum of its log-sum-exp, and its label's logit. Gradients of hidden
states and of the head are a kernel each; a tile of dlogits is made of the log-sum-exp, and is in
the operands' type, as their products are. Sums are float32.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from jaxmoe.ops.cross_entropy.all_logits import VocabShard
from jaxmoe.ops.tpu_kernel import Interpret, call, dot

_LOWEST = jnp.finfo(jnp.float32).min
_TILE = 2**20  # bytes of a tile of operands
_MEMORY = 2**24  # bytes that a kernel may take unasked


@dataclasses.dataclass(frozen=True)
class LogitTiles:
  """How many tokens and columns a tile has, and where kernels run.

  Attributes:
    tokens: Of a tile; a multiple of 128 on a chip.
    columns: Likewise, of the vocabulary.
    interpret: Whether an interpreter runs kernels, see `tpu_kernel`.
  """

  tokens: int
  columns: int
  interpret: Interpret = False

  @classmethod
  def of(cls, hidden_TD: jax.Array) -> LogitTiles:
    """Returns tiles that fit a chip's memory."""
    fitting = _TILE // (hidden_TD.shape[1] * hidden_TD.dtype.itemsize)
    size = max(128, min(512, fitting // 128 * 128))
    return cls(size, size)


def mosaic_tpu(
  hidden_TD: jax.Array,
  head_weight: Any,
  spec: str,
  labels_T: jax.Array,
  chunk: int,
  part: VocabShard | None = None,
  tiles: LogitTiles | None = None,
) -> tuple[jax.Array, jax.Array]:
  """Returns (nll_T, lse_T) from products in the type of the hidden states, summed in float32."""
  if chunk < 1:
    raise ValueError(f"a chunk holds at least one token: {chunk=}")
  tiles = tiles or LogitTiles.of(hidden_TD)
  weight = head_weight.astype(hidden_TD.dtype)
  tied = spec == "td,vd->tv"
  size = weight.shape[0 if tied else 1]
  first = jax.lax.axis_index(part.axis) * size if part else 0
  columns = jnp.clip(part.vocab_size - first, 0, size) if part else size
  own_T = jnp.where((labels_T >= first) & (labels_T < first + columns), labels_T - first, -1)
  columns_1 = jnp.full((1,), columns, jnp.int32)
  lse_T, right_T = _sums(hidden_TD, weight, own_T, columns_1, tied, tiles)
  known_T = labels_T < (part.vocab_size if part else size)
  if part is not None:
    top_T = jax.lax.pmax(jax.lax.stop_gradient(lse_T), part.axis)
    lse_T = top_T + jnp.log(jax.lax.psum(jnp.exp(lse_T - top_T), part.axis))
    right_T = jax.lax.psum(right_T, part.axis)
  # A label past the vocabulary cannot pass as a low loss.
  nll_T = jnp.where(known_T, lse_T - right_T, jnp.nan)
  scored_T = labels_T >= 0
  return jnp.where(scored_T, nll_T, 0.0), jnp.where(scored_T, lse_T, 0.0)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _sums(
  hidden_TD: jax.Array, weight: jax.Array, labels_T: jax.Array, columns_1: jax.Array, tied: bool,
  tiles: LogitTiles,
) -> tuple[jax.Array, jax.Array]:  # fmt: skip
  """Returns the log-sum-exp of the first columns' logits, and the label's logit or 0, (T,) each."""
  return _forward(hidden_TD, weight, labels_T, columns_1, tied, tiles)[0]


def _forward(
  hidden_TD: Any, weight: Any, labels_T: Any, columns_1: Any, tied: bool, tiles: LogitTiles
) -> Any:
  grid = _Grid(hidden_TD.shape, weight.shape[0 if tied else 1], tied, tiles, tokens_first=True)
  number = jax.ShapeDtypeStruct((1, hidden_TD.shape[0]), jnp.float32)
  lse_1T, right_1T = grid.call(
    _forward_kernel,
    columns_1,
    [(hidden_TD, grid.hidden), (weight, grid.weight), (labels_T[None], grid.numbers)],
    [(number, grid.numbers), (number, grid.numbers)],
    [(1, tiles.tokens), (1, tiles.tokens), (1, tiles.tokens)],
  )
  return (lse_1T[0], right_1T[0]), (hidden_TD, weight, labels_T, columns_1, lse_1T)


@dataclasses.dataclass(frozen=True)
class _Grid:
  """The tiles of tokens and columns: one of them stays while the other passes.

  Attributes:
    hidden_shape: (T, D).
    size: V.
    tied: Whether the head is (V, D), else (D, V).
    tiles: Of what size.
    tokens_first: Whether tokens stay, else columns.
  """

  hidden_shape: tuple[int, ...]
  size: int
  tied: bool
  tiles: LogitTiles
  tokens_first: bool

  @property
  def dims(self) -> tuple[int, int]:
    """How many tiles stay, and pass."""
    tokens, columns = self.hidden_shape[0], self.size
    numbers = pl.cdiv(tokens, self.tiles.tokens), pl.cdiv(columns, self.tiles.columns)
    return numbers if self.tokens_first else numbers[::-1]

  def _at(self, block: Callable[[Any, Any], tuple[Any, ...]]) -> Callable[..., tuple[Any, ...]]:
    """Returns an index map of what `block` says of the numbers of tokens' and columns' tiles."""
    return lambda a, b, *_: block(a, b) if self.tokens_first else block(b, a)

  @property
  def hidden(self) -> pl.BlockSpec:
    """Blocks of (T, D)."""
    return pl.BlockSpec((self.tiles.tokens, self.hidden_shape[1]), self._at(lambda t, v: (t, 0)))

  @property
  def weight(self) -> pl.BlockSpec:
    """Blocks of the head."""
    shape = self.tiles.columns, self.hidden_shape[1]
    if self.tied:
      return pl.BlockSpec(shape, self._at(lambda t, v: (v, 0)))
    return pl.BlockSpec(shape[::-1], self._at(lambda t, v: (0, v)))

  @property
  def numbers(self) -> pl.BlockSpec:
    """Blocks of (1, T)."""
    return pl.BlockSpec((1, self.tiles.tokens), self._at(lambda t, v: (0, t)))

  @property
  def head_dims(self) -> str:
    """The letters of a tile of the head."""
    return "vd" if self.tied else "dv"

  def column(self, lanes: bool = False) -> jax.Array:
    """Returns the number of each column of the tile that a kernel is at, (v, 1), or (1, v)."""
    start = pl.program_id(1 if self.tokens_first else 0) * self.tiles.columns
    shape = (1, self.tiles.columns) if lanes else (self.tiles.columns, 1)
    return start + jax.lax.broadcasted_iota(jnp.int32, shape, 1 if lanes else 0)

  def head(self, weight: Any, columns: jax.Array) -> jax.Array:
    """Returns a tile of the head, zero where there is no such column."""
    there = self.column(lanes=not self.tied) < columns
    return jnp.where(there, weight[...], jnp.zeros((), weight.dtype))

  def rows(self, hidden: Any) -> jax.Array:
    """Returns a tile of hidden states (t, d), zero past the last token."""
    start = pl.program_id(0 if self.tokens_first else 1) * self.tiles.tokens
    token_t1 = start + jax.lax.broadcasted_iota(jnp.int32, (self.tiles.tokens, 1), 0)
    tile_td = hidden[...]
    return jnp.where(token_t1 < self.hidden_shape[0], tile_td, jnp.zeros((), tile_td.dtype))

  def call(
    self, kernel: Callable[..., None], columns_1: jax.Array, inputs: Any, outputs: Any, scratch: Any
  ) -> Any:
    """Returns what a kernel makes."""
    # Tiles come and go twice at a time; beside them a sum, and what is turned round, cut at ends
    # and split, where products of float32 are made of those of bfloat16.
    tile = max(self.tiles.tokens, self.tiles.columns) * self.hidden_shape[1]
    memory = max(_MEMORY, 16 * tile * inputs[0][0].dtype.itemsize)
    return call(
      functools.partial(kernel, self), self.dims, [columns_1], inputs, outputs, scratch,
      self.tiles.interpret, memory,
    )  # fmt: skip


def _forward_kernel(
  grid: _Grid, columns: Any, hidden: Any, weight: Any, labels: Any, lse: Any, right: Any,
  top_1t: Any, total_1t: Any, right_1t: Any,
) -> None:  # fmt: skip
  step = pl.program_id(1)

  @pl.when(step == 0)
  def _() -> None:
    top_1t[...] = jnp.full_like(top_1t, _LOWEST)
    total_1t[...] = jnp.zeros_like(total_1t)
    right_1t[...] = jnp.zeros_like(right_1t)

  column_v1, before = grid.column(), top_1t[...]
  there_v1, tile = column_v1 < columns[0], grid.head(weight, columns[0])
  logits_vt = dot(f"{grid.head_dims},td", tile, grid.rows(hidden))
  logits_vt = jnp.where(there_v1, logits_vt, _LOWEST)
  top = jnp.maximum(before, jnp.max(logits_vt, axis=0, keepdims=True))
  mass = jnp.sum(jnp.where(there_v1, jnp.exp(logits_vt - top), 0.0), axis=0, keepdims=True)
  total_1t[...] = jnp.exp(before - top) * total_1t[...] + mass
  top_1t[...] = top
  own_vt = column_v1 == labels[...]
  right_1t[...] += jnp.sum(jnp.where(own_vt, logits_vt, 0.0), axis=0, keepdims=True)

  @pl.when(step == pl.num_programs(1) - 1)
  def _() -> None:
    some = total_1t[...] > 0
    total = jnp.where(some, total_1t[...], 1.0)
    lse[...] = jnp.where(some, top_1t[...] + jnp.log(total), -jnp.inf)
    right[...] = right_1t[...]


def _backward(tied: bool, tiles: LogitTiles, saved: Any, cotangents: Any) -> Any:
  hidden_TD, weight, labels_T, columns_1, lse_1T = saved
  dlse_1T, dright_1T = (x[None] for x in cotangents)
  given = labels_T[None], lse_1T, dlse_1T, dright_1T
  found = []
  for like, tokens_first, kernel in (
    (hidden_TD, True, _hidden_gradient_kernel), (weight, False, _weight_gradient_kernel)
  ):  # fmt: skip
    grid = _Grid(hidden_TD.shape, weight.shape[0 if tied else 1], tied, tiles, tokens_first)
    own = grid.hidden if tokens_first else grid.weight
    (made,) = grid.call(
      kernel,
      columns_1,
      [
        (hidden_TD, grid.hidden), (weight, grid.weight), *((x, grid.numbers) for x in given),
      ],
      [(jax.ShapeDtypeStruct(like.shape, like.dtype), own)],
      [own.block_shape],
    )  # fmt: skip
    found.append(made)
  return *found, None, None


_sums.defvjp(_forward, _backward)


def _dlogits(
  grid: _Grid, columns: Any, hidden: Any, weight: Any, labels: Any, lse: Any, dlse: Any, dright: Any
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Returns the gradient of a tile of logits (v, t), and the tiles of both operands."""
  column_v1 = grid.column()
  there_v1, head, rows_td = column_v1 < columns[0], grid.head(weight, columns[0]), grid.rows(hidden)
  logits_vt = dot(f"{grid.head_dims},td", head, rows_td)
  prob_vt = jnp.where(there_v1, jnp.exp(logits_vt - lse[...]), 0.0)
  own_vt = jnp.where(column_v1 == labels[...], 1.0, 0.0)
  dlogits_vt = dlse[...] * prob_vt + dright[...] * own_vt
  start = pl.program_id(0 if grid.tokens_first else 1) * grid.tiles.tokens
  token_1t = start + jax.lax.broadcasted_iota(jnp.int32, (1, grid.tiles.tokens), 1)
  dlogits_vt = jnp.where(token_1t < grid.hidden_shape[0], dlogits_vt, 0.0)
  return dlogits_vt.astype(rows_td.dtype), head, rows_td


def _hidden_gradient_kernel(grid: _Grid, columns: Any, *refs: Any) -> None:
  *given, out, sum_td = refs
  dlogits_vt, head, _ = _dlogits(grid, columns, *given)
  _add(sum_td, out, dot(f"vt,{grid.head_dims}", dlogits_vt, head))


def _weight_gradient_kernel(grid: _Grid, columns: Any, *refs: Any) -> None:
  *given, out, sum_ref = refs
  dlogits_vt, _, rows_td = _dlogits(grid, columns, *given)
  one = dot("vt,td", dlogits_vt, rows_td) if grid.tied else dot("td,vt", rows_td, dlogits_vt)
  _add(sum_ref, out, one)


def _add(sum_ref: Any, out: Any, one: jax.Array) -> None:
  """Adds up over the tiles that pass, and writes down the sum after the last."""
  step = pl.program_id(1)

  @pl.when(step == 0)
  def _() -> None:
    sum_ref[...] = jnp.zeros_like(sum_ref)

  sum_ref[...] += one

  @pl.when(step == pl.num_programs(1) - 1)
  def _() -> None:
    out[...] = sum_ref[...].astype(out.dtype)
