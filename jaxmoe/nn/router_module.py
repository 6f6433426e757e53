"""A router alone as a flax.nnx module: a gate, and a rule that selects experts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jaxmoe.core.init import Init
from jaxmoe.core.rng import Keys
from jaxmoe.core.tokens import Tokens
from jaxmoe.moe.layer import MoESums
from jaxmoe.moe.routers import Router as RouterConfig
from jaxmoe.moe.routers import TopK
from jaxmoe.moe.routers.router import RouterModule
from jaxmoe.moe.routing import Routing
from jaxmoe.nn.tokens import keys_of, tokens_of


class RouterBuffer(nnx.Variable):
  """What a router keeps from step to step and moves by a rule of its own; no optimizer's."""


class Router(nnx.Module):
  """Which experts each token is sent to, and what their outputs are multiplied by.

      router = jaxmoe.nn.Router(dim=512, num_experts=8, num_active=2, rngs=nnx.Rngs(0))
      routing, _ = router(x)
      routing.expert_TA, routing.weight_TA

  Attributes:
    config: Its record, one of `jaxmoe.moe.routers.ROUTERS`.
    gate_and_rule: The parameters.
  """

  def __init__(
    self,
    config: RouterConfig | None = None,
    *,
    dim: int,
    num_experts: int,
    num_active: int,
    rngs: nnx.Rngs,
  ):
    self.config = config or TopK()
    self.config.check(num_experts, num_active)
    self.num_experts = num_experts
    self.gate_and_rule = self.config.build(Init(Keys(rngs.params())), dim, num_experts, num_active)
    keep_buffers(self.gate_and_rule)

  def __call__(
    self,
    x: jax.Array,
    segment: jax.Array | None = None,
    previous_logits: Any = None,
    rngs: nnx.Rngs | None = None,
  ) -> tuple[Routing, Any]:
    """Returns the routing of all T tokens, row after row, and the logits for the next router.

    Args:
      x: (B, L, D) or (T, D).
      segment: (B, L) or (T,), see `tokens_of`; a choice of padding is not valid.
      previous_logits: Of the router before, for gates that read them.
      rngs: Randomness of routers that draw (`rngs.router()`); None for none.
    """
    tokens = tokens_of(x.shape[:-1], segment)
    if previous_logits is None:
      previous_logits = first_logits(self.config, tokens, self.num_experts)
    keys = keys_of(None if rngs is None else rngs.router())
    return self.gate_and_rule(x.reshape(-1, x.shape[-1]), tokens, previous_logits, keys)


def first_logits(config: RouterConfig, tokens: Tokens, num_experts: int) -> jax.Array | None:
  """Returns what the gate of a first layer reads: zeros if it reads any logits."""
  if not config.gate.reads_previous:
    return None
  return jnp.zeros((tokens.id.size, num_experts), jnp.float32)


def keep_buffers(router: RouterModule) -> None:
  """Has a router's buffers be of a type that `wrt=nnx.Param` leaves alone."""
  kept: dict[str, Any] = {
    name: RouterBuffer(leaf.get_value(), **leaf.get_metadata())
    for name, leaf in router.buffers.items()
  }
  router.buffers = nnx.Dict(kept)


def moved_buffers(
  config: RouterConfig, buffers: Mapping[str, Any], sums: MoESums
) -> dict[str, jax.Array]:
  """Returns what a router keeps after a step, from the sums of all its tokens."""
  values = {name: jax.lax.stop_gradient(leaf[...]) for name, leaf in buffers.items()}
  return config.update(values, sums.router, sums.statistics) if values else {}
