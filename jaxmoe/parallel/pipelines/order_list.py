"""An order list in the making: passes of a stage take its microbatches one after the other."""

from __future__ import annotations

import dataclasses
from collections import Counter, deque

from jaxmoe.core.errors import InputError
from jaxmoe.parallel.pipelines.action import Action, overlapped


@dataclasses.dataclass
class OrderList:
  """One device's passes; each is of the microbatch that its stage has not had yet.

  Attributes:
    actions: The passes so far.
    num_micro: Microbatches; passes of more are left out. What is left of an order that works works:
      passes wait for passes of their own microbatch alone.
  """

  num_micro: int
  actions: list[Action] = dataclasses.field(default_factory=list)
  _next: Counter[tuple[int, str]] = dataclasses.field(default_factory=Counter)
  _weights: deque[Action] = dataclasses.field(default_factory=deque)

  def forward(self, stage: int) -> None:
    """Adds an `F`."""
    self._add(self._take(stage, "F"))

  def backward(self, stage: int) -> None:
    """Adds a `B`; its `W` is put off until `weights`."""
    found = self._take(stage, "B")
    self._weights.append(Action(stage, "W", found.micro))
    self._add(found)

  def both(self, stage: int) -> None:
    """Adds a `BW`."""
    self._add(dataclasses.replace(self._take(stage, "B"), kind="BW"))

  def overlap(self, forward: int, backward: int) -> None:
    """Adds an `FB` of an `F` of one stage and a `BW` of another."""
    first = self._take(forward, "F")
    second = dataclasses.replace(self._take(backward, "B"), kind="BW")
    if max(first.micro, second.micro) < self.num_micro:
      self.actions.append(overlapped(first, second))
    else:
      self._add(first)
      self._add(second)

  def weights(self, stage: int | None = None) -> None:
    """Adds the `W` that was put off first, or a stage's first; nothing where there is none."""
    for found in self._weights:
      if stage in (None, found.stage):
        self._weights.remove(found)
        self._add(found)
        return

  def done(self, stage: int, kind: str) -> int:
    """Returns how many `F`s, or `B`s and `BW`s, a stage has had."""
    return self._next[stage, kind]

  def finish(self) -> tuple[Action, ...]:
    """Returns the list with all that was put off at its end."""
    while self._weights:
      self.weights()
    return tuple(self.actions)

  def _take(self, stage: int, kind: str) -> Action:
    """Returns the next pass of a stage."""
    micro = self._next[stage, kind]
    self._next[stage, kind] += 1
    return Action(stage, kind, micro)

  def _add(self, action: Action) -> None:
    """Adds a pass, if there is such a microbatch."""
    if action.micro < self.num_micro:
      self.actions.append(action)


def require_micro(name: str, num_devices: int, num_micro: int) -> None:
  """Checks that there are as many microbatches as devices.

  Raises:
    InputError: One line that says what works.
  """
  if num_micro < num_devices:
    raise InputError(
      f"pipeline={name} over {num_devices} devices needs at least {num_devices} microbatches, "
      f"there are {num_micro}; take train.num_micro={num_devices}, or pipeline=1f1b"
    )
