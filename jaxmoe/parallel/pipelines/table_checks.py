"""Checks of a table before it is lowered; every line is a mistake in it."""

from __future__ import annotations

from collections import Counter

from jaxmoe.core.errors import InputError
from jaxmoe.parallel.pipelines.dependencies import Pass, passes
from jaxmoe.parallel.pipelines.table import Table
from jaxmoe.parallel.pipelines.ticks import place_in_ticks


def check_table(table: Table) -> None:
  """Checks placement, that each pass is done once, that no W is missing, and that none waits.

  Raises:
    InputError: One line: the device, the pass and the fix.
  """
  for device, order in enumerate(table.orders):
    for place, action in enumerate(order):
      for found in passes(action):
        problem = _misplaced(table, device, found)
        if problem:
          raise InputError(f"device {device}, pass {place + 1}, {action}: {problem}")
  for device, order in enumerate(table.orders):
    _check_each_once(table, device, Counter(found for action in order for found in passes(action)))
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


def _check_each_once(table: Table, device: int, counts: Counter[Pass]) -> None:
  """Checks that a device does each of its passes once, and each weight gradient before the step."""
  for found, count in counts.items():
    if count > 1:
      raise InputError(f"device {device} does {_text(found)} {count} times; once is enough")
  trains = any(kind in ("B", "BW") for _, kind, _ in counts)
  for micro in range(table.num_micro):
    wanted = [(-1, kind, micro) for kind in ("S", "T") if table.vocabulary and trains]
    for stage in table.placement.stages_on(device):
      wanted.append((stage, "F", micro))
      if trains and (stage, "BW", micro) not in counts:
        wanted += [(stage, "B", micro), (stage, "W", micro)]
      elif any((stage, kind, micro) in counts for kind in ("B", "W")):
        raise InputError(f"device {device} does {stage}BW{micro}, B and W in one; leave those out")
    for found in wanted:
      if found not in counts:
        raise InputError(f"device {device} never does {_text(found)}; each is done before the step")


def _text(found: Pass) -> str:
  """Returns a pass as a table writes it."""
  stage, kind, micro = found
  return f"{kind}{micro}" if stage < 0 else f"{stage}{kind}{micro}"
