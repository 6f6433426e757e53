"""Weight formats, and the one seam for weights: `dot`, `grouped_dot`, `multiply`, `take_rows`.

Model code never multiplies by a weight itself. A plain array is handled here. Any other format
(a low-rank update over another weight, quantized, shared shards) is a registered pytree class from
a higher level with methods of its own: `dot`, `grouped_dot` and, for tables, `rows`. It takes the
place of the array inside the parameter tree and nothing else changes.

A format whose product differs from token to token (by task, adapter or variant) names the values it
needs, `token_values = ("task",)`. Whoever runs the model gives them by token, `Tokens.values`; the
format's `grouped_dot` finds them by row, `groups.values["task"]`, under every dispatcher and
exchange. A row without a token has zeros.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp

_LARGE = 2**18  # entries of an activation


class Groups(Protocol):
  """Rows in order of their slot, how to multiply each by its slot's matrix, and their tokens."""

  @property
  def sizes_S(self) -> jax.Array:
    """(S,) int32, the number of rows of each slot."""

  @property
  def values(self) -> Mapping[str, jax.Array]:
    """What weights ask of each row's token, (R, ...) by name."""

  def matmul(self, rows_RD: jax.Array, weight_SDF: jax.Array) -> jax.Array:
    """Returns (R, F): each row times the matrix of its slot, accumulated in float32."""


@runtime_checkable
class WeightFormat(Protocol):
  """What a weight format brings; it must also be a registered pytree."""

  def dot(self, x: jax.Array, spec: str) -> jax.Array:
    """Returns the einsum `spec` of (x, weight) in x.dtype."""

  def grouped_dot(self, rows_RD: jax.Array, groups: Groups) -> jax.Array:
    """Returns (R, *out): each row times the matrix of its slot, in rows.dtype."""

  def rows(self, ids: jax.Array, dtype: Any) -> jax.Array:
    """Returns row `ids` of a table (V, D) in `dtype`; NaN where an id is outside."""


def dot(weight: Any, x: jax.Array, spec: str) -> jax.Array:
  """Returns the einsum of `x` and `weight`, e.g. `dot(w, x_BLD, '...d,dnh->...nh')`.

  Args:
    weight: An array, cast to x.dtype, or a `Weight`.
    x: The activation, the first operand of `spec`.
    spec: An einsum of two operands.

  Returns:
    The product in x.dtype, accumulated in float32 or wider.
  """
  if not isinstance(weight, jax.Array):
    return weight.dot(x, spec)
  wide = jnp.promote_types(x.dtype, jnp.float32)
  product = _product(spec, x, weight.astype(x.dtype), wide)
  return product.astype(x.dtype)


def _product(spec: str, x: jax.Array, weight: jax.Array, dtype: Any) -> jax.Array:
  """Returns the einsum, as a product of two matrices where it is one with dims of weights joined.

  Of more dims XLA on CPU turns operands round before the products of the backward pass, entry by
  entry: both of `td,dnh->tnh`. That sums in another order, so what is small enough for it not to
  matter stays as runs of before have it.
  """
  names, out = spec.split("->")
  left, right = names.split(",")
  if x.ndim != 2 or x.size < _LARGE or left[1] != right[0] or out != left[0] + right[1:]:
    return jnp.einsum(spec, x, weight, preferred_element_type=dtype)
  product = jnp.dot(x, weight.reshape(x.shape[1], -1), preferred_element_type=dtype)
  return product.reshape(-1, *weight.shape[1:])


def grouped_dot(weight: Any, rows_RD: jax.Array, groups: Groups) -> jax.Array:
  """Returns (R, *out): row r times the matrix of its slot; `weight` is (S, D, *out)."""
  if not isinstance(weight, jax.Array):
    return weight.grouped_dot(rows_RD, groups)
  slots, dim, *out = weight.shape
  flat_SDF = weight.astype(rows_RD.dtype).reshape(slots, dim, -1)
  return groups.matmul(rows_RD, flat_SDF).reshape(rows_RD.shape[0], *out)


def take_rows(weight: Any, ids: jax.Array, dtype: Any) -> jax.Array:
  """Returns (..., D): row `ids` of a table (V, D) in `dtype`.

  An id outside the table, negative ones included, gives NaN, never another row.
  """
  if not isinstance(weight, jax.Array):
    return weight.rows(ids, dtype)
  rows = weight.at[ids].get(mode="fill", fill_value=jnp.nan, wrap_negative_indices=False)
  return rows.astype(dtype)


def token_values(weights: Any) -> tuple[str, ...]:
  """Returns the names of the values that formats in a tree of weights ask of each token."""
  asks = lambda node: hasattr(node, "token_values")  # noqa: E731
  formats = filter(asks, jax.tree.leaves(weights, is_leaf=asks))
  return tuple(sorted({name for each in formats for name in each.token_values}))


def multiply(
  function: Callable[..., jax.Array], weights: tuple[Any, ...], *inputs: jax.Array
) -> jax.Array:
  """Returns `function(*weights, *inputs)` for weights that `is_plain` lets through.

  Args:
    function: Several products at once; linear in no weight alone, and without arrays of its own.
    weights: What it multiplies by.
    inputs: The other arrays.
  """
  if isinstance(weights[0], jax.Array):
    return function(*weights, *inputs)
  return weights[0].multiply(function, weights, *inputs)


def is_plain(*weights: Any) -> bool:
  """True where every weight is a plain array, which a fused back end may read by `multiply`."""
  return all(
    isinstance(weight, jax.Array) or getattr(weight, "arrays_inside", False) for weight in weights
  )
