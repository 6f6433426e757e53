"""A low-rank update over another weight: W + scale * a b (LoRA, Hu et al. 2021, section 4.1).

`LowRank` is a weight format: it takes the place of an array inside the parameter tree, and model
code does not change. The dims of a weight stand in two parts, `left` and `right`: a is (*left, r)
and b is (r, *right), whichever of them a product contracts. Dims that only count copies (layers of
a stack, experts) lead in all three, so that `scan` and `grouped_dot` slice them off together.

The weight below is frozen: it gets a zero gradient. A zero gradient alone does not stop weight
decay, so an optimizer must be told to leave the leaves called `base` out.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import functools
import math
import string
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxmoe.core import param_names
from jaxmoe.core.errors import InputError
from jaxmoe.core.layout import EXPERT_DIMS, LAYER, Dims
from jaxmoe.core.rng import Keys
from jaxmoe.core.weight_formats import Groups, dot, grouped_dot, is_plain, take_rows
from jaxmoe.models.transformer import Decoder, Params

_COPIES = (LAYER, *EXPERT_DIMS)


@functools.partial(
  jax.tree_util.register_dataclass, data_fields=["base", "a", "b"], meta_fields=["scale"]
)
@dataclasses.dataclass(frozen=True)
class LowRank:
  """The weight `base + scale * a b`; only a and b get gradients.

  Attributes:
    base: (*copies, *left, *right), an array or another `Weight`; frozen.
    a: (*copies, *left, r).
    b: (*copies, r, *right); zeros leave the outputs as they were, up to rounding.
    scale: What the update is multiplied by.
  """

  base: Any
  a: jax.Array
  b: jax.Array
  scale: float

  def dot(self, x: jax.Array, spec: str) -> jax.Array:
    """Returns the einsum `spec` of (x, weight) in x.dtype, without making a b.

    Raises:
      ValueError: `spec` contracts some other dims than all of left or all of right.
    """
    (first, first_spec), (second, second_spec) = self._factors(spec)
    update = dot(second, dot(first, x, first_spec), second_spec)
    return self._sum(dot(jax.lax.stop_gradient(self.base), x, spec), update)

  def grouped_dot(self, rows_RD: jax.Array, groups: Groups) -> jax.Array:
    """Returns (R, *out) in rows.dtype; left is the one dim D."""
    update = grouped_dot(self.b, grouped_dot(self.a, rows_RD, groups), groups)
    return self._sum(grouped_dot(jax.lax.stop_gradient(self.base), rows_RD, groups), update)

  def rows(self, ids: jax.Array, dtype: Any) -> jax.Array:
    """Returns row `ids` of a table (V, D) in `dtype`; NaN where an id is outside."""
    rows = take_rows(jax.lax.stop_gradient(self.base), ids, dtype)
    return self._sum(rows, dot(self.b, take_rows(self.a, ids, dtype), "...r,rd->...d"))

  def merged(self) -> jax.Array:
    """Returns the plain array of the same products, in the base's dtype; summed in float32."""
    base = self.base if is_plain(self.base) else self.base.merged()
    copies = self.a.ndim + self.b.ndim - 2 - base.ndim
    left, right = self.a.shape[:-1], self.b.shape[copies + 1 :]
    rank = self.a.shape[-1]
    a = self.a.reshape(*left[:copies], -1, rank).astype(jnp.float32)
    b = self.b.reshape(*left[:copies], rank, -1).astype(jnp.float32)
    update = self.scale * jnp.matmul(a, b).reshape(*left, *right)
    return (base.astype(jnp.float32) + update).astype(base.dtype)

  def _sum(self, product: jax.Array, update: jax.Array) -> jax.Array:
    total = product.astype(jnp.float32) + self.scale * update.astype(jnp.float32)
    return total.astype(product.dtype)

  def _factors(self, spec: str) -> tuple[tuple[jax.Array, str], tuple[jax.Array, str]]:
    """Returns the two factors and their einsums, the one that meets x first."""
    inputs, out = spec.split("->")
    x, weight = inputs.split(",")
    left, right = weight[: self.a.ndim - 1], weight[self.a.ndim - 1 :]
    contracted = {letter for letter in weight if letter in x and letter not in out}
    if len(right) != self.b.ndim - 1 or contracted not in (set(left), set(right)):
      raise ValueError(
        f"{spec!r} must contract all of left or all of right of a weight whose factors are "
        f"{self.a.shape} and {self.b.shape}"
      )
    rank = next(letter for letter in string.ascii_letters if letter not in spec)
    between = "".join(letter for letter in x if letter not in contracted) + rank
    a, b = f"{left}{rank}", f"{rank}{right}"
    if contracted == set(left):
      return (self.a, f"{x},{a}->{between}"), (self.b, f"{between},{b}->{out}")
    return (self.b, f"{x},{b}->{between}"), (self.a, f"{between},{a}->{out}")


def add_low_rank(
  decoder: Decoder, params: Params, globs: Sequence[str], rank: int, scale: float, keys: Keys
) -> Params:
  """Returns `params` with a zero update of `rank` over every weight that a glob names.

  Args:
    decoder: Whose parameters these are.
    params: Its parameters; leaves may already be of other formats.
    globs: Patterns of canonical names, such as 'layers/*/attention/q'; '*' also matches '/'.
    rank: r, at least 1.
    scale: What updates are multiplied by (alpha / r in LoRA's terms).
    keys: Where a is drawn from, by canonical name; b is zero.

  Raises:
    InputError: a glob names nothing, some but not all layers that share a leaf, or a leaf that is
      no matrix.
  """
  if rank < 1:
    raise InputError(f"rank must be at least 1: {rank=}")
  flat = param_names.flatten(decoder.shapes)
  by_path = {path: param_names.layer_names(path, decoder.layer_groups) or [path] for path in flat}
  every = [name for several in by_path.values() for name in several]
  for glob in globs:
    if not fnmatch.filter(every, glob):
      raise InputError(f"{glob!r} names no parameter; one is {every[0]!r}")

  def swap(path: str, dims: Dims, shape: jax.ShapeDtypeStruct, weight: Any) -> Any:
    hits = [name for name in by_path[path] if any(fnmatch.fnmatchcase(name, g) for g in globs)]
    if not hits:
      return weight
    if len(hits) < len(by_path[path]):
      left_out = next(name for name in by_path[path] if name not in hits)
      raise InputError(f"{hits[0]!r} shares a leaf with {left_out!r}; name both or split the stack")
    return _zero_update(weight, by_path[path], dims, shape, (rank, scale, keys))

  paths = param_names.unflatten(decoder.shapes, {path: path for path in flat})
  return jax.tree.map(swap, paths, decoder.dims, decoder.shapes, params)


def merge_low_rank(params: Params) -> Params:
  """Returns `params` with every `LowRank` leaf replaced by its plain array."""
  is_low_rank = lambda leaf: isinstance(leaf, LowRank)  # noqa: E731
  merge = lambda leaf: leaf.merged() if is_low_rank(leaf) else leaf  # noqa: E731
  return jax.tree.map(merge, params, is_leaf=is_low_rank)


def _zero_update(
  weight: Any,
  leaf_names: list[str],
  dims: Dims,
  shape: jax.ShapeDtypeStruct,
  how: tuple[int, float, Keys],
) -> LowRank:
  """Returns `weight` under an update with b = 0; a layer's draw depends on its name alone."""
  rank, scale, keys = how
  copies, split = _parts(leaf_names[0], dims)
  lead, left, right = shape.shape[:copies], shape.shape[copies:split], shape.shape[split:]
  stacked = dims[0] == "layer"
  one = (*lead[int(stacked) :], *left, rank)
  std = 1 / math.sqrt(math.prod(left))
  drawn = [jax.random.normal(keys(name), one, jnp.float32) * std for name in leaf_names]
  a = jnp.stack(drawn) if stacked else drawn[0]
  # In float32 whatever the weight is of: these train, and small updates would round away.
  return LowRank(weight, a, jnp.zeros((*lead, rank, *right), jnp.float32), scale)


def _parts(name: str, dims: Dims) -> tuple[int, int]:
  """Returns where left starts and where right does: on the two sides of the stream's dim."""
  copies = next((at for at, dim in enumerate(dims) if dim not in _COPIES), len(dims))
  rest = dims[copies:]
  if len(rest) > 1 and rest[0] == "embed":
    return copies, copies + 1
  if len(rest) > 1 and rest[-1] == "embed":
    return copies, len(dims) - 1
  raise InputError(f"{name!r} with dims {dims} is no matrix; a low-rank update needs one")
