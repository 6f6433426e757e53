"""Lock-step ticks: every device does its next pass as soon as what it needs was made before.

A pass takes a tick whatever it costs, and what it makes is there from the next tick on. `S` and `T`
are done by all devices in the same tick, so that their collectives are met by all.
"""

from __future__ import annotations

from jaxmoe.parallel.pipelines.action import Action
from jaxmoe.parallel.pipelines.dependencies import Dependencies, passes, text
from jaxmoe.parallel.pipelines.table import Table, TableError

Grid = tuple[tuple[Action | None, ...], ...]
"""By tick, by device: what is done; None is idle."""


def place_in_ticks(table: Table) -> Grid:
  """Returns what every device does at every tick.

  Raises:
    TableError: If devices wait for each other for ever; the line says who for what.
  """
  dependencies = Dependencies(table)
  done: dict = {}
  next_of = [0] * len(table.orders)
  grid: list[tuple[Action | None, ...]] = []
  while any(place < len(order) for place, order in zip(next_of, table.orders)):
    heads = [
      order[place] if place < len(order) else None for place, order in zip(next_of, table.orders)
    ]
    row = tuple(head if _may_start(head, heads, dependencies, done) else None for head in heads)
    if not any(row):
      raise _deadlock(table, next_of, dependencies, done)
    for device, action in enumerate(row):
      next_of[device] += action is not None
      done.update({found: len(grid) for found in passes(action)} if action else {})
    grid.append(row)
  return tuple(grid)


def _may_start(
  head: Action | None, heads: list[Action | None], dependencies: Dependencies, done: dict
) -> bool:
  """Returns whether a device's next pass may be done in this tick."""
  if head is None or (head.stage < 0 and any(other != head for other in heads)):
    return False
  return all(need in done for found in passes(head) for need in dependencies.needs(found))


def _deadlock(
  table: Table, next_of: list[int], dependencies: Dependencies, done: dict
) -> TableError:
  """Returns which device stands before which of its passes, and what that waits for."""
  standing = [
    (device, place) for device, place in enumerate(next_of) if place < len(table.orders[device])
  ]
  for device, place in standing:
    for found in passes(table.orders[device][place]):
      for need in dependencies.needs(found):
        if need not in done:
          problem = f"a deadlock: it waits for {text(need)}, which never comes; put that first"
          return TableError(table, device, place, problem)
  problem = "a deadlock, for not all devices do this S or T next; give all of them one order"
  return TableError(table, *standing[0], problem)
