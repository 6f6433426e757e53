"""Latent attention (MLA): keys and values are made of a few numbers a token, and those are cached.

DeepSeek-V2 (arXiv:2405.04434, section 2.1 and appendix C), DeepSeek-V3 (arXiv:2412.19437, 2.1.1).
Positions turn channels of their own, of which the key has one set for all heads:

  c = norm(W_dkv x), k_rope = turn(W_kr x); a head's key is [W_uk c, k_rope], its value W_uv c.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jaxmoe.core.backends import HERE, Chooser
from jaxmoe.core.config_io import choice
from jaxmoe.core.errors import InputError
from jaxmoe.core.init import Init
from jaxmoe.core.parallel_context import ONE_DEVICE, ParallelContext
from jaxmoe.core.rng import Keys
from jaxmoe.core.tokens import Tokens
from jaxmoe.core.weight_formats import dot
from jaxmoe.models.cache import Cache, KVCache
from jaxmoe.models.masks import MASKS, DocumentMask
from jaxmoe.models.norm_layers import RMSNorm
from jaxmoe.models.rope_scaling import ROPES, PlainRope
from jaxmoe.ops.attention import (
  BACKENDS,
  SOFTMAX_PARTS,
  AttentionPart,
  AttentionParts,
  Sight,
  attend,
)
from jaxmoe.ops.rope import rope


@dataclasses.dataclass(frozen=True)
class LatentAttention:
  """Attention over latents; by default of DeepSeek-V3's sizes.

  Attributes:
    num_heads: N, heads of queries, and of keys and values once they are made.
    head_dim: Channels of a query or key that know no position (qk_nope_head_dim).
    rope_dim: Channels that positions turn (qk_rope_head_dim); even.
    value_dim: Channels of a value (v_head_dim).
    latent_dim: C, what keys and values of a token are made of (kv_lora_rank).
    query_dim: What its queries are made of, after a norm (q_lora_rank); None for x itself.
    mask: Which tokens a token sees.
    rope_theta: Base of the rotary angles.
    rope: How angles are stretched for long texts; its `softmax_gain` multiplies scores.
    neighbours: Whether a rotary pair is channels 2i and 2i + 1 (DeepSeek's rope_interleave), not
      i and i + rope_dim / 2.
    norm_eps: Of the two norms, whatever the rest of the model has (as released).
  """

  num_heads: int = 128
  head_dim: int = 128
  rope_dim: int = 64
  value_dim: int = 128
  latent_dim: int = 512
  query_dim: int | None = 1536
  mask: Any = choice(MASKS, DocumentMask())
  rope_theta: float = 10_000.0
  rope: Any = choice(ROPES, PlainRope())
  neighbours: bool = True
  norm_eps: float = 1e-6

  def __post_init__(self) -> None:
    sizes = (self.num_heads, self.head_dim, self.rope_dim, self.value_dim, self.latent_dim)
    if min(*sizes, self.query_dim or 1) < 1 or self.query_dim == 0:
      raise InputError(
        "num_heads, head_dim, rope_dim, value_dim, latent_dim and query_dim must be at least 1: "
        f"{', '.join(map(str, sizes))}, {self.query_dim}; query_dim=none for queries of x itself"
      )
    if self.rope_dim % 2:
      raise InputError(f"rope_dim must be even: rope_dim={self.rope_dim}")
    if self.rope_theta <= 1 or self.norm_eps <= 0:
      raise InputError(
        "rope_theta must be above 1 and norm_eps above 0: "
        f"rope_theta={self.rope_theta}, norm_eps={self.norm_eps}"
      )
    self.rope.check(self.rope_dim)

  @property
  def scale(self) -> float:
    """What scores are multiplied by."""
    return (self.head_dim + self.rope_dim) ** -0.5 * self.rope.softmax_gain

  def build(
    self, init: Init, dim: int, eps: float, parallel: ParallelContext = ONE_DEVICE
  ) -> LatentAttentionLayer:
    """Returns the module with its weights."""
    del eps
    return LatentAttentionLayer(self, init, dim, parallel.chooser)

  def empty_cache(self, batch: int, slots: int, dtype: Any) -> Any:
    """Returns a cache of C + rope_dim numbers a token, whatever the number of heads."""
    return KVCache.empty(batch, slots, (1, self.latent_dim), dtype, (1, self.rope_dim))

  def active_params(self, dim: int) -> int:
    """Returns how many parameters of matrices act on one token."""
    wide, heads = self.head_dim + self.rope_dim, self.num_heads
    queries = dim * heads * wide
    if self.query_dim is not None:
      queries = self.query_dim * (dim + heads * wide)
    down = dim * (self.latent_dim + self.rope_dim)
    up = self.latent_dim * heads * (self.head_dim + self.value_dim)
    return queries + down + up + heads * self.value_dim * dim

  def mixing_flops(self, seq_len: int) -> float:
    """Returns FLOPs a token, forward and backward, of what mixes tokens, see `AttentionBase`."""
    wide = self.head_dim + self.rope_dim + self.value_dim
    return 6.0 * self.num_heads * wide * (seq_len + 1) / 2


class LatentAttentionLayer(nnx.Module):
  """Down to latents, up to heads, attention, a projection back."""

  def __init__(self, config: LatentAttention, init: Init, dim: int, chooser: Chooser = HERE):
    self.config, self.chooser = config, chooser
    heads, size, turned = config.num_heads, config.head_dim, config.rope_dim
    latent, value, query = config.latent_dim, config.value_dim, config.query_dim
    up = ("latent", "heads", "head")
    if query is None:
      shape = (dim, heads, size + turned)
      self.q = init.weight("q", shape, ("embed", "heads", "head"), fan_in=dim)
      self.q_down = self.q_norm = None
    else:
      self.q_down = init.weight("q_down", (dim, query), ("embed", "latent"), fan_in=dim)
      self.q_norm = RMSNorm(init / "q_norm", query, config.norm_eps, "latent")
      self.q = init.weight("q", (query, heads, size + turned), up, fan_in=query)
    self.down = init.weight("down", (dim, latent), ("embed", "latent"), fan_in=dim)
    self.norm = RMSNorm(init / "norm", latent, config.norm_eps, "latent")
    self.k_rope = init.weight("k_rope", (dim, turned), ("embed", "head"), fan_in=dim)
    self.k = init.weight("k", (latent, heads, size), up, fan_in=latent)
    self.v = init.weight("v", (latent, heads, value), up, fan_in=latent)
    shape = (heads, value, dim)
    self.o = init.residual("o", shape, ("heads", "head", "embed"), fan_in=heads * value)

  def __call__(
    self, x_BLD: jax.Array, tokens: Tokens, cache: Cache, keys: Keys | None = None
  ) -> tuple[jax.Array, Cache, None]:
    """Returns (B, L, D) in x.dtype, the cache with these tokens in it, and no sums."""
    del keys
    q_BLNH = self._queries(x_BLD, tokens, cache.max_length(tokens))
    latent_BLC = self.norm(dot(self.down.get_value(), x_BLD, "bld,dc->blc"))
    turned_BLR = dot(self.k_rope.get_value(), x_BLD, "bld,dr->blr")
    turned_BL1R = self._apply_rope(turned_BLR[:, :, None], tokens, cache.max_length(tokens))
    cache = cache.append(latent_BLC[:, :, None], turned_BL1R, tokens)
    out_BLNH = cache.attend(q_BLNH, tokens, self.config.mask, self.parts())
    return dot(self.o.get_value(), out_BLNH, "blnh,nhd->bld"), cache, None

  def _queries(self, x_BLD: jax.Array, tokens: Tokens, length: int) -> jax.Array:
    """Returns (B, L, N, H + R), the last R channels turned."""
    if self.q_down is not None:
      assert self.q_norm is not None
      x_BLD = self.q_norm(dot(self.q_down.get_value(), x_BLD, "bld,dc->blc"))
    q_BLNH = dot(self.q.get_value(), x_BLD, "bld,dnh->blnh")
    still, turned = jnp.split(q_BLNH, [self.config.head_dim], axis=-1)
    return jnp.concatenate([still, self._apply_rope(turned, tokens, length)], axis=-1)

  def _apply_rope(self, heads_BLNR: jax.Array, tokens: Tokens, length: int) -> jax.Array:
    config = self.config
    frequency_P = config.rope.frequencies(config.rope_theta, config.rope_dim, length)
    gain = config.rope.gain(length)
    return rope(heads_BLNR, tokens.position, frequency_P, gain, config.neighbours)

  def parts(self) -> AttentionParts:
    """Returns the kind as parts of the keys, which are latents until a part is found."""
    chooser, scale = self.chooser, self.config.scale
    weights = self.k.get_value(), self.v.get_value()

    def part(
      weights: Any, q_BLNH: jax.Array, latent_BS1C: jax.Array, turned_BS1R: jax.Array, sight: Sight
    ) -> AttentionPart:
      k_BSNH, v_BSNP = _keys_and_values(weights, latent_BS1C, turned_BS1R, q_BLNH.dtype)
      sight = dataclasses.replace(sight, scale=scale)
      return attend(chooser, ("attention", BACKENDS), q_BLNH, k_BSNH, v_BSNP, sight)

    def whole(
      q_BLNH: jax.Array, latent_BS1C: jax.Array, turned_BS1R: jax.Array, sight: Sight
    ) -> jax.Array:
      found = part(weights, q_BLNH, latent_BS1C, turned_BS1R, sight)
      return found.out_BLNP.astype(q_BLNH.dtype)

    return AttentionParts(whole, part, weights, lambda total: total.out_BLNP, SOFTMAX_PARTS)


def _keys_and_values(
  weights: Any, latent_BS1C: jax.Array, turned_BS1R: jax.Array, dtype: Any
) -> tuple[jax.Array, jax.Array]:
  """Returns (B, S, N, H + R) keys and (B, S, N, H') values, made of latents."""
  latent_BSC = latent_BS1C[:, :, 0].astype(dtype)
  still_BSNH = dot(weights[0], latent_BSC, "bsc,cnh->bsnh")
  shape = (*still_BSNH.shape[:3], turned_BS1R.shape[-1])
  turned_BSNR = jnp.broadcast_to(turned_BS1R.astype(dtype), shape)
  k_BSNH = jnp.concatenate([still_BSNH, turned_BSNR], axis=-1)
  return k_BSNH, dot(weights[1], latent_BSC, "bsc,cnh->bsnh")
