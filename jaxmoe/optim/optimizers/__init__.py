"""The family of optimizers: each turns clipped gradients into a direction to step against.

To add one, write a file with a record that has `weight_decay` and `direction`, and add its line.
`tests/optim/contract_test.py` then runs it.
"""

from __future__ import annotations

from typing import Any, Protocol

import optax

from jaxmoe.optim.optimizers.adafactor import Adafactor
from jaxmoe.optim.optimizers.adamw import AdamW
from jaxmoe.optim.optimizers.lion import Lion
from jaxmoe.optim.optimizers.muon import Muon


class Optimizer(Protocol):
  """A member of OPTIMIZERS."""

  @property
  def weight_decay(self) -> float:
    """The decay per unit of learning rate of the parameters that decay."""

  def direction(self, names: Any, dims: Any) -> optax.GradientTransformationExtraArgs:
    """Returns the transform from gradients to directions, before decay and learning rate.

    Its update takes `ok`, see `ops/guard.py`.

    Its state holds what belongs to a parameter under the parameter's path, and for a leaf stacked
    over layers with the layers as its first dim.

    Args:
      names: A tree like the parameters of canonical names.
      dims: A tree like the parameters of tuples of logical dims.
    """


OPTIMIZERS = {
  "adamw": (AdamW, AdamW()),
  "lion": (Lion, Lion()),
  "adafactor": (Adafactor, Adafactor(min_dim_size_to_factor=2)),
  "muon": (Muon, Muon()),
}

__all__ = ["OPTIMIZERS", "Adafactor", "AdamW", "Lion", "Muon", "Optimizer"]
