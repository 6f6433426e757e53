"""Zero, copy and constant experts beside a network's (MoE++, Jin et al. 2024, arXiv:2410.07348).

Section 3.1: E(x) = 0, E(x) = x and E_j(x) = a1 x + a2 v_j with (a1, a2) = softmax(W_j x). They are
computed for all tokens at once where the tokens are: their weights lie on every device, no rows
move. A copy doubles x: the residual stream is still added.
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from jaxmoe.core.config_io import choice
from jaxmoe.core.errors import InputError
from jaxmoe.core.init import Init
from jaxmoe.core.weight_formats import dot
from jaxmoe.moe.experts.family import Experts, SeveralKinds, gates, hand_over
from jaxmoe.moe.experts.homogeneous import NETWORKS
from jaxmoe.moe.experts.swiglu import SwiGLU
from jaxmoe.moe.routing import Routing


@dataclasses.dataclass(frozen=True)
class ZeroCopyConstant(Experts):
  """A network's experts, then zero, copy and constant ones, in this order.

  Attributes:
    network: What the others compute.
    num_zero: How many of the layer's experts give 0.
    num_copy: How many give their input.
    num_constant: How many mix it with a vector of their own.
    zero_gives_weight: Whether a zero expert's weight goes to the token's other experts, as in the
      released code, so that one expert beside it weighs 1; else its weight is lost.
  """

  network: Any = choice(NETWORKS, SwiGLU(mlp_dim=128))
  num_zero: int = 1
  num_copy: int = 1
  num_constant: int = 1
  zero_gives_weight: bool = True

  mixed: ClassVar[bool] = True

  def __post_init__(self) -> None:
    for name in ("num_zero", "num_copy", "num_constant"):
      if getattr(self, name) < 0:
        raise InputError(f"{name} must not be negative: {name}={getattr(self, name)}")

  def check(self, num_experts: int) -> None:
    """Refuses a layer without an expert of the network."""
    idle = self.num_zero_compute(num_experts)
    if idle >= num_experts:
      raise InputError(
        "zero, copy and constant experts must leave one of the network: "
        f"there are {idle}, num_experts={num_experts}; num_experts counts all kinds"
      )

  def num_zero_compute(self, num_experts: int) -> int:
    """Returns how many are zero, copy or constant."""
    return self.num_zero + self.num_copy + self.num_constant

  def expert_params(self, dim: int, num_experts: int) -> tuple[int, ...]:
    """Returns those of the network, none for zero and copy, 3 D for constant experts."""
    num_true = num_experts - self.num_zero_compute(num_experts)
    free = (0,) * (self.num_zero + self.num_copy)
    return self.network.expert_params(dim, num_true) + free + (3 * dim,) * self.num_constant

  def build(self, init: Init, dim: int, num_experts: int) -> ZeroCopyConstantExperts:
    """Returns the module with the weights of all experts."""
    num_true = num_experts - self.num_zero_compute(num_experts)
    return ZeroCopyConstantExperts(self, init, dim, num_true, num_experts)


class ZeroCopyConstantExperts(SeveralKinds):
  """The weights of the network's experts, and of the others."""

  def __init__(self, config: ZeroCopyConstant, init: Init, dim: int, num_true: int, stop: int):
    super().__init__(
      ("network", 0, num_true, config.network.build(init / "network", dim, num_true)),
      ("local", num_true, stop, LocalExperts(config, init / "local", dim)),
    )
    self.zero_stop = num_true + config.num_zero if config.zero_gives_weight else num_true

  def adjust_weights(self, routing: Routing) -> Routing:
    """Returns weights of which a zero expert has none."""
    (_, _, first), *_ = self.spans
    zero_TA = (routing.expert_TA >= first) & (routing.expert_TA < self.zero_stop)
    return hand_over(routing, zero_TA)


class LocalExperts(nnx.Module):
  """The experts that take no rows."""

  def __init__(self, config: ZeroCopyConstant, init: Init, dim: int):
    self.num_zero, self.num_copy = config.num_zero, config.num_copy
    num, dims = config.num_constant, ("local_expert", "embed")
    self.mix = init.weight("mix", (num, dim, 2), (*dims, None), fan_in=dim) if num else None
    # Of unit variance, but for what all that is added to the residual stream is divided by.
    self.value = init.residual("value", (num, dim), dims, fan_in=1) if num else None

  def at_tokens(self, x_TD: jax.Array, routing: Routing) -> jax.Array:
    """Returns (T, D) in x.dtype: (g_copy + sum g_c a1_c) x + sum g_c a2_c v_c, in float32."""
    gates_TE = gates(routing)
    copy, constant = self.num_zero, self.num_zero + self.num_copy
    # What a token without such choices holds is not to be multiplied by 0.
    used_T1 = jnp.any(routing.valid_TA, axis=1, keepdims=True)
    x32_TD = jnp.where(used_T1, x_TD.astype(jnp.float32), 0)
    scale_T1 = jnp.sum(gates_TE[:, copy:constant], axis=1, keepdims=True)
    if self.mix is None or self.value is None:
      return (scale_T1 * x32_TD).astype(x_TD.dtype)
    gates_TC = gates_TE[:, constant:]
    mix_TCM = jax.nn.softmax(dot(self.mix.get_value(), x32_TD, "td,cdm->tcm"), axis=-1)
    scale_T1 += jnp.sum(gates_TC * mix_TCM[..., 0], axis=1, keepdims=True)
    values_TD = dot(self.value.get_value(), gates_TC * mix_TCM[..., 1], "tc,cd->td")
    return (scale_T1 * x32_TD + values_TD).astype(x_TD.dtype)
