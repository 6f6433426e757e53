"""The parallel context over the axes of a mesh; each collective of TP and SP is a line here.

Tensor parallelism splits heads, hidden units and the vocabulary (Megatron, Shoeybi et al. 2019,
section 3): products into them need no exchange, products out of them give parts of a sum. With
`sequence` the stream between lies spread along the sequence (Korthikanti et al. 2022, section
4.2.2), so that the all-reduce is a reduce-scatter, and an all-gather before the next pair.

The functions that Megatron calls f and g are not needed: under the convention of
`core/parallel_context.py` an all-reduce is its own transpose, and the sums that f makes of
gradients at the start of a pair are those that the transpose at the end of the pair before makes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxmoe.core.parallel_context import ParallelContext
from jaxmoe.core.tokens import Tokens
from jaxmoe.core.weight_formats import take_rows
from jaxmoe.parallel.attend import ATTEND, ContextGroup
from jaxmoe.parallel.context_rows import spread_rows, tokens_before
from jaxmoe.parallel.degrees import Parallel
from jaxmoe.parallel.scan_prefetch import scan_with_prefetch
from jaxmoe.parallel.zero import ParamGatherer, ReduceScatter, save_all_but_weights

LENGTH = 1  # the dim of (B, L, ...) along which a sequence lies


@dataclasses.dataclass(frozen=True)
class MeshContext(ParallelContext):
  """The context of a device of the mesh of `degrees`, for use inside `shard_map` over it.

  Attributes:
    degrees: Of parallelism; the names of axes are theirs.
    params: How parameters are made ready; None for those that are ready as they are stored.
    grads: How gradients are summed over the devices; None where there are none.
  """

  degrees: Parallel
  params: ParamGatherer | None = dataclasses.field(default=None, compare=False)
  grads: ReduceScatter | None = dataclasses.field(default=None, compare=False)

  def gather_params(self, params: Any) -> Any:
    """Returns the parameters of a model ready for products, but those of its stack of layers."""
    return params if self.params is None else self.params.gather_outer(params)

  def gather_layer(self, group: str, params: Any) -> Any:
    """Returns the parameters of one run of a layer group's pattern, ready for products."""
    return params if self.params is None else self.params.gather_layer(group, params)

  @property
  def scan_with_prefetch(self) -> Callable[..., tuple[Any, Any]] | None:
    """The scan that gathers a layer's weights during the one before, where any are gathered."""
    return scan_with_prefetch if self._gathers else None

  @property
  def remat_policy(self) -> Callable[..., bool] | None:
    """The policy that keeps no gathered weights, where any are gathered."""
    return save_all_but_weights if self._gathers else None

  @property
  def shard_residual(self) -> bool:
    """Whether activations are partitioned over a tensor group (ZeRO-R)."""
    return self.degrees.partition_activations

  @property
  def stage_axis(self) -> str | None:
    """The axis over whose devices stages of layers lie; None where each device has all layers."""
    return self.degrees.axes.pipe if self.degrees.pipe > 1 else None

  @property
  def tensor_size(self) -> int:
    """The size of a tensor group."""
    return self.degrees.tensor

  @property
  def expert_degree(self) -> int:
    """Over how many devices experts are spread."""
    return self.degrees.expert_degree

  @property
  def expert_mesh(self) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """The axes experts are spread over, outermost first, and their degrees."""
    axes = tuple(axis for axis in self.degrees.expert_axes if self.degrees.axis_sizes[axis] > 1)
    return axes, tuple(self.degrees.axis_sizes[axis] for axis in axes)

  @property
  def splits_tokens(self) -> bool:
    """Whether experts fold over tensor groups."""
    return self._tensor in self.degrees.expert_axes and self.degrees.tensor > 1

  @property
  def num_row_groups(self) -> int:
    """How many groups of devices hold other rows."""
    return self.degrees.num_row_groups

  @property
  def num_token_groups(self) -> int:
    """How many groups of devices hold other tokens."""
    return self.degrees.num_token_groups

  @property
  def context_size(self) -> int:
    """The size of a context group."""
    return self.degrees.context

  def row_group(self) -> jax.Array | int:
    """Returns which row group this device is of."""
    sizes = self.degrees.axis_sizes
    axes = tuple(axis for axis in self.degrees.row_axes if sizes[axis] > 1)
    return jax.lax.axis_index(axes) if axes else 0

  def context_rank(self) -> jax.Array | int:
    """Returns which device of its context group this is."""
    return jax.lax.axis_index(self._context) if self.context_size > 1 else 0

  def psum_tokens(self, tree: Any) -> Any:
    """Returns sums over token groups."""
    axes = self._token_axes
    return jax.lax.psum(tree, axes) if axes else tree

  def psum_context(self, tree: Any) -> Any:
    """Returns sums over this device's context group."""
    return jax.lax.psum(tree, self._context) if self.context_size > 1 else tree

  def any_of_row(self, some_BL: jax.Array) -> jax.Array:
    """Returns (B,) bool, whether a row has any, on the first device of a context group."""
    some_B = super().any_of_row(some_BL)
    if self.context_size == 1:
      return some_B
    total_B = jax.lax.psum(some_B.astype(jnp.float32), self._context)
    return (total_B > 0) & (self.context_rank() == 0)

  def spread_rows(self, tokens: Tokens) -> Tokens:
    """Returns tokens whose slots are those of whole rows, of which each device knows the documents.

    Sends two int32 a token to every device of a context group, once for all layers.
    """
    if self.context_size == 1:
      return tokens
    return spread_rows(tokens, self._context, self.degrees.order == "plain")

  def attend(
    self, parts: Any, arrays: tuple[jax.Array, jax.Array, jax.Array], tokens: Tokens, mask: Any
  ) -> jax.Array:
    """Returns what queries find among the keys of their rows, by the strategy of the degrees."""
    if self.context_size == 1:
      return super().attend(parts, arrays, tokens, mask)
    return ATTEND[self.degrees.attend](parts, arrays, tokens, mask, self._context_group)

  def all_gather_context(self, tree: Any) -> Any:
    """Returns what each device of this context group has, in a new dim 0."""
    if self.context_size == 1:
      return super().all_gather_context(tree)
    return jax.lax.all_gather(tree, self._context)

  def tokens_before(self, x_BLF: jax.Array, number: int) -> jax.Array:
    """Returns (B, number, ...) of the tokens of the devices before this one."""
    if self.context_size == 1:
      return super().tokens_before(x_BLF, number)
    return tokens_before(x_BLF, number, self._context_group)

  def psum_tensor(self, tree: Any) -> Any:
    """Returns sums over this device's tensor group."""
    return jax.lax.psum(tree, self._tensor) if self.tensor_size > 1 else tree

  def all_gather_sequence(self, x_BLD: jax.Array) -> jax.Array:
    """Returns all of a row's tokens."""
    if not self.degrees.sequence:
      return x_BLD
    return jax.lax.all_gather(x_BLD, self._tensor, axis=LENGTH, tiled=True)

  def reduce_tensor(self, y_BLD: jax.Array) -> jax.Array:
    """Returns the sum over a tensor group, or this device's part of the sequence of it."""
    if self.degrees.sequence:
      return jax.lax.psum_scatter(y_BLD, self._tensor, scatter_dimension=LENGTH, tiled=True)
    return self.psum_tensor(y_BLD)

  def slice_sequence(self, y_BLD: jax.Array) -> jax.Array:
    """Returns this device's part of the sequence, or all."""
    return self._mine(y_BLD) if self.degrees.sequence else y_BLD

  def slice_tokens(self, x_BLF: jax.Array) -> jax.Array:
    """Returns this device's part of the sequence."""
    return self._mine(x_BLF)

  def all_gather_tokens(self, y_BLD: jax.Array) -> jax.Array:
    """Returns the parts of all devices of the group, or this device's, which it has already."""
    if self.degrees.sequence:
      return y_BLD
    return jax.lax.all_gather(y_BLD, self._tensor, axis=LENGTH, tiled=True)

  def embed(self, table: Any, ids_BL: jax.Array, dtype: Any, vocab_size: int) -> jax.Array:
    """Returns rows of a table of which each device holds V / n rows, the last ones maybe beyond V.

    All but one device add zeros, so that the sum is exact.
    """
    if self.vocab_axis is None:
      return take_rows(table, ids_BL, dtype)
    size = table.shape[0]
    first = jax.lax.axis_index(self.vocab_axis) * size
    here_BL = (ids_BL >= first) & (ids_BL < jnp.minimum(first + size, vocab_size))
    rows_BLD = take_rows(table, jnp.where(here_BL, ids_BL - first, 0), dtype)
    known_BL1 = ((ids_BL >= 0) & (ids_BL < vocab_size))[..., None]
    missing_BL1 = jnp.where(known_BL1, 0, jnp.nan).astype(dtype)
    rows_BLD = jnp.where(here_BL[..., None], rows_BLD, missing_BL1)
    if self.stage_axis in self.degrees.vocab_axes:
      rows_BLD = jax.lax.psum(rows_BLD, self.stage_axis)
    return self.reduce_tensor(rows_BLD)

  @property
  def vocab_axis(self) -> str | tuple[str, ...] | None:
    """The axis, or axes, over which embedding and head are spread along the vocabulary."""
    axes = self.degrees.vocab_axes
    return axes[0] if len(axes) == 1 else axes or None

  @property
  def _gathers(self) -> bool:
    """Whether any parameter is gathered, so that the backward pass should gather it again."""
    return self.params is not None and self.params.any

  @property
  def _tensor(self) -> str:
    """The axis of a tensor group."""
    return self.degrees.axes.tensor

  @property
  def _context(self) -> str:
    """The axis of a context group."""
    return self.degrees.axes.context

  @property
  def _context_group(self) -> ContextGroup:
    """The devices that have parts of the same rows."""
    in_order, apart = self.degrees.order == "plain", self.degrees.pipe > 1
    return ContextGroup(self._context, self.context_size, in_order, permutes=not apart)

  @property
  def _token_axes(self) -> tuple[str, ...]:
    """Axes of more than one device whose devices hold different tokens."""
    return tuple(axis for axis in self.degrees.token_axes if self.degrees.axis_sizes[axis] > 1)

  def _mine(self, x_BLF: jax.Array) -> jax.Array:
    """Returns this device's part of a row."""
    size = x_BLF.shape[LENGTH] // self.tensor_size
    return jax.lax.dynamic_slice_in_dim(
      x_BLF, jax.lax.axis_index(self._tensor) * size, size, axis=LENGTH
    )
