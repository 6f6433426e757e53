"""Grouped matmul as TPU kernels (Pallas): slots visit the blocks that their rows lie in.

As in megablox (Gale et al. 2023, arXiv:2211.15841; Pallas). A product holds all of what it sums
over, so that a slot's matrix is read once for each tile of columns, whatever its rows; gradients
of rows read the same matrices the other way round, untransposed. Gradients of weights are summed
from visit to visit. Only a slot's first and last block are masked, which costs them their share of
another's rows: blocks are short enough that this is little. Operands keep their type, sums are
float32. Rows past the last slot are zeroed, not read.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from jaxmoe.ops.grouped_matmul.visits import SlotVisit, Visits
from jaxmoe.ops.tpu_kernel import Interpret, call, dot

_MATRIX = 2**24  # bytes of a tile of a slot's matrix
_MEMORY = 2**24  # bytes that a kernel may take unasked


@dataclasses.dataclass(frozen=True)
class RowTiles:
  """How large tiles are, and where kernels run.

  Attributes:
    rows: Of a block; a multiple of 16 on a chip.
    columns: Of a product, at most; a multiple of 128 on a chip.
    side: Of a square of weights' gradients, at most; likewise.
    interpret: Whether an interpreter runs kernels, see `tpu_kernel`.
  """

  rows: int
  columns: int = 512
  side: int = 1024
  interpret: Interpret = False

  @classmethod
  def of(cls, num_rows: int, num_slots: int) -> RowTiles:
    """Returns tiles of as many rows as add a twentieth of work at the ends of slots, or 128."""
    little = num_rows // (20 * num_slots) // 128 * 128
    return cls(min(max(128, min(512, little)), -(-num_rows // 16) * 16))

  def width(self, size: int, depth: int, itemsize: int) -> int:
    """Returns how many of so many columns a tile has, each of so many numbers."""
    fitting = _MATRIX // (depth * itemsize * itemsize // 2)
    return min(size, self.columns, max(128, fitting // 128 * 128))


def mosaic_tpu(
  rows_RD: jax.Array, weight_SDF: jax.Array, sizes_S: jax.Array, tiles: RowTiles | None = None
) -> jax.Array:
  """Returns each row times its slot's matrix, in the rows' type, summed in float32."""
  num_rows = rows_RD.shape[0]
  tiles = tiles or RowTiles.of(num_rows, weight_SDF.shape[0])
  visits = Visits.of(sizes_S.astype(jnp.int32), num_rows, tiles.rows)
  return _product(rows_RD, weight_SDF.astype(rows_RD.dtype), visits, tiles)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _product(
  rows_RD: jax.Array, weight_SDF: jax.Array, visits: Visits, tiles: RowTiles
) -> jax.Array:
  return _rows(rows_RD, weight_SDF, visits, tiles, "rd,df")


def _forward(rows_RD: Any, weight_SDF: Any, visits: Visits, tiles: RowTiles) -> Any:
  return _product(rows_RD, weight_SDF, visits, tiles), (rows_RD, weight_SDF, visits)


def _backward(tiles: RowTiles, saved: Any, grad_RF: jax.Array) -> Any:
  rows_RD, weight_SDF, visits = saved
  grad_RD = _rows(grad_RF, weight_SDF, visits, tiles, "rf,df")
  return grad_RD, _weight_gradient(rows_RD, grad_RF, visits, weight_SDF.shape[0], tiles), None


_product.defvjp(_forward, _backward)


def _memory(tiles: RowTiles, itemsize: int, *tile_shapes: tuple[int, int]) -> int:
  """Returns bytes that a kernel may take: tiles twice, a sum, and what products are made of."""
  numbers = sum(one * other for one, other in tile_shapes)
  return _MEMORY + numbers * 4 * itemsize


def _rows(
  rows_RD: jax.Array, weight_SDF: jax.Array, visits: Visits, tiles: RowTiles, dims: str
) -> jax.Array:
  """Returns rows times their slots' matrices, which are summed over the second letter of rows."""
  (num_rows, depth), by_column = rows_RD.shape, dims == "rd,df"
  size, itemsize = weight_SDF.shape[2 if by_column else 1], rows_RD.dtype.itemsize
  width = tiles.width(size, depth, itemsize)
  matrix = (None, depth, width) if by_column else (None, width, depth)
  (out_RF,) = call(
    functools.partial(_rows_kernel, dims, tiles.rows),
    (pl.cdiv(size, width), visits.slot_V.shape[0]),
    visits.scalars,
    [
      (rows_RD, pl.BlockSpec((tiles.rows, depth), lambda i, v, *of: (of[2][v], 0))),
      (
        weight_SDF,
        pl.BlockSpec(
          matrix, lambda i, v, *of: (of[3][v], 0, i) if by_column else (of[3][v], i, 0)
        ),
      ),
    ],
    [
      (
        jax.ShapeDtypeStruct((num_rows, size), rows_RD.dtype),
        pl.BlockSpec((tiles.rows, width), lambda i, v, *of: (of[1][v], i)),
      )
    ],
    [],
    tiles.interpret,
    _memory(tiles, itemsize, (tiles.rows, depth), (depth, width), (tiles.rows, width)),
  )
  return out_RF


def _rows_kernel(
  dims: str, num_rows: int, slot: Any, block: Any, read: Any, held: Any, bound: Any, rows: Any,
  weight: Any, out: Any,
) -> None:  # fmt: skip
  visit = SlotVisit(slot, block, bound, pl.program_id(1), num_rows)

  @pl.when(visit.whole)
  def _() -> None:
    out[...] = dot(dims, rows[...], weight[...]).astype(out.dtype)

  @pl.when(visit.first_of(block) & ~visit.whole)
  def _() -> None:
    out[...] = jnp.zeros_like(out)

  @pl.when(visit.partial)
  def _() -> None:
    product = dot(dims, rows[...], weight[...])
    others = out[...].astype(jnp.float32)
    out[...] = jnp.where(visit.mask_r1, product, others).astype(out.dtype)


def _weight_gradient(
  rows_RD: jax.Array, grad_RF: jax.Array, visits: Visits, num_slots: int, tiles: RowTiles
) -> jax.Array:
  """Returns the gradient of all slots' matrices, in the type of the rows."""
  sizes = rows_RD.shape[1], grad_RF.shape[1]
  tall, wide = (min(tiles.side, size) for size in sizes)
  like = jax.ShapeDtypeStruct((num_slots, *sizes), rows_RD.dtype)
  (made_SDF,) = call(
    functools.partial(_weight_gradient_kernel, tiles.rows),
    (pl.cdiv(sizes[0], tall), pl.cdiv(sizes[1], wide), visits.slot_V.shape[0]),
    visits.scalars,
    [
      (rows_RD, pl.BlockSpec((tiles.rows, tall), lambda i, j, v, *of: (of[2][v], i))),
      (grad_RF, pl.BlockSpec((tiles.rows, wide), lambda i, j, v, *of: (of[2][v], j))),
    ],
    [
      (
        like,
        pl.BlockSpec(
          (None, tall, wide), lambda i, j, v, *of: (jnp.minimum(of[0][v], num_slots - 1), i, j)
        ),
      )
    ],
    [(tall, wide)],
    tiles.interpret,
    _memory(tiles, rows_RD.dtype.itemsize, (tiles.rows, tall + wide), (tall, wide)),
  )
  return made_SDF


def _weight_gradient_kernel(
  num_rows: int, slot: Any, block: Any, read: Any, held: Any, bound: Any, rows: Any, grad: Any,
  out: Any, sum_df: Any,
) -> None:  # fmt: skip
  visit = SlotVisit(slot, block, bound, pl.program_id(2), num_rows)

  @pl.when(visit.first_of(slot))
  def _() -> None:
    sum_df[...] = jnp.zeros_like(sum_df)

  @pl.when(visit.whole)
  def _() -> None:
    sum_df[...] += dot("rd,rf", rows[...], grad[...])

  @pl.when(visit.partial)
  def _() -> None:
    # Both: what others' rows hold, which may be anything, times zero need not be zero.
    mine_r1, zero = visit.mask_r1, jnp.zeros((), rows.dtype)
    one, other = (jnp.where(mine_r1, x[...], zero) for x in (rows, grad))
    sum_df[...] += dot("rd,rf", one, other)

  @pl.when(visit.last_of(slot))
  def _() -> None:
    out[...] = sum_df[...].astype(out.dtype)
