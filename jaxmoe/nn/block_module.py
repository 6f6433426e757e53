"""A transformer block as a flax.nnx module: attention, then a dense or a MoE layer."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jaxmoe.core.init import Init
from jaxmoe.core.rng import Keys
from jaxmoe.models.attention_experts import AttentionExperts
from jaxmoe.models.block import BlockConfig
from jaxmoe.models.cache import NoCache
from jaxmoe.models.residual import ResidualStream
from jaxmoe.moe.layer import MoEConfig
from jaxmoe.nn.aux import ModelAux, aux_of, joined
from jaxmoe.nn.router_module import first_logits, keep_buffers, moved_buffers
from jaxmoe.nn.tokens import keys_of, tokens_of


class Block(nnx.Module):
  """x + attention(norm(x)), then x + ffn(norm(x)).

      block = jaxmoe.nn.Block(jaxmoe.BlockConfig(), dim=512, rngs=nnx.Rngs(0))
      y, aux = block(x)
      loss = task_loss(y) + aux.loss

  Attributes:
    config: Its record.
    layer: The parts.
  """

  def __init__(
    self,
    config: BlockConfig | None = None,
    *,
    dim: int,
    rngs: nnx.Rngs,
    norm_eps: float = 1e-6,
    param_dtype: Any = jnp.float32,
  ):
    self.config = config or BlockConfig()
    init = Init(Keys(rngs.params()), jnp.dtype(param_dtype))
    self.layer = self.config.build(init, ResidualStream(dim, norm_eps))
    for part in self._parts():
      keep_buffers(getattr(self.layer, part).router)

  def __call__(
    self,
    x: jax.Array,
    segment: jax.Array | None = None,
    previous_logits: Any = None,
    rngs: nnx.Rngs | None = None,
  ) -> tuple[jax.Array, ModelAux]:
    """Returns outputs of x's shape and dtype, and what its parts with experts tell, by part.

    Args:
      x: (B, L, D).
      segment: (B, L), see `tokens_of`.
      previous_logits: Of the MoE layer before, for gates that read them.
      rngs: Randomness of routers that draw (`rngs.router()`); None for none.
    """
    tokens, parts = tokens_of(x.shape[:-1], segment), self._parts()
    ffn = parts.get("moe")
    if previous_logits is None and ffn is not None:
      previous_logits = first_logits(ffn.router, tokens, ffn.num_routable)
    keys = keys_of(None if rngs is None else rngs.router())
    y_BLD, logits, _, sums = self.layer(x, previous_logits, tokens, NoCache(), keys)
    handed = {"moe": logits}
    found = {part: aux_of(parts[part], of, tokens, handed.get(part)) for part, of in sums.items()}
    return y_BLD, joined(found)

  def update_router(self, aux: ModelAux) -> None:
    """Moves what routers keep from step to step, in place."""
    for part, config in self._parts().items():
      buffers = getattr(self.layer, part).router.buffers
      for name, value in moved_buffers(config.router, buffers, aux.layers[part].sums).items():
        buffers[name][...] = value

  def _parts(self) -> dict[str, Any]:
    """Returns the records of the parts with a router."""
    attention, ffn = self.config.attention, self.config.ffn
    parts = {"attention": attention} if isinstance(attention, AttentionExperts) else {}
    return parts | ({"moe": ffn} if isinstance(ffn, MoEConfig) else {})
