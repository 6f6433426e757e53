"""Top-k of a softmax over experts (Shazeer et al. 2017, section 2.1; Mixtral; OLMoE).

scores = softmax(x W) in float32; a token goes to its A best experts. With `normalize` the weights
are the scores of the chosen experts divided by their sum, which equals a softmax over the chosen
logits alone (Mixtral, Qwen3); without it they are the scores themselves (OLMoE, Switch).
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jaxmoe.core.parameters import Init
from jaxmoe.core.rng import Keys
from jaxmoe.core.tokens import Tokens
from jaxmoe.core.weights import dot
from jaxmoe.moe.routing import Routing


@dataclasses.dataclass(frozen=True)
class TopK:
  """Softmax, then the A best; token-local.

  Attributes:
    normalize: Whether the weights of a token's chosen experts sum to 1.
  """

  normalize: bool = True

  def build(self, init: Init, dim: int, num_experts: int, num_active: int) -> TopKRouter:
    """Returns the module with its gate, a (D, E) weight."""
    return TopKRouter(self, init, (dim, num_experts), num_active)


class TopKRouter(nnx.Module):
  """The gate of a `TopK` router and its rule."""

  def __init__(self, config: TopK, init: Init, shape: tuple[int, int], num_active: int):
    self.config = config
    self.num_active = num_active
    self.gate = init.weight("gate", shape, ("embed", "expert"), fan_in=shape[0])

  def __call__(
    self, x_TD: jax.Array, tokens: Tokens, carry: Any, keys: Keys | None
  ) -> tuple[Routing, Any]:
    """Routes each token by itself; ties go to the lower expert. Logits and scores are float32."""
    del keys  # the rule is deterministic
    logits_TE = dot(self.gate.get_value(), x_TD.astype(jnp.float32), "td,de->te")
    log_z_T = jax.nn.logsumexp(logits_TE, axis=-1)
    scores_TE = jnp.exp(logits_TE - log_z_T[:, None])
    weight_TA, expert_TA = jax.lax.top_k(scores_TE, self.num_active)
    if self.config.normalize:
      weight_TA = weight_TA / jnp.sum(weight_TA, axis=-1, keepdims=True)
    valid_TA = jnp.broadcast_to(tokens.valid.reshape(-1, 1), expert_TA.shape)
    return Routing(expert_TA, weight_TA, valid_TA, scores_TE, log_z_T), carry
