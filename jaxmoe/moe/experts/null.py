"""Null experts: a token may choose to be computed by fewer (AdaMoE, Zeng et al. 2024).

arXiv:2406.13233, section 3. The first E - m experts are a network's, the last m compute nothing and
take no rows. At balance a token meets A (E - m) / E experts, each token its own number: the budget
is chosen by A and m. A later token changes no earlier one, unlike where experts choose tokens.
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

from jaxmoe.core.config_io import choice
from jaxmoe.core.errors import InputError
from jaxmoe.core.init import Init
from jaxmoe.moe.experts.family import Experts, SeveralKinds, hand_over
from jaxmoe.moe.experts.homogeneous import NETWORKS
from jaxmoe.moe.experts.swiglu import SwiGLU
from jaxmoe.moe.routing import Routing


@dataclasses.dataclass(frozen=True)
class Null(Experts):
  """A network's experts, then null experts.

  Attributes:
    network: What the others compute.
    num_null: m, how many of the layer's experts are null; 0 is the network alone, bit for bit.
  """

  network: Any = choice(NETWORKS, SwiGLU(mlp_dim=128))
  num_null: int = 4

  mixed: ClassVar[bool] = True

  def __post_init__(self) -> None:
    if self.num_null < 0:
      raise InputError(f"num_null must not be negative: num_null={self.num_null}")

  def check(self, num_experts: int) -> None:
    """Refuses a layer without an expert that computes."""
    if self.num_null >= num_experts:
      raise InputError(
        "num_null must leave an expert that computes: "
        f"num_null={self.num_null}, num_experts={num_experts}; num_experts counts null ones too"
      )

  def num_zero_compute(self, num_experts: int) -> int:
    """Returns m."""
    return self.num_null

  def expert_params(self, dim: int, num_experts: int) -> tuple[int, ...]:
    """Returns those of the network, and 0 for null experts."""
    num_true = num_experts - self.num_null
    return self.network.expert_params(dim, num_true) + (0,) * self.num_null

  def build(self, init: Init, dim: int, num_experts: int) -> NullExperts:
    """Returns the module with the weights of the experts that compute."""
    num_true = num_experts - self.num_null
    return NullExperts(("true", 0, num_true, self.network.build(init / "true", dim, num_true)))


class NullExperts(SeveralKinds):
  """The weights of the experts that compute."""

  def adjust_weights(self, routing: Routing) -> Routing:
    """Returns weights over the sum of the token's experts that compute (section 3).

    Times the sum of all it chose, which is 1 where the router divides by it, and its `scale`.
    """
    (_, _, num_true), = self.spans
    return hand_over(routing, routing.expert_TA >= num_true)
