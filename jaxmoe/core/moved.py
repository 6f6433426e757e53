"""Fields of recipes that files of earlier runs have at other places.

The record of a whole recipe lists them as `moved`. A config.json that has such a field opens, with
what it says where it belongs now; on the command line, or in the code of a recipe, it is refused in
one line that says where that is. Where the name alone changed, core/renamed.py has it.
"""

from __future__ import annotations

import copy
import dataclasses
import fnmatch
from collections.abc import Iterator, Mapping
from typing import Any


@dataclasses.dataclass(frozen=True)
class Moved:
  """A field that is elsewhere now.

  Attributes:
    record: The class that had it.
    path: Its path from the whole recipe, `*` for numbers on the way; its last name is the field's.
    now: By old value: new values by their paths. An old value that is not there stood for the
      default. Where several places held different values, defaults are taken.
  """

  record: str
  path: str
  now: Mapping[str, Mapping[str, str]]

  @property
  def places(self) -> str:
    """Where it is now, in words."""
    return " and ".join(dict.fromkeys(path for values in self.now.values() for path in values))


def moved_of(root: type) -> tuple[Moved, ...]:
  """Returns the fields of a whole recipe that have moved."""
  return getattr(root, "moved", ())


def from_before(root: type, plain: Any) -> Any:
  """Returns the plain values of a recipe with what has moved where it belongs; a copy if any has.

  A value that stands at the new place already is kept.
  """
  found: dict[str, set[str]] = {}
  taken = copy.deepcopy(plain) if any(_holders(plain, one) for one in moved_of(root)) else plain
  for one in moved_of(root):
    for holder, field in _holders(taken, one):
      for path, value in one.now.get(str(holder.pop(field)), {}).items():
        found.setdefault(path, set()).add(value)
  for path, values in found.items():
    *parents, name = path.split(".")
    place = taken
    for parent in parents:
      place = place.setdefault(parent, {})
    if len(values) == 1:
      place.setdefault(name, values.pop())
  return taken


def place_today(root: type, path: str) -> str | None:
  """Returns where a path of the command line is now; None where it has not moved."""
  return next((one.places for one in moved_of(root) if fnmatch.fnmatch(path, one.path)), None)


def keyword_today(root: type, record: str, keyword: str) -> str | None:
  """Returns where a keyword of a record is now; None where it has not moved."""
  for one in moved_of(root):
    if (one.record, one.path.rpartition(".")[2]) == (record, keyword):
      return one.places
  return None


def _holders(plain: Any, one: Moved) -> list[tuple[dict[str, Any], str]]:
  """Returns the dicts that hold a field at its old place, each with its name."""
  *parents, field = one.path.split(".")
  places: list[Any] = [plain]
  for name in parents:
    places = [inner for place in places for inner in _inside(place, name)]
  return [(place, field) for place in places if isinstance(place, dict) and field in place]


def _inside(place: Any, name: str) -> Iterator[Any]:
  if name == "*":
    yield from place if isinstance(place, list) else ()
  elif isinstance(place, dict) and name in place:
    yield place[name]
