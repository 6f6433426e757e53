"""Suites: what one is asked, and rows of rivals that are missing, wrong or failing."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence

from jaxmoe.bench.results import Row
from jaxmoe.bench.sides.process import OWN, RIVALS, Side, SideError
from jaxmoe.core.measured import MeasuredRow

OURS = "jaxmoe"


@dataclasses.dataclass(frozen=True)
class Asked:
  """What a suite is asked.

  Attributes:
    shapes: Names of `SHAPES`.
    rivals: Who else runs.
    count: Whether programs are compiled and counted, and nothing is timed.
    rounds: Of each race.
    pythons: The interpreters of our side and of rivals.
    env: Of their processes.
    peaks: Returns the FLOP/s and bytes per second that programs are held against.
    say: Told what is done, a line at a time.
    dtype: Of arrays, where a suite has a choice.
    keep: Takes what races say of back ends, for `auto`; None where nothing is kept.
    versions: Of the rivals that ran, by package.
  """

  shapes: tuple[str, ...]
  rivals: tuple[str, ...]
  count: bool
  rounds: int
  pythons: tuple[str, str]
  env: Mapping[str, str]
  peaks: Callable[[], tuple[float, float]]
  say: Callable[[str], None]
  dtype: str = "float32"
  keep: Callable[[list[MeasuredRow]], None] | None = None
  versions: dict[str, str] = dataclasses.field(default_factory=dict)

  def own_side(self) -> Side:
    """Returns our process."""
    return Side(OWN, self.pythons[0], self.env)

  @contextlib.contextmanager
  def rival_sides(
    self, labels: Mapping[str, str]
  ) -> Iterator[tuple[dict[str, Side], list[Row]]]:
    """Gives the processes of rivals by label, and rows that say how to get those not installed.

    A label is what rows call it; the value is its name in `RIVALS`.
    """
    with contextlib.ExitStack() as stack:
      sides, rows = {}, []
      for label, name in labels.items():
        rival = RIVALS[name]
        side = stack.enter_context(
          Side(rival.module, self.pythons[1], {**self.env, **dict(rival.env)})
        )
        if side.missing:
          rows.append(missing_row(label, side.missing, rival.install))
        else:
          sides[label] = side
          self.versions.update(side.ask("versions"))
      yield sides, rows


def missing_row(name: str, packages: Sequence[str], install: str) -> Row:
  """Returns the row of a rival that is not installed."""
  return {"name": name, "missing": f"{', '.join(packages)}: {install}"}


def checked(name: str, check: Callable[[], str | None]) -> Row | None:
  """Returns the row of a contestant that is wrong or fails, and so is not timed; None if right."""
  try:
    why = check()
  except SideError as error:
    return {"name": name, "failed": str(error)[:300]}
  return {"name": name, "wrong": why} if why else None
