"""Options of a run besides its recipe, what it returns, and what it calls on the way."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Callable
from typing import Any, Protocol

from jaxmoe.core.kept_programs import KeptPrograms
from jaxmoe.core.layout import Layout
from jaxmoe.models.transformer import Params
from jaxmoe.train.profile import Profiler
from jaxmoe.train.train_state import State
from jaxmoe.train.wall_clock import WallClock


class Hook(Protocol):
  """Something that is done every so many steps; `name` is the category its time is booked in."""

  name: str
  every: int

  def __call__(self, step: int, state: State) -> dict[str, Any]:
    """Returns what is written into the line of the step. Must not change the state."""


class StateEngine(Protocol):
  """Something that may replace the state every so many steps, such as an exchange between runs.

  It is called between two steps, before hooks look at the state and before it is saved; its time is
  booked as `engine`.
  """

  every: int

  def __call__(self, step: int, state: State) -> State:
    """Returns the state to go on from: of the same shapes, dtypes and shardings."""


class StepListener(Protocol):
  """Something that also takes the lines; it neither raises nor waits."""

  def __call__(self, line: dict[str, Any]) -> None:
    """Takes the line of a step."""

  def rollback(self, step: int) -> None:
    """Forgets the lines after `step`, which will come again."""


@dataclasses.dataclass(frozen=True)
class RunOptions:
  """What a run is given by whoever starts it, besides what it trains.

  Attributes:
    recipe: Where the recipe comes from, `{"name", "changes": {path: [recipe's, this run's]}}`.
    clock: Where the wall time of the process goes.
    listeners: Who takes lines besides the log.
    profiler: What looks at single steps.
    check_first: Called with layout, parameters and batch before the process' first step; what it
      returns is said.
    peaks: The folder where the best matmul rates ever seen are kept; None keeps none.
    engine: What may replace the state between two steps.
    programs: The folder of programs that processes leave each other; None traces each anew.
  """

  recipe: dict[str, Any] | None = None
  clock: WallClock | None = None
  listeners: tuple[StepListener, ...] = ()
  profiler: Profiler | None = None
  check_first: Callable[[Layout, Params, Any], str] | None = None
  peaks: pathlib.Path | None = None
  engine: StateEngine | None = None
  programs: KeptPrograms | None = None


@dataclasses.dataclass(frozen=True)
class RunResult:
  """Where a run stands when it returns: at its last step or where it was asked to stop."""

  step: int
  done: bool
