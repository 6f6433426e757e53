"""Linear attention over signs, with a convolution of the values beside it (ShiftAddViT)."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from jaxmoe.core.errors import InputError
from jaxmoe.core.init import Init
from jaxmoe.core.parallel_context import ONE_DEVICE, ParallelContext
from jaxmoe.core.rng import Keys
from jaxmoe.core.tokens import Tokens
from jaxmoe.core.weight_formats import dot
from jaxmoe.models.attention_base import AttentionBase, AttentionBaseLayer
from jaxmoe.models.cache import NoCache
from jaxmoe.models.masks import DocumentMask
from jaxmoe.ops.attention import binary_linear, empty_state, join_states, state_after


@dataclasses.dataclass(frozen=True)
class BinaryLinear(AttentionBase):
  """Linear attention; a token sees its document so far, which no other mask can be.

  Attributes:
    conv_width: Tokens, its own included, whose values a depthwise convolution adds to what a token
      finds: it knows their order, which the sums over keys do not. Released code: 9 about the
      token, of one weight for all entries of a head.
  """

  conv_width: int = 3

  def __post_init__(self) -> None:
    super().__post_init__()
    if self.conv_width < 2:
      raise InputError(f"conv_width must be at least 2: conv_width={self.conv_width}")
    if self.mask != DocumentMask():
      raise InputError(f"linear attention has the document mask alone: mask={self.mask}")

  def build(
    self,
    init: Init,
    dim: int,
    eps: float,
    num_experts: int = 0,
    parallel: ParallelContext = ONE_DEVICE,
  ) -> BinaryLinearLayer:
    """Returns the module with its weights."""
    del eps, parallel
    return BinaryLinearLayer(self, init, dim, num_experts)

  def empty_cache(self, batch: int, slots: int, dtype: Any) -> Recurrent:
    """Returns a state that does not grow with `slots`."""
    del slots
    sums, segment_B = empty_state(batch, self.num_kv_heads, self.head_dim)
    recent = self.conv_width - 1
    v_BWKH = jnp.zeros((batch, recent, self.num_kv_heads, self.head_dim), dtype)
    return Recurrent(sums, segment_B, v_BWKH, jnp.zeros((batch, recent), jnp.int32))

  def active_params(self, dim: int) -> int:
    """Returns how many parameters of matrices act on one token, and those of the convolution."""
    return super().active_params(dim) + self.conv_width * self.num_kv_heads * self.head_dim

  def mixing_flops(self, seq_len: int) -> float:
    """Returns FLOPs a token, forward and backward: into the sums and out of them."""
    del seq_len
    return 6.0 * (self.num_heads + self.num_kv_heads) * self.head_dim**2


@functools.partial(
  jax.tree_util.register_dataclass,
  data_fields=["sums_BKPP", "segment_B", "v_BWKH", "segment_BW"], meta_fields=[],
)  # fmt: skip
@dataclasses.dataclass(frozen=True)
class Recurrent:
  """What linear attention keeps of a row: sums over its last document, and its last values."""

  sums_BKPP: jax.Array
  segment_B: jax.Array
  v_BWKH: jax.Array
  segment_BW: jax.Array


class BinaryLinearLayer(AttentionBaseLayer):
  """The projections and the convolution's weights."""

  config: BinaryLinear

  def __init__(self, config: BinaryLinear, init: Init, dim: int, num_experts: int = 0):
    super().__init__(config, init, dim, num_experts)
    shape = (config.conv_width, config.num_kv_heads, config.head_dim)
    self.conv = init.weight("conv", shape, (None, "kv_heads", "head"), fan_in=config.conv_width)

  def __call__(
    self, x_BLD: jax.Array, tokens: Tokens, cache: Any, keys: Keys | None = None
  ) -> tuple[jax.Array, Any, None]:
    """Returns (B, L, D) in x.dtype, the state after these tokens, and no sums.

    A state is read and brought up to date at once, so it is no cache of `append` and `attend`.
    """
    del keys
    fresh = isinstance(cache, NoCache)
    q_BLNH = dot(self.q.get_value(), x_BLD, "bld,dnh->blnh")
    k_BLKH = dot(self.k.get_value(), x_BLD, "bld,dkh->blkh")
    v_BLKH = dot(self.v.get_value(), x_BLD, "bld,dkh->blkh")
    state = cache
    if fresh:
      of_kv = dataclasses.replace(
        self.config, num_heads=q_BLNH.shape[2], num_kv_heads=k_BLKH.shape[2]
      )
      state = of_kv.empty_cache(x_BLD.shape[0], 0, x_BLD.dtype)
      if cache.parallel.context_size > 1:
        state = _handed_on(state, k_BLKH, v_BLKH, tokens.segment, cache.parallel)
    out_BLNH, sums = binary_linear(
      q_BLNH, k_BLKH, v_BLKH, tokens.segment, (state.sums_BKPP, state.segment_B)
    )
    near_BLKH, recent = self._convolve(v_BLKH, tokens.segment, state)
    again = q_BLNH.shape[2] // near_BLKH.shape[2]
    out_BLNH = out_BLNH + jnp.repeat(near_BLKH, again, axis=2)
    y_BLD = dot(self.o.get_value(), out_BLNH, "blnh,nhd->bld")
    return y_BLD, cache if fresh else Recurrent(*sums, *recent), None

  def _convolve(
    self, v_BLKH: jax.Array, segment_BL: jax.Array, state: Recurrent
  ) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    """Returns each token's weighted values of its document's last ones, and those to remember."""
    back, length = self.config.conv_width - 1, v_BLKH.shape[1]
    v = jnp.concatenate([state.v_BWKH.astype(v_BLKH.dtype), v_BLKH], axis=1)
    segment = jnp.concatenate([state.segment_BW, segment_BL], axis=1)
    cuts = [slice(back - ago, back - ago + length) for ago in range(back + 1)]
    same_BLW = jnp.stack([segment[:, cut] == segment_BL for cut in cuts], axis=2)
    same_BLW = same_BLW & (segment_BL > 0)[:, :, None]
    v_BLWKH = jnp.where(same_BLW[..., None, None], jnp.stack([v[:, cut] for cut in cuts], 2), 0)
    near_BLKH = dot(self.conv.get_value(), v_BLWKH, "blwkh,wkh->blkh")
    # The last tokens up to the last valid one; padding before it belongs to no document.
    valid = jnp.where(segment_BL > 0, jnp.arange(1, length + 1)[None], 0)
    index_BW = jnp.max(valid, axis=1)[:, None] + jnp.arange(back)[None]
    kept_v = jnp.take_along_axis(v, index_BW[:, :, None, None], axis=1)
    recent = kept_v.astype(state.v_BWKH.dtype), jnp.take_along_axis(segment, index_BW, axis=1)
    return near_BLKH, recent


def _handed_on(
  empty: Recurrent, k_BLKH: jax.Array, v_BLKH: jax.Array, segment_BL: jax.Array,
  parallel: ParallelContext,
) -> Recurrent:
  """Returns the state before a device's own tokens, of the devices that have tokens before them.

  Each makes the state after its own tokens alone and sends it to all.
  """
  after = state_after((empty.sums_BKPP, empty.segment_B), k_BLKH, v_BLKH, segment_BL)
  every, rank = parallel.all_gather_context(after), parallel.context_rank()
  state = empty.sums_BKPP, empty.segment_B
  for device in range(parallel.context_size - 1):
    one = jax.tree.map(lambda leaf, at=device: leaf[at], every)
    later = join_states(state, one)
    state = jax.tree.map(lambda new, old, at=device: jnp.where(at < rank, new, old), later, state)
  before = empty.v_BWKH.shape[1]
  v_BWKH = parallel.tokens_before(v_BLKH.astype(empty.v_BWKH.dtype), before)
  return Recurrent(*state, v_BWKH, parallel.tokens_before(segment_BL, before))
