"""Fields of recipes that files of earlier runs have under other names.

Such a field is declared with `renamed("old name", ...)`, where it stands. A config.json with the
old name opens; what is written has the new one; an old name on the command line, or in the code of
a recipe, is refused in one line that says the new one. Digests of recipes hash the old name, so
they are what they were.
"""

from __future__ import annotations

import dataclasses
import re
import typing
from collections.abc import Mapping
from typing import Any

from jaxmoe.core.moved import keyword_today

_WAS = "was"


def renamed(was: str, value: Any = dataclasses.MISSING) -> Any:
  """Declares a field that older files call `was`.

  Args:
    was: The old name; no name of another field.
    value: Its default, or the field as `choice` or `added` of core/config_io.py declare it.
  """
  field = value if isinstance(value, dataclasses.Field) else dataclasses.field(default=value)
  metadata = {_WAS: was, **field.metadata}
  return dataclasses.field(default=field.default, metadata=metadata)


def name_before(field: dataclasses.Field) -> str:
  """Returns the name by which the oldest files, and all digests, know a field."""
  return field.metadata.get(_WAS, field.name)


def name_today(cls: type, name: str) -> str:
  """Returns the name of the field of a record that a file calls `name`."""
  return {name_before(field): field.name for field in dataclasses.fields(cls)}.get(name, name)


def value_of(plain: Mapping[str, Any], field: dataclasses.Field, absent: Any = None) -> Any:
  """Returns what plain values hold for a field, under either name."""
  return plain.get(field.name, plain.get(name_before(field), absent))


def advice(root: type, message: str) -> str:
  """Returns the new name or place where Python refused an old keyword; empty for all else.

  Args:
    root: The record that holds, somewhere, the one whose keyword it is.
    message: Of the TypeError.
  """
  found = re.match(r"(\w+)\.__init__\(\) got an unexpected keyword argument '(\w+)'", message)
  if found and (now := keyword_today(root, found[1], found[2])) is not None:
    return f"{found[2]} is {now} of the experiment now; "
  for cls in _records(root) if found else ():
    if found and cls.__name__ == found[1] and name_today(cls, found[2]) != found[2]:
      return f"{found[2]} is called {name_today(cls, found[2])} now; "
  return ""


def _records(root: type) -> set[type]:
  """Returns the classes of all records that one of `root` may hold, itself among them."""
  seen: set[type] = set()
  todo = [root]
  while todo:
    cls = todo.pop()
    if cls in seen or not dataclasses.is_dataclass(cls):
      continue
    seen.add(cls)
    hints = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
      family = field.metadata.get("family") or {}
      todo += [member for member, _ in family.values()]
      todo += _classes(hints[field.name])
  return seen


def _classes(hint: Any) -> list[type]:
  """Returns the classes that a type names, those of its arguments among them."""
  inner = [cls for argument in typing.get_args(hint) for cls in _classes(argument)]
  return [*inner, hint] if isinstance(hint, type) else inner
