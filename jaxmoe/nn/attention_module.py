"""Attention as a flax.nnx module: softmax, latent, stick-breaking, linear, or of experts."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jaxmoe.core.init import Init
from jaxmoe.core.rng import Keys
from jaxmoe.models.attention import SoftmaxAttention
from jaxmoe.models.cache import NoCache
from jaxmoe.nn.aux import Aux, aux_of
from jaxmoe.nn.router_module import keep_buffers
from jaxmoe.nn.tokens import keys_of, tokens_of


class Attention(nnx.Module):
  """Causal attention of any kind; a token sees its document so far, or what its mask says.

      config = jaxmoe.SoftmaxAttention(num_heads=8, num_kv_heads=2, head_dim=64)
      attention = jaxmoe.nn.Attention(config, dim=512, rngs=nnx.Rngs(0))
      y, _ = attention(x)

  Attributes:
    config: Its record, one of `jaxmoe.models.block.ATTENTION`.
    layer: The projections.
  """

  def __init__(
    self,
    config: Any = None,
    *,
    dim: int,
    rngs: nnx.Rngs,
    norm_eps: float = 1e-6,
    param_dtype: Any = jnp.float32,
  ):
    self.config: Any = config or SoftmaxAttention()
    init = Init(Keys(rngs.params()), jnp.dtype(param_dtype))
    self.layer = self.config.build(init, dim, norm_eps)
    if (router := getattr(self.layer, "router", None)) is not None:
      keep_buffers(router)

  def __call__(
    self, x: jax.Array, segment: jax.Array | None = None, rngs: nnx.Rngs | None = None
  ) -> tuple[jax.Array, Aux | None]:
    """Returns outputs of x's shape and dtype, and what experts in attention tell; None for none.

    Args:
      x: (B, L, D).
      segment: (B, L), see `tokens_of`: documents do not see each other, and nobody sees padding.
      rngs: Randomness of routers that draw (`rngs.router()`); None for none.
    """
    tokens = tokens_of(x.shape[:-1], segment)
    keys = keys_of(None if rngs is None else rngs.router())
    y_BLD, _, sums = self.layer(x.reshape(*tokens.id.shape, -1), tokens, NoCache(), keys)
    return y_BLD.reshape(x.shape), None if sums is None else aux_of(self.config, sums, tokens)
