"""Everything that looks at a run: what a person sees, what is written, what is timed."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator

from jaxmoe.train.progress import Display
from jaxmoe.train.run_log import Journal
from jaxmoe.train.wall_clock import Ledger
from jaxmoe.train.watchdog import Watchdog


@dataclasses.dataclass(frozen=True)
class Watch:
  """The onlookers of a run.

  Attributes:
    journal: metrics.jsonl and events.jsonl.
    display: What a person sees.
    ledger: Where the wall time goes.
    watchdog: Ends a run that hangs.
  """

  journal: Journal
  display: Display
  ledger: Ledger
  watchdog: Watchdog

  @contextlib.contextmanager
  def phase(self, category: str, name: str = "", brief: bool = False) -> Iterator[None]:
    """Books the time inside under `category`; shows it as `name` if there is one."""
    self.watchdog.beat(name or category)
    with contextlib.ExitStack() as stack:
      if name:
        stack.enter_context(self.display.phase(name, brief=brief))
      stack.enter_context(self.ledger.phase(category))
      yield

  def damaged(self, step: int, why: str) -> None:
    """Tells that a checkpoint is damaged and was set aside."""
    self.display.say(f"checkpoint {step} is damaged and set aside: {why}")
    self.journal.event("set_aside", step=step, why=why)

  def slow(self, domain: str, document: str, waited_s: float) -> None:
    """Tells that a batch is late, and which document is being read."""
    self.display.say(f"waiting for data: {waited_s:.0f} s; {domain} is reading {document}")
    clock = {"waited_s": round(waited_s, 1)}
    self.journal.event("data_slow", time=clock, domain=domain, document=document)

  def unread(self, domain: str, document: str, why: str) -> None:
    """Tells that a document could not be read and is tried again."""
    self.display.say(f"{domain}: {document} cannot be read ({why}); trying again")
    self.journal.event("data_retry", domain=domain, document=document, why=why)

  def worker(self, what: str, restarts: int) -> None:
    """Tells that the data worker 'died' or 'stalled' and was started again."""
    self.display.say(f"the data worker {what}; started another ({restarts})")
    self.journal.event("data_worker", what=what, restarts=restarts)
