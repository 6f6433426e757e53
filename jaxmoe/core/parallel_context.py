"""The parallel context of a layer: collectives (TP, SP) that model code asks for by name.

Model code is written for one device. Where the arrays of a layer may lie on several it says what
it needs, `all_gather_sequence` before a pair of products, `reduce_tensor` after it, and never names
an axis of the mesh. `ParallelContext` is one device, where nothing moves;
`jaxmoe/parallel/mesh_context.py` has the mesh (tensor and sequence parallelism, TP and SP).

One convention makes every gradient right: **what each device adds to the loss sums to the loss
over all devices, and the gradient of a parameter is the sum over the devices that hold it.** A
device differentiates its own share. The transpose of a collective then hands each device what its
own copy of a value did to the sum; copies need not agree on the way back, only add up.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxmoe.core.backends import HERE, Chooser
from jaxmoe.core.layout import Layout
from jaxmoe.core.tokens import Tokens
from jaxmoe.core.weight_formats import take_rows


@dataclasses.dataclass(frozen=True)
class ParallelContext:
  """One device: every array is whole where it is.

  Devices of a *tensor group* see the same tokens and hold parts of heads, hidden units and the
  vocabulary; devices of different *token groups* see different tokens: other rows, or other parts
  of the same rows, as those of a *context group* do. A *row group* sees other rows.

  Attributes:
    chooser: What chooses back ends for the devices that the program is for.
    layout: Where the arrays of a whole program lie; None where nobody says so.
  """

  chooser: Chooser = dataclasses.field(default=HERE, kw_only=True)
  layout: Layout | None = dataclasses.field(default=None, kw_only=True, compare=False)

  @property
  def tensor_size(self) -> int:
    """How many devices compute the same share of the loss: the size of a tensor group."""
    return 1

  @property
  def expert_degree(self) -> int:
    """Over how many devices experts are spread."""
    return 1

  @property
  def expert_mesh(self) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """The axes experts are spread over, outermost first, and their degrees."""
    return (), ()

  @property
  def splits_tokens(self) -> bool:
    """Whether experts are spread over tensor groups too, whose devices then share the tokens."""
    return False

  @property
  def num_row_groups(self) -> int:
    """How many row groups there are: groups of devices that hold other rows."""
    return 1

  @property
  def num_token_groups(self) -> int:
    """How many token groups there are: groups of devices that hold other tokens."""
    return 1

  @property
  def context_size(self) -> int:
    """Over how many devices the tokens of a row are spread: the size of a context group."""
    return 1

  def row_group(self) -> jax.Array | int:
    """Returns which row group this device is of; rows of a batch lie on them in order."""
    return 0

  def context_rank(self) -> jax.Array | int:
    """Returns which device of its context group this is."""
    return 0

  def psum_tokens(self, tree: Any) -> Any:
    """Returns sums over token groups."""
    return tree

  def psum_context(self, tree: Any) -> Any:
    """Returns sums over this device's context group: of whole rows, where it has parts of them."""
    return tree

  def any_of_row(self, some_BL: jax.Array) -> jax.Array:
    """Returns (B,) bool, whether a row has any; said by one device of those that have parts."""
    return jnp.any(some_BL, axis=1)

  def spread_rows(self, tokens: Tokens) -> Tokens:
    """Returns tokens that know their place in rows of which devices have parts."""
    return tokens

  def attend(
    self, parts: Any, arrays: tuple[jax.Array, jax.Array, jax.Array], tokens: Tokens, mask: Any
  ) -> jax.Array:
    """Returns (B, L, N, P), what queries find among the keys of their rows.

    Args:
      parts: A kind of attention, see `AttentionParts` of ops/attention.
      arrays: Queries, keys and values of these tokens.
      tokens: Those of this device.
      mask: Which keys a query sees, called on query and key tokens.
    """
    q_BLNH, k_BSKH, v_BSKP = arrays
    return parts.attend(q_BLNH, k_BSKH, v_BSKP, mask(tokens, tokens))

  def all_gather_context(self, tree: Any) -> Any:
    """Returns what each device of this context group has, in order, in a new dim 0."""
    return jax.tree.map(lambda leaf: leaf[None], tree)

  def tokens_before(self, x_BLF: jax.Array, number: int) -> jax.Array:
    """Returns (B, number, ...): of the tokens before a device's own; zeros before the first."""
    return jnp.zeros((x_BLF.shape[0], number, *x_BLF.shape[2:]), x_BLF.dtype)

  def psum_tensor(self, tree: Any) -> Any:
    """Returns sums over this device's tensor group."""
    return tree

  def all_gather_sequence(self, x_BLD: jax.Array) -> jax.Array:
    """Returns all of a row's tokens, for products whose outputs are spread over a tensor group."""
    return x_BLD

  def reduce_tensor(self, y_BLD: jax.Array) -> jax.Array:
    """Returns the stream's part of what the devices of a tensor group found together."""
    return y_BLD

  def slice_sequence(self, y_BLD: jax.Array) -> jax.Array:
    """Returns the stream's part of what every device of a tensor group found by itself."""
    return y_BLD

  def slice_tokens(self, x_BLF: jax.Array) -> jax.Array:
    """Returns this device's share of a row's tokens, of which its tensor group has them all."""
    return x_BLF

  def all_gather_tokens(self, y_BLD: jax.Array) -> jax.Array:
    """Returns the stream's part of what devices found for their shares of a row's tokens."""
    return y_BLD

  def embed(self, table: Any, ids_BL: jax.Array, dtype: Any, vocab_size: int) -> jax.Array:
    """Returns the stream's part of rows of a table; NaN for an id outside the vocabulary."""
    del vocab_size
    return take_rows(table, ids_BL, dtype)

  def gather_params(self, params: Any) -> Any:
    """Returns the parameters of a model ready for products, but those of its stack of layers.

    These stay as they are stored, until `gather_layer` makes those of one layer ready.
    """
    return params

  def gather_layer(self, group: str, params: Any) -> Any:
    """Returns the parameters of one run of a layer group's pattern, ready for products."""
    del group
    return params

  @property
  def scan_with_prefetch(self) -> Callable[..., tuple[Any, Any]] | None:
    """What runs layers whose weights are gathered ahead, in place of a scan (FSDP).

    It is called with (step, gather, state, stored leaves, unroll) and returns (state, outputs);
    None where nothing is gathered.
    """
    return None

  @property
  def remat_policy(self) -> Callable[..., bool] | None:
    """The remat policy in place of keeping all, for weights that are not to be kept."""
    return None

  @property
  def shard_residual(self) -> bool:
    """Whether devices keep their share of the stream alone between layers that are made again."""
    return False

  @property
  def vocab_axis(self) -> str | tuple[str, ...] | None:
    """The axis, or axes, over which embedding and head are spread along the vocabulary."""
    return None


ONE_DEVICE = ParallelContext()
