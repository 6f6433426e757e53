"""Attention whose queries are experts (ModuleFormer, Shen et al. 2023; MoA, Zhang et al. 2022).

A token is sent to A of E experts. Each has queries and an output projection of its own, keys and
values are the layer's, so that a cache does not grow with E:

  y = sum_a g_a W_o^a concat_heads(attention(W_q^a x, K, V))
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jaxmoe.core.backends import HERE, Chooser
from jaxmoe.core.config_io import choice
from jaxmoe.core.errors import InputError
from jaxmoe.core.init import Init
from jaxmoe.core.parallel_context import ONE_DEVICE, ParallelContext
from jaxmoe.core.rng import Keys
from jaxmoe.core.tokens import Tokens
from jaxmoe.core.weight_formats import grouped_dot
from jaxmoe.models.attention import SoftmaxAttention
from jaxmoe.models.cache import Cache
from jaxmoe.models.stick_breaking_attention import StickBreaking
from jaxmoe.moe.balance import BALANCE, LoadBalance, RouterZ
from jaxmoe.moe.dispatch import Counts, DispatchContext, Dropless
from jaxmoe.moe.experts.family import Experts
from jaxmoe.moe.layer import MoESums, layer_sums
from jaxmoe.moe.routers import ROUTERS, TopK

HEADS = {
  "softmax": (SoftmaxAttention, SoftmaxAttention(num_heads=2, num_kv_heads=1, head_dim=4)),
  "stick_breaking": (StickBreaking, StickBreaking(num_heads=2, num_kv_heads=1, head_dim=4)),
}


@dataclasses.dataclass(frozen=True)
class AttentionExperts:
  """A layer of attention experts; dropless.

  Attributes:
    num_experts: E, how many the layer has.
    num_active: A, how many each token is sent to.
    heads: The attention of one expert.
    router: Which experts a token is sent to. Weights that do not sum to 1 (ModuleFormer as
      released) make outputs small where A is: normalize=true divides by the sum.
    balance: Losses that keep the load of experts even.
  """

  num_experts: int = 8
  num_active: int = 2
  heads: Any = choice(HEADS, StickBreaking())
  router: Any = choice(ROUTERS, TopK())
  balance: tuple[Any, ...] = choice(BALANCE, (LoadBalance(), RouterZ()))

  def __post_init__(self) -> None:
    if not 1 <= self.num_active <= self.num_experts:
      raise InputError(
        "num_active must lie between 1 and num_experts: "
        f"num_active={self.num_active}, num_experts={self.num_experts}"
      )
    if isinstance(self.heads, SoftmaxAttention) and (self.heads.bias != "none" or self.heads.sinks):
      raise InputError(
        "attention experts have queries and outputs of their own, without biases and sinks: "
        f"bias={self.heads.bias}, sinks={self.heads.sinks}; set bias=none and sinks=false"
      )
    if self.router.gate.reads_previous:
      raise InputError(
        "the gate of attention experts cannot add the logits of the layer before, which are of "
        "feed-forward experts; choose another gate"
      )
    self.router.check(self.num_experts, self.num_active)
    self.router.check_causal()
    names = [aux_loss.name for aux_loss in self.balance]
    for aux_loss in self.balance:
      aux_loss.check(self)
      if names.count(aux_loss.name) > 1:
        raise InputError(
          f"balance has two losses called {aux_loss.name}; add up their weights, or change a scope"
        )

  def build(
    self, init: Init, dim: int, eps: float, parallel: ParallelContext = ONE_DEVICE
  ) -> AttentionExpertsLayer:
    """Returns the module with its weights."""
    return AttentionExpertsLayer(self, init, dim, eps, parallel.chooser)

  def empty_cache(self, batch: int, slots: int, dtype: Any) -> Any:
    """Returns a cache of one layer's keys and values, whatever the number of experts."""
    return self.heads.empty_cache(batch, slots, dtype)

  def active_params(self, dim: int) -> int:
    """Returns how many parameters of matrices act on one token."""
    one = self.heads
    each = 2 * dim * one.num_heads * one.head_dim
    shared = one.active_params(dim) - each
    return self.router.num_params(dim, self.num_experts) + shared + self.num_active * each

  def mixing_flops(self, seq_len: int) -> float:
    """Returns FLOPs a token, forward and backward, of what mixes tokens."""
    return self.num_active * self.heads.mixing_flops(seq_len)

  @property
  def num_routable(self) -> int:
    """How many experts the router knows: all."""
    return self.num_experts

  @property
  def experts(self) -> Experts:
    """What balance losses ask: none of the experts is idle."""
    return Experts()

  @property
  def needs_sequence_totals(self) -> bool:
    """Whether a balance loss needs the sums of each row of the batch."""
    return any(aux_loss.needs_sequence_totals for aux_loss in self.balance)


class AttentionExpertsLayer(nnx.Module):
  """The router; queries and outputs of all experts, keys and values of the layer."""

  def __init__(
    self, config: AttentionExperts, init: Init, dim: int, eps: float, chooser: Chooser = HERE
  ):
    self.config = config
    self.router = config.router.build(
      init / "router", dim, config.num_experts, config.num_active
    )
    # Its heads are whole on every device: of what there is in parallel it knows the devices alone.
    self.chooser = chooser
    here = ParallelContext(chooser=chooser)
    self.experts = config.heads.build(init / "experts", dim, eps, config.num_experts, here)

  def __call__(
    self, x_BLD: jax.Array, tokens: Tokens, cache: Cache, keys: Keys | None = None
  ) -> tuple[jax.Array, Cache, MoESums]:
    """Returns (B, L, D) in x.dtype, the cache with these tokens in it, and the router's sums.

    Choices that `tokens` gives are of feed-forward experts; here the router chooses.
    """
    x_TD = x_BLD.reshape(-1, x_BLD.shape[-1])
    with jax.named_scope("route"):
      unforced = dataclasses.replace(tokens, replayed_experts=None)
      routing, _ = self.router(x_TD, unforced, None, keys, self.chooser)
    plan = Dropless().plan(routing, DispatchContext(chooser=self.chooser))
    choices = routing.expert_TA.size
    q_RNH = grouped_dot(self.experts.q.get_value(), plan.move(x_TD), plan.groups)
    q_TANH = q_RNH.at[plan.row_TA].get(mode="fill", fill_value=0)
    cache = self.experts.update_cache(x_TD, tokens, cache)
    out_TANH = self._attend(q_TANH, tokens, cache)
    rows_RP = jnp.zeros((choices, q_RNH[0].size), x_BLD.dtype)
    rows_RP = rows_RP.at[plan.row_TA.reshape(-1)].set(
      out_TANH.reshape(choices, -1), mode="drop"
    )
    y_TD = plan.combine(grouped_dot(self.experts.o.get_value(), rows_RP, plan.groups))
    sums = layer_sums(routing, tokens, Counts({}, {}), self.config.needs_sequence_totals)
    return y_TD.reshape(x_BLD.shape), cache, sums

  def _attend(self, q_TANH: jax.Array, tokens: Tokens, cache: Cache) -> jax.Array:
    """Returns (T, A, N, H): each choice's heads are heads like others, beside those they share."""
    active, _, size = q_TANH.shape[1:]
    shape = (*tokens.id.shape, active, self.config.heads.num_kv_heads, -1, size)
    q_BLMH = q_TANH.reshape(*shape[:2], -1, size)
    q_BLMH = self.experts.apply_rope(q_BLMH, tokens, "q", cache.max_length(tokens))
    # Query head m reads key head m // (A N / K): what reads one key head stands together.
    q_BLMH = q_BLMH.reshape(shape).swapaxes(2, 3).reshape(q_BLMH.shape)
    out_BLMH = cache.attend(q_BLMH, tokens, self.config.heads.mask, self.experts.parts())
    shared = (*shape[:2], shape[3], active, -1, size)
    return out_BLMH.reshape(shared).swapaxes(2, 3).reshape(q_TANH.shape)
