"""The expert layer as one differentiable function, exactly dropless at any skew.

Each slot owns mean + sqrt(mean) rows, which go through one batched matmul; the choices beyond them
run in blocks of at most 128 rows whose number is dynamic, so balanced routing pays next to nothing
for being dropless and skewed routing pays for the rows it has. Where many choices have no row, as
with experts that compute nothing, slots own none and all rows are in blocks. The whole layer is
one `custom_vjp`: a loop with a dynamic trip count has no other gradient, and it decides what is
kept. Kept are the inputs, the pre-activations of the slots' own rows and the index maps; gathered
rows and activations are made again, overflow is computed again, expert outputs are not needed.

A row that nobody fills holds zeros and weight 0, which masks all of the backward pass. The sum over
a token's choices is in the order of the choices, so where a matmul's rows do not depend on its
other rows (true on CPU) neither does a token's output on other tokens, bit for bit.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp

from jaxmoe.ops.expert_mlp.places import Places, block_rows, place_choices, row_capacity
from jaxmoe.ops.grouped_matmul import GroupedMatmul

Activation = Callable[[jax.Array], jax.Array]


def fused(
  x_TD: jax.Array,
  gate_up_SDGF: jax.Array,
  down_SFD: jax.Array,
  slot_TA: jax.Array,
  weight_TA: jax.Array,
  activation: Activation,
  among: int | None = None,
  matmul: GroupedMatmul | None = None,
) -> jax.Array:
  """Returns the layer's output in x.dtype, computing little more than the rows in use.

  Where choices are spread over more slots than there are, slots own no rows, and the time is that
  of the live rows.
  """
  del matmul
  return _fused(x_TD, gate_up_SDGF, down_SFD, slot_TA, weight_TA, activation, among)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def _fused(
  x_TD: jax.Array,
  gate_up_SDGF: jax.Array,
  down_SFD: jax.Array,
  slot_TA: jax.Array,
  weight_TA: jax.Array,
  activation: Activation,
  among: int | None,
) -> jax.Array:
  """Returns the layer's output."""
  return _forward(x_TD, gate_up_SDGF, down_SFD, slot_TA, weight_TA, activation, among)[0]


class _Saved(NamedTuple):
  """What the backward pass needs."""

  x_TD: jax.Array
  gate_up_SDGF: jax.Array
  down_SFD: jax.Array
  weight_TA: jax.Array
  places: Places
  pre_SCGF: jax.Array


def _forward(
  x_TD: jax.Array,
  gate_up_SDGF: jax.Array,
  down_SFD: jax.Array,
  slot_TA: jax.Array,
  weight_TA: jax.Array,
  activation: Activation,
  among: int | None,
) -> tuple[jax.Array, _Saved]:
  """Returns the output and what the backward pass needs."""
  chex.assert_equal_shape([slot_TA, weight_TA])
  num_slots, num_active = gate_up_SDGF.shape[0], slot_TA.shape[1]
  # Where choices may have no row, their number is not known: all rows are in blocks, no more of
  # them than there are live rows.
  capacity = row_capacity(slot_TA.size, num_slots) if among in (None, num_slots) else 0
  num_own = num_slots * capacity
  places = place_choices(slot_TA, num_slots, capacity)
  rows_RD = _gather(x_TD, places.choice_R[:num_own], num_active)
  rows_SCD = rows_RD.reshape(num_slots, capacity, x_TD.shape[1])
  # Flat once, for the product and for the loop: a layer's weights are copied out of a stack of
  # layers once for each of their shapes.
  up_SDE, gates = _flat(gate_up_SDGF), gate_up_SDGF.shape[2:]
  with jax.named_scope("experts"):
    pre_SCGF = _split(_dot("scd,sde->sce", rows_SCD, up_SDE), gates)
    own_SCD = _dot("scf,sfd->scd", activation(pre_SCGF), down_SFD)

  @jax.named_scope("overflow")
  def add_block(block: jax.Array, over_RD: jax.Array) -> jax.Array:
    slot, start, choice_B = _block(places, block, capacity)
    rows_BD = _gather(x_TD, choice_B, num_active)
    pre_BGF = _split(_dot("bd,de->be", rows_BD, _at(up_SDE, slot)), gates)
    out_BD = _dot("bf,fd->bd", activation(pre_BGF), _at(down_SFD, slot))
    return jax.lax.dynamic_update_slice_in_dim(over_RD, out_BD, start, 0)

  # The gathered rows are not needed any more: overflow is written over them, which saves clearing
  # a buffer that is as large and nearly unused. Only rows that a block wrote are read.
  over_RD = _room(rows_RD, places)
  own_RD, over_RD = jax.lax.optimization_barrier((own_SCD.reshape(num_own, x_TD.shape[1]), over_RD))
  over_RD = jax.lax.fori_loop(0, places.num_blocks, add_block, over_RD)
  y_TD = _combine(own_RD, over_RD, places, weight_TA).astype(x_TD.dtype)
  return y_TD, _Saved(
    x_TD=x_TD,
    gate_up_SDGF=gate_up_SDGF,
    down_SFD=down_SFD,
    weight_TA=weight_TA,
    places=places,
    pre_SCGF=pre_SCGF,
  )


def _backward(
  activation: Activation, among: int | None, saved: _Saved, grad_y_TD: jax.Array
) -> tuple[Any, ...]:
  """Returns the gradients of x, both weights and `weight_TA`; None for the slots."""
  del among
  num_slots, capacity = saved.pre_SCGF.shape[:2]
  num_own, num_active = num_slots * capacity, saved.weight_TA.shape[1]
  shape = num_slots, capacity, saved.x_TD.shape[1]
  choice_R = saved.places.choice_R[:num_own]
  weight_R = _gather(saved.weight_TA.reshape(-1).astype(jnp.float32), choice_R, 1)
  rows_SCD = _gather(saved.x_TD, choice_R, num_active).reshape(shape)
  up_SDE, gates = _flat(saved.gate_up_SDGF), saved.gate_up_SDGF.shape[2:]
  grad_RD = _gather(grad_y_TD, choice_R, num_active)
  grad_SCD = grad_RD.reshape(shape)

  with jax.named_scope("experts"):
    hidden_SCF, activation_vjp = jax.vjp(activation, saved.pre_SCGF)
    back_SCF = _dot("scd,sfd->scf", grad_SCD, saved.down_SFD)
    grad_weight_SC = _inner(hidden_SCF, back_SCF)
    weight_SC = weight_R.reshape(num_slots, capacity)
    (grad_pre_SCGF,) = activation_vjp(_scale(back_SCF, weight_SC))
    grad_down_SFD = _dot("scf,scd->sfd", _scale(hidden_SCF, weight_SC), grad_SCD, jnp.float32)
    grad_pre_SCE = _flat(grad_pre_SCGF)
    grad_up_SDE = _dot("scd,sce->sde", rows_SCD, grad_pre_SCE, jnp.float32)
    grad_own_SCD = _dot("sce,sde->scd", grad_pre_SCE, up_SDE)

  over_RD, own_RD = _room(grad_RD, saved.places), grad_own_SCD.reshape(num_own, shape[2])
  grad_own_RD, over_RD = jax.lax.optimization_barrier((own_RD, over_RD))
  carry = over_RD, jnp.zeros(over_RD.shape[0], jnp.float32), grad_up_SDE, grad_down_SFD
  add_block = functools.partial(_add_block_gradient, activation, saved, up_SDE, grad_y_TD)
  carry = jax.lax.fori_loop(0, saved.places.num_blocks, add_block, carry)
  over_RD, over_weight_R, grad_up_SDE, grad_down_SFD = carry

  ones_TA = jnp.ones(saved.weight_TA.shape, jnp.float32)
  grad_x_TD = _combine(grad_own_RD, over_RD, saved.places, ones_TA)
  grad_weight_R = jnp.concatenate([grad_weight_SC.reshape(-1), over_weight_R])
  grad_weight_TA = grad_weight_R.at[saved.places.row_TA].get(mode="fill", fill_value=0)
  return (
    grad_x_TD.astype(saved.x_TD.dtype),
    _split(grad_up_SDE, gates).astype(saved.gate_up_SDGF.dtype),
    grad_down_SFD.astype(saved.down_SFD.dtype),
    None,
    grad_weight_TA.astype(saved.weight_TA.dtype),
  )


@jax.named_scope("overflow")
def _add_block_gradient(
  activation: Activation,
  saved: _Saved,
  up_SDE: jax.Array,
  grad_y_TD: jax.Array,
  block: jax.Array,
  carry: tuple[jax.Array, ...],
) -> tuple[jax.Array, ...]:
  """Computes an overflow block again, adds to its slot's gradients and writes its rows'."""
  over_RD, over_weight_R, grad_up_SDE, grad_down_SFD = carry
  num_active, gates = saved.weight_TA.shape[1], saved.gate_up_SDGF.shape[2:]
  slot, start, choice_B = _block(saved.places, block, saved.pre_SCGF.shape[1])
  weight_B = _gather(saved.weight_TA.reshape(-1).astype(jnp.float32), choice_B, 1)
  rows_BD = _gather(saved.x_TD, choice_B, num_active)
  grad_BD = _gather(grad_y_TD, choice_B, num_active)
  up_DE, down_FD = _at(up_SDE, slot), _at(saved.down_SFD, slot)
  pre_BGF = _split(_dot("bd,de->be", rows_BD, up_DE), gates)
  hidden_BF, activation_vjp = jax.vjp(activation, pre_BGF)
  back_BF = _dot("bd,fd->bf", grad_BD, down_FD)
  (grad_pre_BGF,) = activation_vjp(_scale(back_BF, weight_B))
  grad_pre_BE = _flat(grad_pre_BGF)
  grad_up_DE = _dot("bd,be->de", rows_BD, grad_pre_BE, jnp.float32)
  grad_down_FD = _dot("bf,bd->fd", _scale(hidden_BF, weight_B), grad_BD, jnp.float32)
  grad_rows_BD = _dot("be,de->bd", grad_pre_BE, up_DE)
  grad_weight_B = _inner(hidden_BF, back_BF)
  put = jax.lax.dynamic_update_index_in_dim
  return (
    jax.lax.dynamic_update_slice_in_dim(over_RD, grad_rows_BD, start, 0),
    jax.lax.dynamic_update_slice_in_dim(over_weight_R, grad_weight_B, start, 0),
    put(grad_up_SDE, _at(grad_up_SDE, slot) + grad_up_DE, slot, 0),
    put(grad_down_SFD, _at(grad_down_SFD, slot) + grad_down_FD, slot, 0),
  )


_fused.defvjp(_forward, _backward)


def _dot(spec: str, a: jax.Array, b: jax.Array, dtype: Any = None) -> jax.Array:
  """Returns an einsum summed in float32 and rounded to a.dtype or `dtype`."""
  return jnp.einsum(spec, a, b, preferred_element_type=jnp.float32).astype(dtype or a.dtype)


def _flat(array: jax.Array) -> jax.Array:
  """Returns (..., G * F) of (..., G, F)."""
  return array.reshape(*array.shape[:-2], array.shape[-2] * array.shape[-1])


def _split(array: jax.Array, gates: tuple[int, ...]) -> jax.Array:
  """Returns (..., G, F) of (..., G * F).

  XLA:CPU is slower to multiply by two such dims than by one, and refuses them in bfloat16.
  """
  return array.reshape(*array.shape[:-1], *gates)


def _inner(a: jax.Array, b: jax.Array) -> jax.Array:
  """Returns the float32 inner products over the last dim."""
  return jnp.sum(a.astype(jnp.float32) * b.astype(jnp.float32), axis=-1)


def _scale(rows: jax.Array, weight: jax.Array) -> jax.Array:
  """Returns each row times its float32 weight, in the rows' dtype."""
  return (rows.astype(jnp.float32) * weight[..., None]).astype(rows.dtype)


def _at(stack: jax.Array, slot: jax.Array) -> jax.Array:
  """Returns one slot's part of a stack."""
  return jax.lax.dynamic_index_in_dim(stack, slot, keepdims=False)


@jax.named_scope("move")
def _gather(source: jax.Array, choice_R: jax.Array, num_active: int) -> jax.Array:
  """Returns the source row of each choice's token, and zeros where there is no choice."""
  return source.at[choice_R // num_active].get(mode="fill", fill_value=0)


def _room(rows_RD: jax.Array, places: Places) -> jax.Array:
  """Returns a buffer for the overflow: the slots' own rows, longer if all choices are more."""
  num_over = places.choice_R.shape[0] - rows_RD.shape[0]
  return jnp.pad(rows_RD, ((0, max(0, num_over - rows_RD.shape[0])), (0, 0)))


def _block(
  places: Places, block: jax.Array, capacity: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Returns (slot, first row among the overflow rows, choices) of an overflow block."""
  rows, slot = block_rows(capacity), places.block_slot_K[block]
  num_own = places.choice_R.shape[0] - rows * places.block_slot_K.shape[0]
  choice_B = jax.lax.dynamic_slice_in_dim(places.choice_R, num_own + block * rows, rows)
  return slot, block * rows, choice_B


@jax.named_scope("combine")
def _combine(
  own_RD: jax.Array, over_RD: jax.Array, places: Places, weight_TA: jax.Array
) -> jax.Array:
  """Returns the float32 sum of each token's rows times their weights, in order of the choices."""
  num_own, num_rows = own_RD.shape[0], places.choice_R.shape[0]
  in_use_TA = places.row_TA < num_rows
  # Row number num_rows is past the end of either buffer and reads as zeros.
  over_TA = jnp.where(in_use_TA & (places.row_TA >= num_own), places.row_TA - num_own, num_rows)

  def read(source_RD: jax.Array, row_T: jax.Array) -> jax.Array:
    return source_RD.at[row_T].get(mode="fill", fill_value=0)

  def total(with_overflow: bool) -> jax.Array:
    total_TD = jnp.zeros((weight_TA.shape[0], own_RD.shape[1]), jnp.float32)
    for choice in range(weight_TA.shape[1]):
      sources = [(own_RD, places.row_TA)] * bool(num_own) + [(over_RD, over_TA)] * with_overflow
      if not sources:
        continue
      # One of the two is zeros.
      rows_TD = functools.reduce(jnp.add, (read(of, row[:, choice]) for of, row in sources))
      weight_T = jnp.where(in_use_TA[:, choice], weight_TA[:, choice].astype(jnp.float32), 0.0)
      total_TD += rows_TD.astype(jnp.float32) * weight_T[:, None]
    return total_TD

  return jax.lax.cond(places.num_blocks > 0, lambda: total(True), lambda: total(False))
