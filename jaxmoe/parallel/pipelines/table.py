"""A pipeline as data: for each device the list of what it does, in order."""

from __future__ import annotations

import dataclasses

from jaxmoe.core.errors import InputError
from jaxmoe.parallel.pipelines.action import Action
from jaxmoe.parallel.pipelines.stage_placement import Placement


@dataclasses.dataclass(frozen=True)
class Vocabulary:
  """How a head that lies over all devices works (Yeung et al. 2024, algorithms 1 and 2).

  Attributes:
    algorithm: 1: `S` makes logits and their sums, `T` both gradients; two barriers, and the last
      stage's backward pass waits for `T`. 2: `S` makes the gradient of its input too; one barrier,
      and `T`, the weights' gradient, may come any time before the step.
  """

  algorithm: int = 2

  @property
  def barriers(self) -> int:
    """Rounds of collectives between the last stage's forward and backward passes."""
    return 2 if self.algorithm == 1 else 1


@dataclasses.dataclass(frozen=True)
class Table:
  """What every device does, in order, for the microbatches of one step.

  Attributes:
    placement: Where stages lie.
    num_micro: Microbatches.
    orders: By device, its passes in order. Nothing says when: a pass starts once what it needs is
      there and the device is done with the one before.
    vocabulary: The head over all devices, where there is one; else the last stage has it.
  """

  placement: Placement
  num_micro: int
  orders: tuple[tuple[Action, ...], ...]
  vocabulary: Vocabulary | None = None


class TableError(InputError):
  """A table that does not work, by the pass at which that shows.

  Attributes:
    device: Whose order list it is.
    place: Of the pass, from 0.
    problem: What is wrong and what to do.
  """

  def __init__(self, table: Table, device: int, place: int, problem: str):
    order = table.orders[device]
    found = f", pass {place + 1}, {order[place]}" if place < len(order) else ""
    super().__init__(f"device {device} of the pipeline{found}: {problem}")
    self.device, self.place, self.problem = device, place, problem
