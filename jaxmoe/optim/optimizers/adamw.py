"""AdamW: both moments of the gradient, and decay outside of them (arXiv:1711.05101).

Decay is multiplied by the learning rate; the paper multiplies it by the schedule alone.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import optax

from jaxmoe.ops.adam import scale_by_adam
from jaxmoe.optim.optimizers.checks import check_decay, check_positive, check_rates


@dataclasses.dataclass(frozen=True)
class AdamW:
  """The two averaging rates, the floor of the second moment's root, and the decay."""

  b1: float = 0.9
  b2: float = 0.95
  eps: float = 1e-8
  weight_decay: float = 0.1

  def __post_init__(self) -> None:
    check_rates(b1=self.b1, b2=self.b2)
    check_positive(eps=self.eps)
    check_decay(self.weight_decay)

  def direction(self, names: Any, dims: Any) -> optax.GradientTransformationExtraArgs:
    """Returns Adam; it works entry by entry, so names and dims do not matter."""
    return scale_by_adam(self.b1, self.b2, self.eps)
