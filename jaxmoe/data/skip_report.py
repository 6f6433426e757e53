"""The report of skipped records, and of files that end early or cannot be opened.

Bad records are counted by source and reason and listed by place; more than the stated share of a
source's records stops the run. A broken file stops it whatever its share, unless it is allowed:
then what it lost is counted in bytes.
"""

from __future__ import annotations

import collections
from collections.abc import Iterator
from fractions import Fraction
from typing import Any

from jaxmoe.core.errors import InputError
from jaxmoe.data.raw_example import RawExample, Source

_MAX_LISTED = 1000  # places of bad records that are listed; the counts are always complete
_SHOWN = 3  # places that are said


class SkipReport:
  """Counts and lists what is not read."""

  def __init__(self) -> None:
    self._counts: dict[str, collections.Counter[str]] = {}
    self._broken: dict[str, dict[str, int]] = {}
    self._places: dict[tuple[str, str], list[str]] = {}

  def add(self, domain: str, place: str, error: str) -> None:
    """Takes note of one bad record."""
    self._counts.setdefault(domain, collections.Counter())[error] += 1
    self._list(domain, "bad", f"{place}: {error}")

  def add_broken(self, domain: str, raw: RawExample, allowed: bool) -> None:
    """Takes note of a file that ends early or cannot be opened.

    Raises:
      InputError: such files are not allowed.
    """
    lost = raw.lost_bytes or 0
    if not allowed:
      raise InputError(
        f"{raw.place}: {raw.error}; at least {plural(lost, 'byte')} would be lost; mend it or "
        "take it away, or go on without them: --config.data.allow_broken_files=true"
      )
    of = self._broken.setdefault(domain, {"files": 0, "bytes": 0})
    of["files"], of["bytes"] = of["files"] + 1, of["bytes"] + lost
    line = f"{raw.place}: {raw.error}, at least {plural(lost, 'byte')} lost"
    self._list(domain, "broken", line)

  def check(self, source: Source, num_good: int, max_share: float) -> None:
    """Raises InputError when a source has no good record, or more than `max_share` bad ones."""
    domain = source.domain
    counts = self._counts.get(domain, collections.Counter())
    bad = sum(counts.values())
    # Of the decimal as it is written: 0.29 * 100 is less than 29.
    if num_good and bad <= Fraction(str(max_share)) * (bad + num_good):
      return
    nothing = f"it is empty: {getattr(source, 'path', '')}".rstrip(": ")
    reasons = ", ".join(f"{why} ({n})" for why, n in counts.most_common()) or nothing
    listed = [line for kind in ("bad", "broken") for line in self._of(domain, kind)][-_SHOWN:]
    raise InputError(
      f"source {domain!r}: {bad} of {bad + num_good} records cannot be used: {reasons}"
      f"{'; such as ' if listed else ''}{', '.join(listed)}; mend them, or allow more bad records "
      f"than --config.data.max_bad_share={max_share}"
    )

  def lines(self, domain: str) -> Iterator[str]:
    """Yields what is to be said of a source: nothing where everything was read."""
    if domain in self._counts:
      counts, listed = self._counts[domain], "; such as ".join(["", *self._of(domain, "bad")[:1]])
      reasons = ", ".join(f"{why} ({n})" for why, n in counts.most_common())
      yield f"skipped of {domain}: {plural(counts.total(), 'bad record')}: {reasons}{listed}"
    if domain in self._broken:
      size, files = self._broken[domain]["bytes"], self._broken[domain]["files"]
      listed = "; such as ".join(["", *self._of(domain, "broken")[:1]])
      yield (
        f"lost of {domain}: at least {plural(size, 'byte')} of {plural(files, 'file')} that cannot "
        f"be read to the end{listed}"
      )

  def plain(self) -> dict[str, Any]:
    """Returns the report as nested dicts and lists."""
    counts = {domain: dict(sorted(counts.items())) for domain, counts in self._counts.items()}
    places = [place for listed in self._places.values() for place in listed]
    return {"counts": counts, "broken": self._broken, "places": places}

  def _of(self, domain: str, kind: str) -> list[str]:
    return self._places.get((domain, kind), [])

  def _list(self, domain: str, kind: str, line: str) -> None:
    # The broken files are all listed: there are few, and each may be much of the data.
    if kind == "broken" or sum(map(len, self._places.values())) < _MAX_LISTED:
      self._places.setdefault((domain, kind), []).append(line)


def plural(number: int, noun: str) -> str:
  """Returns '1 file' or '2,000 files'."""
  return f"{number:,} {noun}" + ("" if number == 1 else "s")
