"""Grouped matmul in blocks of at most 128 rows of one slot, as many as there are: no padding FLOPs.

The number of blocks depends on the sizes, so the loop over them has a dynamic trip count: only live
blocks are computed, at any skew. Reverse-mode differentiation cannot pass through such a loop, so
the whole product is one `custom_vjp` whose backward pass is two more loops of the same kind.

Blocks run in row order and start exactly where their slot's rows go on. A slot's last block
reaches into the rows of later slots; what it writes there (zeros) is overwritten by their blocks.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

BLOCK_ROWS = 128


def live_blocks(
  sizes_S: jax.Array, num_rows: int, block_rows: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Returns (number of live blocks, slot of each, index of each among its slot's blocks).

  The two lists have the static length num_rows // block_rows + S, the most blocks there can be;
  entries past the live ones are meaningless.
  """
  blocks_S = -(-sizes_S // block_rows)
  ends_S = jnp.cumsum(blocks_S)
  block_K = jnp.arange(num_rows // block_rows + sizes_S.shape[0], dtype=jnp.int32)
  slot_K = jnp.sum(block_K[:, None] >= ends_S[None, :], axis=1, dtype=jnp.int32)
  slot_K = jnp.minimum(slot_K, sizes_S.shape[0] - 1)
  return ends_S[-1], slot_K, block_K - (ends_S - blocks_S)[slot_K]


@jax.custom_vjp
def blocks(rows_RD: jax.Array, weight_SDF: jax.Array, sizes_S: jax.Array) -> jax.Array:
  """Returns each row times its slot's matrix, computing ceil(size / 128) blocks a slot."""
  return _product(rows_RD, weight_SDF, sizes_S, transposed=False)


def _for_each_block(
  sizes_S: jax.Array,
  num_rows: int,
  body: Callable[[jax.Array, jax.Array, jax.Array, jax.Array], jax.Array],
  init: jax.Array,
) -> jax.Array:
  """Folds `carry = body(carry, slot, first row, live_B)` over the live blocks in row order."""
  num_live, slot_K, index_K = live_blocks(sizes_S, num_rows, BLOCK_ROWS)
  ends_S = jnp.cumsum(sizes_S)
  start_K = (ends_S - sizes_S)[slot_K] + index_K * BLOCK_ROWS
  offset_B = jnp.arange(BLOCK_ROWS, dtype=jnp.int32)

  def step(block: jax.Array, carry: jax.Array) -> jax.Array:
    slot, start = slot_K[block], start_K[block]
    return body(carry, slot, start, start + offset_B < ends_S[slot])

  return jax.lax.fori_loop(0, num_live, step, init)


def _block_at(padded: jax.Array, start: jax.Array, live_B: jax.Array) -> jax.Array:
  """Returns the block of rows from `start` on, with the rows of other slots set to zero."""
  block = jax.lax.dynamic_slice_in_dim(padded, start, BLOCK_ROWS)
  return jnp.where(live_B[:, None], block, jnp.zeros((), block.dtype))


def _pad(rows: jax.Array) -> jax.Array:
  """Returns the rows with one spare block, so that no slice is clamped at the end."""
  return jnp.pad(rows, ((0, BLOCK_ROWS), (0, 0)))


def _product(
  rows_RD: jax.Array, weight_SDF: jax.Array, sizes_S: jax.Array, transposed: bool
) -> jax.Array:
  """Returns rows times weight, or times its transpose over the last two dims."""
  num_rows = rows_RD.shape[0]
  out_dim = weight_SDF.shape[1 if transposed else 2]
  padded = _pad(rows_RD)
  contract = (((1,), (1 if transposed else 0,)), ((), ()))

  def body(out: jax.Array, slot: jax.Array, start: jax.Array, live_B: jax.Array) -> jax.Array:
    weight = jax.lax.dynamic_index_in_dim(weight_SDF, slot, keepdims=False)
    product = jax.lax.dot_general(
      _block_at(padded, start, live_B), weight, contract, preferred_element_type=jnp.float32
    )
    return jax.lax.dynamic_update_slice_in_dim(out, product.astype(out.dtype), start, 0)

  out = jnp.zeros((num_rows + BLOCK_ROWS, out_dim), rows_RD.dtype)
  return _for_each_block(sizes_S, num_rows, body, out)[:num_rows]


def _forward(
  rows_RD: jax.Array, weight_SDF: jax.Array, sizes_S: jax.Array
) -> tuple[jax.Array, tuple[jax.Array, jax.Array, jax.Array]]:
  return blocks(rows_RD, weight_SDF, sizes_S), (rows_RD, weight_SDF, sizes_S)


def _backward(
  saved: tuple[jax.Array, jax.Array, jax.Array], grad_RF: jax.Array
) -> tuple[jax.Array, jax.Array, None]:
  rows_RD, weight_SDF, sizes_S = saved
  rows, grad = _pad(rows_RD), _pad(grad_RF)

  def body(total: jax.Array, slot: jax.Array, start: jax.Array, live_B: jax.Array) -> jax.Array:
    product = jnp.einsum(
      "rd,rf->df",
      _block_at(rows, start, live_B),
      _block_at(grad, start, live_B),
      preferred_element_type=jnp.float32,
    )
    return total.at[slot].add(product)

  zeros = jnp.zeros(weight_SDF.shape, jnp.float32)
  grad_SDF = _for_each_block(sizes_S, rows_RD.shape[0], body, zeros)
  grad_RD = _product(grad_RF, weight_SDF, sizes_S, transposed=True)
  return grad_RD.astype(rows_RD.dtype), grad_SDF.astype(weight_SDF.dtype), None


blocks.defvjp(_forward, _backward)
