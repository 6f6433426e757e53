"""The MoE layer: route -> plan -> move rows -> experts -> combine."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
from flax import nnx

from jaxmoe.core.errors import InputError
from jaxmoe.core.parameters import Init
from jaxmoe.core.recipe import choice
from jaxmoe.core.rng import Keys
from jaxmoe.core.tokens import Tokens
from jaxmoe.moe.balance import BALANCE, LoadBalance, RouterZ
from jaxmoe.moe.dispatch import DISPATCHERS, Dropless
from jaxmoe.moe.experts import EXPERTS, SwiGLU
from jaxmoe.moe.experts.swiglu import SwiGLUMLP
from jaxmoe.moe.routers import ROUTERS, TopK
from jaxmoe.moe.routing import RouterSums, sum_routing


@dataclasses.dataclass(frozen=True)
class MoE:
  """A layer of experts.

  Attributes:
    num_experts: E, how many experts the layer has.
    num_active: A, how many each token is sent to.
    router: Which experts a token is sent to.
    experts: What an expert computes.
    dispatch: How rows reach experts, and what happens where too many do.
    shared_hidden: Width of a shared expert that every token passes; 0 for none.
    balance: Losses that keep the load of experts even.
  """

  num_experts: int = 8
  num_active: int = 2
  router: Any = choice(ROUTERS, TopK())
  experts: Any = choice(EXPERTS, SwiGLU(hidden=128))
  dispatch: Any = choice(DISPATCHERS, Dropless())
  shared_hidden: int = 0
  balance: tuple[Any, ...] = choice(BALANCE, (LoadBalance(), RouterZ()))

  def __post_init__(self) -> None:
    if not 1 <= self.num_active <= self.num_experts:
      raise InputError(
        "num_active must lie between 1 and num_experts: "
        f"num_active={self.num_active}, num_experts={self.num_experts}"
      )
    if self.shared_hidden < 0:
      raise InputError(f"shared_hidden must not be negative: shared_hidden={self.shared_hidden}")

  def build(self, init: Init, dim: int) -> MoELayer:
    """Returns the module with its weights."""
    return MoELayer(self, init, dim)

  def active_params(self, dim: int) -> int:
    """Returns how many parameters act on one token."""
    shared = 3 * dim * self.shared_hidden
    return dim * self.num_experts + self.num_active * self.experts.num_params(dim) + shared


@functools.partial(
  jax.tree_util.register_dataclass, data_fields=["router", "dropped"], meta_fields=[]
)
@dataclasses.dataclass(frozen=True)
class MoESums:
  """What a layer reports beside its output: sums over the tokens it saw.

  Attributes:
    router: What balance losses and load metrics are computed from.
    dropped: float32 numbers of dropped choices, by reason.
  """

  router: RouterSums
  dropped: dict[str, jax.Array]


class MoELayer(nnx.Module):
  """The parts of a MoE layer, in the order in which a token meets them."""

  def __init__(self, config: MoE, init: Init, dim: int):
    self.dispatch = config.dispatch
    self.router = config.router.build(
      init / "router", dim, config.num_experts, config.num_active
    )
    self.experts = config.experts.build(init / "experts", dim, config.num_experts)
    width = config.shared_hidden
    self.shared = SwiGLUMLP(init / "shared", dim, width) if width else None

  def __call__(
    self, x_BLD: jax.Array, tokens: Tokens, carry: Any, keys: Keys | None
  ) -> tuple[jax.Array, Any, MoESums]:
    """Returns (B, L, D) in x.dtype, the carry for the next layer and the sums.

    A token that is not valid gets zeros from the experts.
    """
    x_TD = x_BLD.reshape(-1, x_BLD.shape[-1])
    with jax.named_scope("route"):
      routing, carry = self.router(x_TD, tokens, carry, keys)
    y_TD, dropped = self.dispatch(x_TD, routing, self.experts)
    if self.shared is not None:
      with jax.named_scope("shared"):
        y_TD = y_TD + self.shared(x_TD)
    rows = x_BLD.shape[0] if tokens.by_row else None
    with jax.named_scope("sums"):
      sums = MoESums(sum_routing(routing, tokens.valid.reshape(-1), rows), dropped)
    return y_TD.reshape(x_BLD.shape), carry, sums
