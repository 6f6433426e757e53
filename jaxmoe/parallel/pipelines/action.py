"""A pass of one stage over one microbatch, as order lists and tables name it.

Kinds: `F` forward; `R` makes a stage's residuals again; `B` the gradient of its input; `W` that of
its weights; `BW` both; `FB` a forward and a `BW` that have nothing to do with each other, side by
side, so that one's exchanges hide behind the other's products (DeepSeek-V3, section 3.2.1); `S` and
`T` the passes of a head that lies over all devices (Yeung et al. 2024, section 4).
"""

from __future__ import annotations

import dataclasses

KINDS = ("idle", "F", "R", "B", "W", "BW", "FB", "S", "T")
"""Kinds of passes by their code in Columns; 0 is none."""


@dataclasses.dataclass(frozen=True)
class Action:
  """One pass.

  Attributes:
    stage: The stage, counted along the layers over all devices; of `FB` that of its forward. `S`
      and `T` have -1: every device does its share.
    kind: One of KINDS but "idle".
    micro: The microbatch, from 0; of `FB` that of its forward.
    back: The `BW` beside the forward, where the kind is `FB`.
  """

  stage: int
  kind: str
  micro: int
  back: Action | None = None

  @property
  def parts(self) -> tuple[Action, ...]:
    """The passes done: of `FB` its forward and its backward, of any other itself."""
    if self.back is None:
      return (self,)
    return (Action(self.stage, "F", self.micro), self.back)

  def __str__(self) -> str:
    if self.back is not None:
      return f"({self.parts[0]};{self.back})FB"
    return f"{self.kind}{self.micro}" if self.stage < 0 else f"{self.stage}{self.kind}{self.micro}"


def overlapped(forward: Action, backward: Action) -> Action:
  """Returns the `FB` of an `F` and a `BW`."""
  assert (forward.kind, backward.kind) == ("F", "BW"), (forward, backward)
  return Action(forward.stage, "FB", forward.micro, backward)
