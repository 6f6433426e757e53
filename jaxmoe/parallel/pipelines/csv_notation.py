"""Tables as CSV files, in the notation of torch.distributed.pipelining: a line a device.

A cell is `{stage}{pass}{microbatch}`: `3F1`, `3I1` the gradient of the input (`B` elsewhere here),
`3W1` that of the weights, `3B1` both (`BW`), `(0F7;7B3)OVERLAP_F_B`. Empty cells are idle and mean
nothing: passes start as soon as they can. `3R1`, which makes residuals again, and `S1` and `T1` of
a vocabulary over all devices are ours. Stages lie where their line is.
"""

from __future__ import annotations

import csv
import pathlib
import re

from jaxmoe.core.errors import InputError
from jaxmoe.parallel.pipelines.action import Action, overlapped
from jaxmoe.parallel.pipelines.stage_placement import Placement
from jaxmoe.parallel.pipelines.table import Table, TableError, Vocabulary
from jaxmoe.parallel.pipelines.table_checks import check_table

_KINDS = {"F": "F", "I": "B", "W": "W", "B": "BW", "R": "R"}
_LETTERS = {kind: letter for letter, kind in _KINDS.items()}
_CELL = re.compile(r"(\d{1,6})([A-Z])(\d{1,6})")
_SHARED = re.compile(r"([ST])(\d{1,6})")
_OVERLAP = re.compile(r"\((.*);(.*)\)OVERLAP_F_B")
MAX_PASSES = 1_000_000
"""Cells that a file may have; what is longer is no table."""


def read_table(path: str, vocabulary: Vocabulary | None = None) -> Table:
  """Returns the table of a file, checked; see `parse_table`.

  Raises:
    InputError: As `parse_table`; or the file cannot be read.
  """
  try:
    text = pathlib.Path(path).read_text("utf-8")
  except (OSError, UnicodeDecodeError) as error:
    raise InputError(
      f"parallel.pipeline={path} is no CSV file that can be read ({error}); see that it is there; "
      "the config.json of a run has its table"
    ) from None
  return parse_table(text, path, vocabulary)


def parse_table(text: str, path: str, vocabulary: Vocabulary | None = None) -> Table:
  """Returns the table of a CSV text, checked.

  Args:
    text: The text.
    path: Its file, or what else it is called.
    vocabulary: The head over all devices, where the text has its `S` and `T`.

  Raises:
    InputError: One line with file, line and column: no pass, one that is missing or doubled, a
      stage on two devices or far from its neighbours, a deadlock.
  """
  lines = _cells(text, path)
  orders: list[tuple[Action, ...]] = []
  columns: list[list[int]] = []
  for number, cells in enumerate(lines):
    order, places = [], []
    for column, cell in enumerate(cells):
      if cell.strip():
        order.append(_action(cell.strip(), _where(path, number, column)))
        places.append(column)
    orders.append(tuple(order))
    columns.append(places)
  parts = [part for order in orders for action in order for part in action.parts]
  num_micro = 1 + max((part.micro for part in parts), default=-1)
  placement = _placement(path, orders, columns)
  if vocabulary is None and any(part.stage < 0 for part in parts):
    raise InputError(f"{path} has S and T, passes of a head over all devices; set the head so")
  try:
    table = Table(placement, num_micro, tuple(orders), vocabulary)
    check_table(table)
  except TableError as error:
    places = columns[error.device]
    column = places[error.place] if error.place < len(places) else 0
    raise InputError(f"{_where(path, error.device, column)}: {error.problem}") from None
  return table


def write_table(table: Table) -> str:
  """Returns a table as CSV text, ending in a line feed; `read_table` gives it back."""
  lines = [",".join(_cell(action) for action in order) for order in table.orders]
  return "\n".join(lines) + "\n"


def _cells(text: str, path: str) -> list[list[str]]:
  """Returns the cells of each line that has any."""
  try:
    lines = [line for line in csv.reader(text.splitlines(), strict=True) if line]
  except csv.Error as error:
    raise InputError(f"parallel.pipeline={path} is no CSV file ({error}); mend it") from None
  if sum(map(len, lines)) > MAX_PASSES:
    raise InputError(f"{path} has more than {MAX_PASSES} cells; give a table of one step")
  if not any(cell.strip() for line in lines for cell in line):
    raise InputError(f"{path} has no passes; give a line a device, such as 0F0,0B0")
  return lines


def _where(path: str, line: int, column: int) -> str:
  """Returns a place in a file, counted from 1 as editors do; columns are cells."""
  return f"{path}, line {line + 1}, column {column + 1}"


def _action(cell: str, where: str) -> Action:
  """Returns the pass of a cell."""
  if found := _SHARED.fullmatch(cell):
    return Action(-1, found[1], int(found[2]))
  if found := _OVERLAP.fullmatch(cell):
    halves = [_action(half.strip(), where) for half in found.groups()]
    if [half.kind for half in halves] != ["F", "BW"]:
      raise InputError(f"{where}: {cell!r} is no F beside a B, such as (0F7;7B3)OVERLAP_F_B")
    return overlapped(halves[0], halves[1])
  found = _CELL.fullmatch(cell)
  if not found or found[2] not in _KINDS:
    raise InputError(
      f"{where}: {cell[:40]!r} is no pass; there are 3F1, 3I1, 3W1, 3B1, 3R1, S1, T1 and "
      "(0F7;7B3)OVERLAP_F_B"
    )
  return Action(int(found[1]), _KINDS[found[2]], int(found[3]))


def _placement(path: str, orders: list[tuple[Action, ...]], columns: list[list[int]]) -> Placement:
  """Returns the device of each stage: the line where its passes are."""
  device_of: dict[int, int] = {}
  for device, order in enumerate(orders):
    for place, action in enumerate(order):
      for part in action.parts:
        home = device_of.setdefault(part.stage, device) if part.stage >= 0 else device
        if home != device:
          raise InputError(
            f"{_where(path, device, columns[device][place])}: stage {part.stage} has passes in "
            f"line {home + 1} too; a stage lies on one device"
          )
  missing = sorted(set(range(1 + max(device_of, default=0))) - set(device_of))
  if missing:
    raise InputError(f"{path} has no pass of stage {missing[0]}; stages are counted from 0")
  try:
    return Placement(tuple(device_of[stage] for stage in sorted(device_of)))
  except InputError as error:
    raise InputError(f"{path}: {error}") from None


def _cell(action: Action) -> str:
  """Returns a pass as a cell."""
  if action.stage < 0:
    return f"{action.kind}{action.micro}"
  if action.back is not None:
    return "(" + ";".join(map(_cell, action.parts)) + ")OVERLAP_F_B"
  return f"{action.stage}{_LETTERS[action.kind]}{action.micro}"
