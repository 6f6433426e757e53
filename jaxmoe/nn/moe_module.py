"""A Mixture-of-Experts layer as a flax.nnx module."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jaxmoe.core.init import Init
from jaxmoe.core.rng import Keys
from jaxmoe.moe.layer import MoEConfig
from jaxmoe.nn.aux import Aux, aux_of
from jaxmoe.nn.router_module import first_logits, keep_buffers, moved_buffers
from jaxmoe.nn.tokens import keys_of, tokens_of


class MoE(nnx.Module):
  """A layer of experts in place of a feed-forward network.

      moe = jaxmoe.nn.MoE(jaxmoe.MoEConfig(num_experts=8, num_active=2), dim=512, rngs=nnx.Rngs(0))
      y, aux = moe(x)

  Attributes:
    config: Its record: how many experts, which router, experts, dispatcher and auxiliary losses.
    layer: The router and the experts.
  """

  def __init__(
    self, config: MoEConfig, dim: int, *, rngs: nnx.Rngs, param_dtype: Any = jnp.float32
  ):
    self.config = config
    self.layer = config.build(Init(Keys(rngs.params()), jnp.dtype(param_dtype)), dim)
    keep_buffers(self.layer.router)

  def __call__(
    self,
    x: jax.Array,
    segment: jax.Array | None = None,
    previous_logits: Any = None,
    rngs: nnx.Rngs | None = None,
  ) -> tuple[jax.Array, Aux]:
    """Returns outputs of x's shape and dtype, zeros for padding, and what the layer tells.

    Args:
      x: (B, L, D) or (T, D).
      segment: (B, L) or (T,), see `tokens_of`; which tokens count.
      previous_logits: `aux.logits` of the layer before, for gates that read them.
      rngs: Randomness of routers that draw (`rngs.router()`); None for none, as in evaluation.
    """
    tokens, dim = tokens_of(x.shape[:-1], segment), x.shape[-1]
    if previous_logits is None:
      previous_logits = first_logits(self.config.router, tokens, self.config.num_routable)
    keys = keys_of(None if rngs is None else rngs.router())
    x_BLD = x.reshape(*tokens.id.shape, dim)
    y_BLD, logits, sums = self.layer(x_BLD, tokens, previous_logits, keys)
    return y_BLD.reshape(x.shape), aux_of(self.config, sums, tokens, logits)

  def update_router(self, aux: Aux) -> None:
    """Moves what the router keeps from step to step, such as the bias of `aux_free`, in place."""
    buffers = self.layer.router.buffers
    for name, value in moved_buffers(self.config.router, buffers, aux.sums).items():
      buffers[name][...] = value
