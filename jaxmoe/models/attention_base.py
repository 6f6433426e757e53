"""The base of all kinds of attention: grouped-query heads over a KV cache, and their weights.

A kind is a record derived from `AttentionBase`; ATTENTION in `block.py` lists them. Its module is
called as `layer(x_BLD, tokens, cache, keys)` and returns the output, the cache with these tokens in
it and the sums of its router, None where it has none.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
from flax import nnx

from jaxmoe.core.config_io import choice
from jaxmoe.core.errors import InputError
from jaxmoe.core.init import Init
from jaxmoe.core.parallel_context import ONE_DEVICE, ParallelContext
from jaxmoe.core.rng import Keys
from jaxmoe.core.tokens import Tokens
from jaxmoe.core.weight_formats import dot
from jaxmoe.models.cache import Cache, KVCache
from jaxmoe.models.masks import MASKS, DocumentMask
from jaxmoe.ops.attention import AttentionParts, Sight


@dataclasses.dataclass(frozen=True)
class AttentionBase:
  """The base of kinds of attention (grouped queries: Ainslie et al. 2023).

  Attributes:
    num_heads: N, query heads.
    num_kv_heads: K, key and value heads; each serves N / K query heads.
    head_dim: H, size of a head.
    mask: Which tokens a token sees.
  """

  num_heads: int = 4
  num_kv_heads: int = 4
  head_dim: int = 32
  mask: Any = choice(MASKS, DocumentMask())

  def __post_init__(self) -> None:
    if min(self.num_heads, self.num_kv_heads, self.head_dim) < 1:
      raise InputError(
        "num_heads, num_kv_heads and head_dim must be at least 1: "
        f"{self.num_heads}, {self.num_kv_heads}, {self.head_dim}"
      )
    if self.num_heads % self.num_kv_heads:
      raise InputError(
        "num_heads must be a multiple of num_kv_heads: "
        f"num_heads={self.num_heads}, num_kv_heads={self.num_kv_heads}"
      )

  def build(
    self,
    init: Init,
    dim: int,
    eps: float,
    num_experts: int = 0,
    parallel: ParallelContext = ONE_DEVICE,
  ) -> AttentionBaseLayer:
    """Returns the module with its weights; with experts, each has its own queries and outputs."""
    raise NotImplementedError

  def empty_cache(self, batch: int, slots: int, dtype: Any) -> Any:
    """Returns a cache of `slots` tokens a row."""
    return KVCache.empty(batch, slots, (self.num_kv_heads, self.head_dim), dtype)

  def active_params(self, dim: int) -> int:
    """Returns how many parameters of matrices act on one token."""
    return 2 * dim * (self.num_heads + self.num_kv_heads) * self.head_dim

  def mixing_flops(self, seq_len: int) -> float:
    """Returns FLOPs a token, forward and backward, of what mixes tokens.

    12 * heads * head size * mean visible keys, for the two products of attention (PaLM, appendix
    B, halved for causality).
    """
    return 12.0 * self.num_heads * self.head_dim * (seq_len + 1) / 2


class AttentionBaseLayer(nnx.Module):
  """Projections to queries, keys and values; a cache attends; a projection back.

  A kind says what attends, whole and in parts, and may override the other methods.
  """

  def __init__(
    self, config: AttentionBase, init: Init, dim: int, num_experts: int = 0,
    parallel: ParallelContext = ONE_DEVICE,
  ):
    self.config, self.chooser = config, parallel.chooser
    queries, keys, size = config.num_heads, config.num_kv_heads, config.head_dim
    wide = queries * size
    if num_experts:
      q_shape, o_shape = (num_experts, dim, queries, size), (num_experts, wide, dim)
      self.q = init.weight("q", q_shape, ("local_expert", "embed", "heads", "head"), fan_in=dim)
      self.o = init.residual("o", o_shape, ("local_expert", "heads", "embed"), fan_in=wide)
    else:
      self.q = init.weight("q", (dim, queries, size), ("embed", "heads", "head"), fan_in=dim)
      self.o = init.residual("o", (queries, size, dim), ("heads", "head", "embed"), fan_in=wide)
    self.k = init.weight("k", (dim, keys, size), ("embed", "kv_heads", "head"), fan_in=dim)
    self.v = init.weight("v", (dim, keys, size), ("embed", "kv_heads", "head"), fan_in=dim)

  def __call__(
    self, x_BLD: jax.Array, tokens: Tokens, cache: Cache, keys: Keys | None = None
  ) -> tuple[jax.Array, Cache, None]:
    """Returns (B, L, D) in x.dtype, the cache with these tokens in it, and no sums."""
    del keys
    # Tokens in one dim, once for the three products: each keeps what it multiplied.
    x_TD = x_BLD.reshape(-1, x_BLD.shape[-1])
    q_BLNH = self._heads(x_TD, "q", tokens)
    q_BLNH = self.apply_rope(q_BLNH, tokens, "q", cache.max_length(tokens))
    cache = self.update_cache(x_TD, tokens, cache)
    out_BLNH = cache.attend(q_BLNH, tokens, self.config.mask, self.parts())
    return self.project_out(out_BLNH, tokens), cache, None

  def update_cache(self, x_TD: jax.Array, tokens: Tokens, cache: Cache) -> Cache:
    """Returns the cache with the keys and values of these tokens in it."""
    k_BLKH = self._heads(x_TD, "k", tokens)
    k_BLKH = self.apply_rope(k_BLKH, tokens, "k", cache.max_length(tokens))
    return cache.append(k_BLKH, self._heads(x_TD, "v", tokens), tokens)

  def _heads(self, x_TD: jax.Array, which: str, tokens: Tokens) -> jax.Array:
    """Returns what `project` does, as (B, L, heads, H)."""
    heads_TNH = self.project(x_TD, which)
    return heads_TNH.reshape(tokens.id.shape[0], -1, *heads_TNH.shape[1:])

  def project(self, x_TD: jax.Array, which: str) -> jax.Array:
    """Returns queries (`which` is q), keys (k) or values (v) of tokens."""
    letter = "n" if which == "q" else "k"
    return dot(getattr(self, which).get_value(), x_TD, f"td,d{letter}h->t{letter}h")

  def apply_rope(self, heads_BLNH: jax.Array, tokens: Tokens, which: str, length: int) -> jax.Array:
    """Returns queries (`which` is q) or keys (k) as they meet in rows of so many tokens."""
    del tokens, which, length
    return heads_BLNH

  def attend(
    self, q_BLNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, sight: Sight
  ) -> jax.Array:
    """Returns (B, L, N, H), what queries find among keys."""
    raise NotImplementedError

  def parts(self) -> AttentionParts:
    """Returns the kind as parts of the keys, for rows that are spread over devices."""
    raise NotImplementedError

  def project_out(self, out_BLNH: jax.Array, tokens: Tokens) -> jax.Array:
    """Returns (B, L, D) of what all heads found; zeros for padding."""
    del tokens  # it has found nothing
    return dot(self.o.get_value(), out_BLNH, "blnh,nhd->bld")
