"""Observers of a run: the console, the run log, the wall clock and the watchdog."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator

from jaxmoe.data.loader_callbacks import LoaderCallbacks
from jaxmoe.train.progress import Display
from jaxmoe.train.run_log import RunLog
from jaxmoe.train.wall_clock import WallClock
from jaxmoe.train.watchdog import Watchdog


@dataclasses.dataclass(frozen=True)
class Observers(LoaderCallbacks):
  """The onlookers of a run.

  Attributes:
    log: metrics.jsonl and events.jsonl.
    display: What a person sees.
    clock: Where the wall time goes.
    watchdog: Ends a run that hangs.
  """

  log: RunLog
  display: Display
  clock: WallClock
  watchdog: Watchdog

  @contextlib.contextmanager
  def phase(self, category: str, name: str = "", brief: bool = False) -> Iterator[None]:
    """Books the time inside under `category`; shows it as `name` if there is one."""
    self.watchdog.beat(name or category)
    with contextlib.ExitStack() as stack:
      if name:
        stack.enter_context(self.display.phase(name, brief=brief))
      stack.enter_context(self.clock.phase(category))
      yield

  def damaged(self, step: int, why: str) -> None:
    """Tells that a checkpoint is damaged and was set aside."""
    self.display.say(f"checkpoint {step} is damaged and set aside: {why}")
    self.log.event("set_aside", step=step, why=why)

  def slow(self, domain: str, document: str, waited_s: float) -> None:
    """Tells that a batch is late, and which document is being read."""
    self.display.say(f"waiting for data: {waited_s:.0f} s; {domain} is reading {document}")
    clock = {"waited_s": round(waited_s, 1)}
    self.log.event("data_slow", time=clock, domain=domain, document=document)

  def unread(self, domain: str, document: str, why: str) -> None:
    """Tells that a document could not be read and is tried again."""
    self.display.say(f"{domain}: {document} cannot be read ({why}); trying again")
    self.log.event("data_retry", domain=domain, document=document, why=why)

  def worker(self, what: str, restarts: int) -> None:
    """Tells that the data worker 'died' or 'stalled' and was started again."""
    self.display.say(f"the data worker {what}; started another ({restarts})")
    self.log.event("data_worker", what=what, restarts=restarts)
