"""The usual attention: softmax, rotary positions, optional QK norm."""

from __future__ import annotations

import dataclasses
from typing import Literal

import jax

from jaxmoe.core.errors import InputError
from jaxmoe.core.parameters import Init
from jaxmoe.core.tokens import Tokens
from jaxmoe.models.heads import Heads, HeadsLayer
from jaxmoe.models.norm import RMSNorm
from jaxmoe.ops import attention
from jaxmoe.ops.rope import rope


@dataclasses.dataclass(frozen=True)
class Attention(Heads):
  """Softmax attention; head_dim must be even, because positions turn pairs.

  Attributes:
    rope_theta: Base of the rotary angles (Su et al. 2021).
    qk_norm: Where queries and keys get an RMSNorm before rotation: nowhere, over each head
      (Qwen3), or over all heads at once (OLMoE).
  """

  rope_theta: float = 10_000.0
  qk_norm: Literal["none", "head", "all"] = "none"

  def __post_init__(self) -> None:
    super().__post_init__()
    if self.head_dim % 2:
      raise InputError(f"head_dim must be even: head_dim={self.head_dim}")
    if self.rope_theta <= 1:
      raise InputError(f"rope_theta must be above 1: rope_theta={self.rope_theta}")

  def build(self, init: Init, dim: int, eps: float, num_experts: int = 0) -> AttentionLayer:
    """Returns the module with its weights."""
    return AttentionLayer(self, init, dim, eps, num_experts)


class AttentionLayer(HeadsLayer):
  """The weights of softmax attention."""

  config: Attention
  attend = staticmethod(attention.reference)

  def __init__(self, config: Attention, init: Init, dim: int, eps: float, num_experts: int = 0):
    super().__init__(config, init, dim, num_experts)
    self.q_norm = self._norm(init / "q_norm", config.num_heads, eps)
    self.k_norm = self._norm(init / "k_norm", config.num_kv_heads, eps)

  def turn(self, heads_BLNH: jax.Array, tokens: Tokens, which: str) -> jax.Array:
    """Returns normalised heads turned by their positions."""
    norm = self.q_norm if which == "q" else self.k_norm
    if norm is not None:
      flat = (*heads_BLNH.shape[:2], -1, norm.scale.shape[0])
      heads_BLNH = norm(heads_BLNH.reshape(flat)).reshape(heads_BLNH.shape)
    return rope(heads_BLNH, tokens.position, self.config.rope_theta)

  def _norm(self, init: Init, heads: int, eps: float) -> RMSNorm | None:
    widths = {"none": 0, "head": 1, "all": heads}
    width = widths[self.config.qk_norm] * self.config.head_dim
    return RMSNorm(init, width, eps, "head") if width else None
