"""Grouped-query attention with rotary positions and optional QK norm."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import jax
from flax import nnx

from jaxmoe.core.errors import InputError
from jaxmoe.core.parameters import Init
from jaxmoe.core.recipe import choice
from jaxmoe.core.tokens import Tokens
from jaxmoe.core.weights import dot
from jaxmoe.models.cache import Cache
from jaxmoe.models.masks import MASKS, Document
from jaxmoe.models.norm import RMSNorm
from jaxmoe.ops.rope import rope


@dataclasses.dataclass(frozen=True)
class Attention:
  """Grouped-query attention (Ainslie et al. 2023).

  Attributes:
    num_heads: N, query heads.
    num_kv_heads: K, key and value heads; each serves N / K query heads.
    head_dim: H, size of a head; even, because positions turn pairs.
    rope_theta: Base of the rotary angles (Su et al. 2021).
    qk_norm: Where queries and keys get an RMSNorm before rotation: nowhere, over each head
      (Qwen3), or over all heads at once (OLMoE).
    mask: Which tokens a token sees.
  """

  num_heads: int = 4
  num_kv_heads: int = 4
  head_dim: int = 32
  rope_theta: float = 10_000.0
  qk_norm: Literal["none", "head", "all"] = "none"
  mask: Any = choice(MASKS, Document())

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
    if self.head_dim % 2:
      raise InputError(f"head_dim must be even: head_dim={self.head_dim}")
    if self.rope_theta <= 1:
      raise InputError(f"rope_theta must be above 1: rope_theta={self.rope_theta}")

  def build(self, init: Init, dim: int, eps: float) -> AttentionLayer:
    """Returns the module with its weights."""
    return AttentionLayer(self, init, dim, eps)

  def num_params(self, dim: int) -> int:
    """Returns the number of parameters of the four projections."""
    return 2 * dim * (self.num_heads + self.num_kv_heads) * self.head_dim


class AttentionLayer(nnx.Module):
  """Projections to queries, keys and values; a cache attends; a projection back."""

  def __init__(self, config: Attention, init: Init, dim: int, eps: float):
    self.config = config
    queries, keys, size = config.num_heads, config.num_kv_heads, config.head_dim
    self.q = init.weight("q", (dim, queries, size), ("embed", "heads", "head"), fan_in=dim)
    self.k = init.weight("k", (dim, keys, size), ("embed", "kv_heads", "head"), fan_in=dim)
    self.v = init.weight("v", (dim, keys, size), ("embed", "kv_heads", "head"), fan_in=dim)
    self.o = init.residual(
      "o", (queries, size, dim), ("heads", "head", "embed"), fan_in=queries * size
    )
    self.q_norm = self._norm(init / "q_norm", queries, eps)
    self.k_norm = self._norm(init / "k_norm", keys, eps)

  def __call__(self, x_BLD: jax.Array, tokens: Tokens, cache: Cache) -> tuple[jax.Array, Cache]:
    """Returns (B, L, D) in x.dtype and the cache with these tokens in it."""
    q_BLNH = self._turn(dot(self.q.get_value(), x_BLD, "bld,dnh->blnh"), self.q_norm, tokens)
    k_BLKH = self._turn(dot(self.k.get_value(), x_BLD, "bld,dkh->blkh"), self.k_norm, tokens)
    v_BLKH = dot(self.v.get_value(), x_BLD, "bld,dkh->blkh")
    cache = cache.append(k_BLKH, v_BLKH, tokens)
    out_BLNH = cache.attend(q_BLNH, tokens, self.config.mask)
    return dot(self.o.get_value(), out_BLNH, "blnh,nhd->bld"), cache

  def _norm(self, init: Init, heads: int, eps: float) -> RMSNorm | None:
    widths = {"none": 0, "head": 1, "all": heads}
    width = widths[self.config.qk_norm] * self.config.head_dim
    return RMSNorm(init, width, eps, "head") if width else None

  def _turn(self, heads_BLNH: jax.Array, norm: RMSNorm | None, tokens: Tokens) -> jax.Array:
    if norm is not None:
      flat = (*heads_BLNH.shape[:2], -1, norm.scale.shape[0])
      heads_BLNH = norm(heads_BLNH.reshape(flat)).reshape(heads_BLNH.shape)
    return rope(heads_BLNH, tokens.position, self.config.rope_theta)
