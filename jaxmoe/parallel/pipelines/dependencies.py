"""Dependencies of passes: each waits for those that make what it reads."""

from __future__ import annotations

from collections.abc import Iterator

from jaxmoe.parallel.pipelines.action import Action
from jaxmoe.parallel.pipelines.table import Table

Pass = tuple[int, str, int]
"""Stage, kind and microbatch of a pass that is not `FB`; of `S` and `T` the stage is -1."""


def passes(action: Action) -> Iterator[Pass]:
  """Yields what an action does, an `FB` as its two halves."""
  for part in action.parts:
    yield part.stage, part.kind, part.micro


def text(found: Pass) -> str:
  """Returns a pass as a table says it."""
  return str(Action(*found))


class Dependencies:
  """What passes of a table need, and which passes it has at all."""

  def __init__(self, table: Table):
    self._last = table.placement.num_stages - 1
    self._vocabulary = table.vocabulary
    self.present = {found for order in table.orders for action in order for found in passes(action)}

  def back(self, stage: int, micro: int) -> Pass | None:
    """Returns the pass that makes the gradient of a stage's input; None of forward tables."""
    for kind in ("BW", "B"):
      if (stage, kind, micro) in self.present:
        return stage, kind, micro
    return None

  def gradient_of_head(self, micro: int) -> Pass:
    """Returns the pass that makes the gradient of the last stage's output."""
    if self._vocabulary is None:
      return self._last, "F", micro
    return -1, "T" if self._vocabulary.algorithm == 1 else "S", micro

  def needs(self, done: Pass) -> list[Pass]:
    """Returns the passes that must end before this one starts."""
    stage, kind, micro = done
    if kind == "F":
      return [(stage - 1, "F", micro)] if stage else []
    if kind == "S":
      return [(self._last, "F", micro)]
    if kind == "T":
      return [(-1, "S", micro)]
    if kind == "R":
      return [(stage, "F", micro)]
    if kind == "W":
      return [(stage, "B", micro)]
    found = [(stage, "F", micro)]
    if (stage, "R", micro) in self.present:
      found.append((stage, "R", micro))
    after = self.gradient_of_head(micro) if stage == self._last else self.back(stage + 1, micro)
    return [*found, after or (stage + 1, "B", micro)]
