"""The usual attention: softmax, rotary positions, and what families of models add to it."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx

from jaxmoe.core.backends import Chooser
from jaxmoe.core.config_io import choice
from jaxmoe.core.errors import InputError
from jaxmoe.core.init import Init
from jaxmoe.core.layout import ONCE, Dims
from jaxmoe.core.parallel_context import ONE_DEVICE, ParallelContext
from jaxmoe.core.tokens import Tokens
from jaxmoe.models.attention_base import AttentionBase, AttentionBaseLayer
from jaxmoe.models.norm_layers import HeadsNorm, RMSNorm
from jaxmoe.models.rope_scaling import ROPES, PlainRope
from jaxmoe.ops.attention import (
  BACKENDS,
  SOFTMAX_PARTS,
  AttentionPart,
  AttentionParts,
  Sight,
  attend,
  join_sink,
)
from jaxmoe.ops.rope import rope


@dataclasses.dataclass(frozen=True)
class SoftmaxAttention(AttentionBase):
  """Softmax attention; head_dim must be even, because positions turn pairs.

  Attributes:
    rope_theta: Base of the rotary angles (Su et al. 2021).
    rope: How angles are stretched for long texts.
    qk_norm: Where queries and keys get an RMSNorm before rotation: nowhere, over each head
      (Qwen3), or over all heads at once (OLMoE).
    bias: What has a bias: nothing, queries, keys and values (Qwen2), or the output as well
      (gpt-oss, Phi).
    clip: Queries, keys and values are cut off at this and its negative, after a norm (OLMoE); None
      for no limit.
    scale: What scores are multiplied by; None for 1 / sqrt(head_dim) (Granite's multiplier).
    sinks: Whether a learnt score of each query head takes its share of the softmax and gives
      nothing for it (gpt-oss; Xiao et al. 2023, arXiv:2309.17453).
  """

  rope_theta: float = 10_000.0
  rope: Any = choice(ROPES, PlainRope())
  qk_norm: Literal["none", "head", "all"] = "none"
  bias: Literal["none", "qkv", "all"] = "none"
  clip: float | None = None
  scale: float | None = None
  sinks: bool = False

  def __post_init__(self) -> None:
    super().__post_init__()
    if self.head_dim % 2:
      raise InputError(f"head_dim must be even: head_dim={self.head_dim}")
    if self.rope_theta <= 1:
      raise InputError(f"rope_theta must be above 1: rope_theta={self.rope_theta}")
    self.rope.check(self.head_dim)
    for name in ("clip", "scale"):
      value = getattr(self, name)
      if value is not None and value <= 0:
        raise InputError(f"{name} must be above 0: {name}={value}; or none to go without")

  def build(
    self,
    init: Init,
    dim: int,
    eps: float,
    num_experts: int = 0,
    parallel: ParallelContext = ONE_DEVICE,
  ) -> SoftmaxAttentionLayer:
    """Returns the module with its weights."""
    return SoftmaxAttentionLayer(self, init, dim, eps, num_experts, parallel)


class SoftmaxAttentionLayer(AttentionBaseLayer):
  """The weights of softmax attention."""

  config: SoftmaxAttention

  def __init__(
    self, config: SoftmaxAttention, init: Init, dim: int, eps: float, num_experts: int = 0,
    parallel: ParallelContext = ONE_DEVICE,
  ):
    super().__init__(config, init, dim, num_experts, parallel)
    queries, keys, size = config.num_heads, config.num_kv_heads, config.head_dim
    self.q_norm = self._norm(init / "q_norm", (queries, size), ("heads", "head"), eps, parallel)
    self.k_norm = self._norm(init / "k_norm", (keys, size), ("kv_heads", "head"), eps, parallel)
    has = config.bias != "none"
    self.q_bias = init.zeros((queries, size), ("heads", "head")) if has else None
    self.k_bias = init.zeros((keys, size), ("kv_heads", "head")) if has else None
    self.v_bias = init.zeros((keys, size), ("kv_heads", "head")) if has else None
    self.o_bias = init.zeros((dim,), (ONCE,)) if config.bias == "all" else None
    self.sink_bias = init.zeros((queries,), ("heads",)) if config.sinks else None

  def project(self, x_TD: jax.Array, which: str) -> jax.Array:
    """Returns queries, keys or values of tokens, values within the limit."""
    bias = getattr(self, f"{which}_bias")
    heads_TNH = _plus(super().project(x_TD, which), bias)
    return self._clip(heads_TNH) if which == "v" else heads_TNH

  def apply_rope(self, heads_BLNH: jax.Array, tokens: Tokens, which: str, length: int) -> jax.Array:
    """Returns heads normalised, within the limit and turned by their positions."""
    norm = self.q_norm if which == "q" else self.k_norm
    if norm is not None:
      heads_BLNH = norm(heads_BLNH)
    config = self.config
    frequency_P = config.rope.frequencies(config.rope_theta, config.head_dim, length)
    return rope(self._clip(heads_BLNH), tokens.position, frequency_P, config.rope.gain(length))

  def attend(
    self, q_BLNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, sight: Sight
  ) -> jax.Array:
    """Returns (B, L, N, H), what queries find among keys."""
    return self.parts().attend(q_BLNH, k_BSKH, v_BSKH, sight)

  def parts(self) -> AttentionParts:
    """Returns the kind as parts of the keys; sinks join last."""
    scale = self.config.head_dim**-0.5 if self.config.scale is None else self.config.scale
    sink_N = None if self.sink_bias is None else self.sink_bias.get_value()
    return softmax_parts(self.chooser, scale, sink_N)

  def project_out(self, out_BLNH: jax.Array, tokens: Tokens) -> jax.Array:
    """Returns (B, L, D) of what all heads found; zeros for padding."""
    y_BLD = super().project_out(out_BLNH, tokens)
    if self.o_bias is None:
      return y_BLD
    return jnp.where(tokens.valid[:, :, None], _plus(y_BLD, self.o_bias), y_BLD)

  def _clip(self, heads_BLNH: jax.Array) -> jax.Array:
    limit = self.config.clip
    return heads_BLNH if limit is None else jnp.clip(heads_BLNH, -limit, limit)

  def _norm(
    self, init: Init, shape: tuple[int, int], dims: Dims, eps: float, parallel: ParallelContext
  ) -> RMSNorm | HeadsNorm | None:
    if self.config.qk_norm == "head":
      return RMSNorm(init, shape[1], eps, "head")
    return HeadsNorm(init, shape, dims, eps, parallel) if self.config.qk_norm == "all" else None


def softmax_parts(
  chooser: Chooser, scale: float, sink_N: jax.Array | None = None
) -> AttentionParts:
  """Returns softmax attention, whole and as parts of the keys.

  Args:
    chooser: Of back ends.
    scale: What scores are multiplied by.
    sink_N: One more score of every query head; None for none.
  """
  operation = ("attention", BACKENDS)

  def whole(q_BLNH: jax.Array, k_BSKH: jax.Array, v_BSKP: jax.Array, sight: Sight) -> jax.Array:
    sight = dataclasses.replace(sight, scale=scale, sink_N=sink_N)
    part = attend(chooser, operation, q_BLNH, k_BSKH, v_BSKP, sight)
    return part.out_BLNP.astype(q_BLNH.dtype)

  def part(weights: Any, q: jax.Array, k: jax.Array, v: jax.Array, sight: Sight) -> AttentionPart:
    del weights
    return attend(chooser, operation, q, k, v, dataclasses.replace(sight, scale=scale))

  def of_heads(first: jax.Array | int, number: int) -> AttentionParts:
    mine = None if sink_N is None else jax.lax.dynamic_slice_in_dim(sink_N, first, number)
    return softmax_parts(chooser, scale, mine)

  def finalize(total: AttentionPart) -> jax.Array:
    return join_sink(total, sink_N).out_BLNP

  return AttentionParts(whole, part, (), finalize, SOFTMAX_PARTS, of_heads)


def _plus(x: jax.Array, bias: nnx.Param | None) -> jax.Array:
  """Returns x and a bias of its last dims, in x.dtype."""
  if bias is None:
    return x
  value = bias.get_value()
  return x + value.astype(x.dtype).reshape((1,) * (x.ndim - value.ndim) + value.shape)
