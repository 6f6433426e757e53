"""The base of gates; the gates themselves are in `gates.py`."""

from __future__ import annotations

import dataclasses
from typing import ClassVar


@dataclasses.dataclass(frozen=True)
class GateConfig:
  """The base of records of gates."""

  reads_previous: ClassVar[bool] = False
  """Whether the gate reads the logits of the gate before and hands on its own."""
  separable: ClassVar[bool] = True
  """Whether each expert has a column of its own, so that experts can be copied and removed."""
  decides: ClassVar[bool] = False
  """Whether the gate is a tree, whose decisions can be compared by domain (`domain_sums`)."""

  def check(self, num_experts: int) -> None:
    """Refuses a number of experts that the gate cannot tell apart.

    Raises:
      InputError: what, why and the cure in one line.
    """
