"""Lion: the sign of a momentum, so every entry moves by the rate (arXiv:2302.06675)."""

from __future__ import annotations

import dataclasses
from typing import Any

import optax

from jaxmoe.ops.guard import guarded
from jaxmoe.optim.optimizers.checks import check_decay, check_rates


@dataclasses.dataclass(frozen=True)
class Lion:
  """The rates of the signed average and of the kept momentum, and the decay.

  Against AdamW the paper takes a learning rate 3 to 10 times smaller and a decay as much larger.
  """

  b1: float = 0.9
  b2: float = 0.99
  weight_decay: float = 0.3

  def __post_init__(self) -> None:
    check_rates(b1=self.b1, b2=self.b2)
    check_decay(self.weight_decay)

  def direction(self, names: Any, dims: Any) -> optax.GradientTransformationExtraArgs:
    """Returns optax's Lion; it works entry by entry, so names and dims do not matter."""
    return guarded(optax.scale_by_lion(b1=self.b1, b2=self.b2))
