"""Checks of a table before it is lowered; every line is a mistake in it."""

from __future__ import annotations

from jaxmoe.parallel.pipelines.dependencies import Pass, passes, text
from jaxmoe.parallel.pipelines.table import Table, TableError
from jaxmoe.parallel.pipelines.ticks import place_in_ticks


def check_table(table: Table) -> None:
  """Checks placement, that each pass is done once, that no W is missing, and that none waits.

  Raises:
    TableError: One line: the device, the pass and the fix.
  """
  for device, order in enumerate(table.orders):
    seen: dict[Pass, int] = {}
    for place, action in enumerate(order):
      for found in passes(action):
        problem = _misplaced(table, device, found)
        if found in seen:
          problem = f"it is done before, as pass {seen[found] + 1}; once is enough"
        if problem:
          raise TableError(table, device, place, problem)
        seen[found] = place
    _check_whole(table, device, seen)
  place_in_ticks(table)


def _misplaced(table: Table, device: int, found: Pass) -> str | None:
  """Returns what is wrong with a pass on a device, by itself."""
  stage, kind, micro = found
  if not 0 <= micro < table.num_micro:
    return f"there are microbatches 0 to {table.num_micro - 1}"
  if kind in ("S", "T"):
    return None if table.vocabulary else "the head lies on the last stage, which has no S or T"
  if not 0 <= stage < table.placement.num_stages:
    return f"there are stages 0 to {table.placement.num_stages - 1}"
  home = table.placement.device_of[stage]
  return None if home == device else f"stage {stage} lies on device {home}; move the pass there"


def _check_whole(table: Table, device: int, seen: dict[Pass, int]) -> None:
  """Checks that nothing is missing on a device: each pass is done before the step."""
  trains = any(kind in ("B", "W", "BW") for order in table.orders for kind in _kinds(order))
  end = max(0, len(table.orders[device]) - 1)
  for micro in range(table.num_micro):
    for stage in table.placement.stages_on(device):
      _check_backward(table, device, seen, (stage, "BW", micro))
      wanted = [(stage, "F", micro)]
      if trains and (stage, "BW", micro) not in seen:
        wanted += [(stage, "B", micro), (stage, "W", micro)]
      for found in wanted:
        if found not in seen:
          # Where a B is there, it is the place to look for its W.
          place = seen.get((stage, "B", micro), end)
          raise TableError(table, device, place, f"{text(found)} is missing; add it after this")
    for kind in ("S", "T") if table.vocabulary and trains else ():
      if (-1, kind, micro) not in seen:
        raise TableError(table, device, end, f"{kind}{micro} is missing; it is due before the step")


def _check_backward(table: Table, device: int, seen: dict[Pass, int], both: Pass) -> None:
  """Checks that a pass that makes both gradients has neither beside it."""
  for kind in ("B", "W"):
    found = (both[0], kind, both[2])
    if both in seen and found in seen:
      problem = f"{text(both)} makes that gradient; leave one of them out"
      raise TableError(table, device, seen[found], problem)


def _kinds(order: tuple) -> set[str]:
  """Returns the kinds of an order list."""
  return {kind for action in order for _, kind, _ in passes(action)}
