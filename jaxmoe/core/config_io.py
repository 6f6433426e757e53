"""Recipes: trees of frozen dataclasses, their JSON, overrides and differences.

A record's fields are numbers, strings, booleans, `None`, tuples and further records. A field that
may hold one of several components is declared with `choice(FAMILY, default)`, where FAMILY is the
visible dict `{name: (class, tiny instance)}`; in JSON the component is an object with its name
under `kind`. Nothing is imported by name and nothing is evaluated.

Overrides are applied to the plain nested values and the tree is rebuilt once, bottom up, so that
every check in a `__post_init__` sees final values and the order of overrides does not matter.

A field that came later than the first config.json is declared with `added(default, before)`: files
that have no such field get `before`, so runs begun earlier go on as they were; `as_begun` does so
for the recipe that a run came from. A field whose name changed is declared with `renamed` of
core/renamed.py; one that is elsewhere now is in `moved` of the whole recipe, see core/moved.py.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
import types
import typing
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

from jaxmoe.core.errors import InputError
from jaxmoe.core.moved import from_before, place_today
from jaxmoe.core.renamed import name_before, name_today, value_of

Family = Mapping[str, tuple[type, Any]]
Record = TypeVar("Record")

KIND = "kind"
_BEFORE = "before"


def choice(family: Family, default: Any = dataclasses.MISSING) -> Any:
  """Declares a dataclass field that holds a component of `family`, or a tuple of them."""
  return dataclasses.field(default=default, metadata={"family": family})


def added(default: Any, before: Any, family: Family | None = None) -> Any:
  """Declares a field that older files have not: there it is `before`, in new recipes `default`.

  Args:
    default: Of new recipes.
    before: What the code did when there was no such field.
    family: As in `choice`.
  """
  metadata = {_BEFORE: before} | ({} if family is None else {"family": family})
  return dataclasses.field(default=default, metadata=metadata)


def component(family: Family, keyword: str, name: str) -> Any:
  """Returns the tiny instance called `name`, for recipes whose keywords are component names.

  Raises:
    InputError: `name` is not in the visible dict.
  """
  if name not in family:
    raise unknown("get_config", keyword, name, family)
  return family[name][1]


def to_plain(record: Any, family: Family | None = None, as_before: bool = False) -> Any:
  """Returns `record` as nested dicts, lists and scalars, as JSON has them.

  Args:
    record: A record, a tuple of them, or a scalar.
    family: What `record` is a component of.
    as_before: Leaves out fields that came later and have the value of the time before, and gives
      others the names they had, so that a digest of what is left is that of files of that time.
  """
  if isinstance(record, tuple):
    return [to_plain(item, family, as_before) for item in record]
  if not dataclasses.is_dataclass(record):
    return record
  plain = {} if family is None else {KIND: _kind(record, family)}
  for field in dataclasses.fields(record):
    value = getattr(record, field.name)
    if as_before and _BEFORE in field.metadata and value == field.metadata[_BEFORE]:
      continue
    name = name_before(field) if as_before else field.name
    plain[name] = to_plain(value, field.metadata.get("family"), as_before)
  return plain


def from_plain(cls: type[Record], plain: Any, where: str = "config") -> Record:
  """Returns the record `to_plain` came from; missing fields are as before they were added.

  Fields that were there from the start take their defaults.

  Raises:
    InputError: an unknown or missing field, a value of the wrong type, an unknown component, or a
      check of the record itself; the message starts with the path of the field.
  """
  return _record(cls, from_before(cls, plain), where, skip_kind=False)


def as_begun(record: Any, plain: Any, family: Family | None = None) -> Any:
  """Returns `record` with what came later as it was before, where the file of its run says so.

  Args:
    record: What a recipe returns today, whose fields that were declared with `added` have their
      defaults unless the recipe sets them.
    plain: What the config.json of a run holds that the recipe began.
    family: What `record` is a component of.
  """
  if isinstance(record, tuple) and isinstance(plain, list) and len(record) == len(plain):
    return tuple(as_begun(item, old, family) for item, old in zip(record, plain))
  if not dataclasses.is_dataclass(record) or not isinstance(plain, dict):
    return record
  if family is not None and plain.get(KIND) != _kind(record, family):
    return record
  changes = {}
  for field in dataclasses.fields(record):
    value, before = getattr(record, field.name), field.metadata.get(_BEFORE)
    if _BEFORE in field.metadata and value == field.default:
      inner = field.metadata.get("family")
      if value_of(plain, field, to_plain(before, inner)) == to_plain(before, inner):
        changes[field.name] = before
        continue
    if field.name in plain or name_before(field) in plain:
      old = value_of(plain, field)
      changes[field.name] = as_begun(value, old, field.metadata.get("family"))
  return dataclasses.replace(record, **changes)  # type: ignore[type-var]


def to_json(record: Any) -> str:
  """Returns `record` as JSON text; `from_json` is its exact inverse."""
  return json.dumps(to_plain(record), indent=2, allow_nan=False) + "\n"


def from_json(cls: type[Record], text: str, where: str = "config") -> Record:
  """Returns the record whose `to_json` is `text`."""
  try:
    plain = json.loads(text)
  except json.JSONDecodeError as error:
    raise InputError(f"{where}: not JSON ({error}); write the file again") from None
  return from_plain(cls, plain, where)


def override(record: Record, changes: Iterable[tuple[str, str]]) -> Record:
  """Returns `record` with the fields named by dotted paths set from text.

  Args:
    record: The recipe to start from; it is not changed.
    changes: Pairs such as `('model.stack.0.repeats', '4')`. Numbers of a path index tuples.

  Raises:
    InputError: an unknown path, text that is no value of the field's type, two changes of one
      field, or a check of the rebuilt record.
  """
  plain = to_plain(record)
  seen: list[str] = []
  for path, text in changes:
    for other in seen:
      if f"{path}.".startswith(f"{other}.") or f"{other}.".startswith(f"{path}."):
        raise InputError(f"config.{path}: set twice (also as config.{other}); set it once")
    seen.append(path)
    if (now := place_today(type(record), path)) is not None:
      raise InputError(f"config.{path}: is {now} now; set --config.{now.split(' ')[0]}")
    _set_path(type(record), plain, path.split("."), text)
  return from_plain(type(record), plain)


def diff(old: Any, new: Any) -> dict[str, tuple[Any, Any]]:
  """Returns {dotted path: (old value, new value)} of the fields in which two records differ."""
  old_flat, new_flat = dict(_flatten(to_plain(old))), dict(_flatten(to_plain(new)))
  absent = "(absent)"
  paths = [*old_flat, *(path for path in new_flat if path not in old_flat)]
  pairs = {path: (old_flat.get(path, absent), new_flat.get(path, absent)) for path in paths}
  return {path: pair for path, pair in pairs.items() if pair[0] != pair[1]}


def unknown(where: str, what: str, name: str, known: Iterable[str]) -> InputError:
  """Returns the error for a name that is not in a list, with the closest one that is."""
  known = sorted(known)
  close = difflib.get_close_matches(name, known, n=1)
  hint = f"did you mean {close[0]!r}? " if close else ""
  return InputError(f"{where}: unknown {what} {name!r}; {hint}known: {', '.join(known)}")


def _flatten(plain: Any, path: str = "") -> Iterable[tuple[str, Any]]:
  """Yields (dotted path, scalar) pairs; an empty list counts as a scalar."""
  items: Iterable[tuple[Any, Any]] = ()
  if isinstance(plain, dict):
    items = plain.items()
  elif isinstance(plain, list):
    items = enumerate(plain)
  if not isinstance(plain, (dict, list)) or not plain:
    yield path, plain
  for name, value in items:
    yield from _flatten(value, f"{path}.{name}" if path else str(name))


def _kind(record: Any, family: Family) -> str:
  for name, (cls, _) in family.items():
    if type(record) is cls:
      return name
  raise InputError(
    f"{type(record).__name__} is not in the visible dict of its family ({', '.join(family)}); "
    "add one line there"
  )


def _component_class(plain: Any, family: Family, where: str) -> type:
  if not isinstance(plain, dict) or KIND not in plain:
    raise InputError(f"{where}: expected an object with {KIND!r}, got {plain!r}")
  if plain[KIND] not in family:
    raise unknown(where, "component", str(plain[KIND]), family)
  return family[plain[KIND]][0]


def _record(cls: type[Record], plain: Any, where: str, skip_kind: bool) -> Record:
  if not isinstance(plain, dict):
    raise InputError(f"{where}: expected the fields of {cls.__name__}, got {plain!r}")
  hints = typing.get_type_hints(cls)
  fields = {field.name: field for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
  values = {}
  for written, value in plain.items():
    if skip_kind and written == KIND:
      continue
    name = name_today(cls, written)
    if name not in fields:
      raise unknown(where, f"field of {cls.__name__}", name, fields)
    if name in values:
      raise InputError(f"{where}: {name} is given twice, as {written} too; keep one")
    family = fields[name].metadata.get("family")
    values[name] = _value(hints[name], value, f"{where}.{name}", family)
  for name, field in fields.items():
    if name in values:
      continue
    if _BEFORE in field.metadata:
      values[name] = field.metadata[_BEFORE]
    elif field.default is field.default_factory is dataclasses.MISSING:
      raise InputError(f"{where}: {cls.__name__} needs the field {name!r}")
  try:
    return cls(**values)
  except InputError as error:
    raise InputError(f"{where}: {error}") from None


def _value(hint: Any, plain: Any, where: str, family: Family | None) -> Any:
  """Returns the value of type `hint` that `plain` stands for."""
  origin, arguments = typing.get_origin(hint), typing.get_args(hint)
  if origin in (typing.Union, types.UnionType) and type(None) in arguments:
    if plain is None:
      return None
    rest = tuple(argument for argument in arguments if argument is not type(None))
    return _value(typing.Union[rest], plain, where, family)  # noqa: UP007
  if origin is tuple:
    return _tuple(arguments, plain, where, family)
  if family is not None:
    cls = _component_class(plain, family, where)
    return _record(cls, plain, where, skip_kind=True)
  if dataclasses.is_dataclass(hint):
    return _record(typing.cast(type, hint), plain, where, skip_kind=False)
  return _scalar(hint, plain, where)


def _tuple(arguments: tuple[Any, ...], plain: Any, where: str, family: Family | None) -> tuple:
  if not isinstance(plain, (list, tuple)):
    raise InputError(f"{where}: expected a list, got {plain!r}")
  if arguments[-1] is Ellipsis:
    arguments = (arguments[0],) * len(plain)
  if len(arguments) != len(plain):
    raise InputError(f"{where}: expected {len(arguments)} values, got {len(plain)}: {plain!r}")
  pairs = enumerate(zip(arguments, plain))
  return tuple(_value(hint, item, f"{where}.{i}", family) for i, (hint, item) in pairs)


def _scalar(hint: Any, plain: Any, where: str) -> Any:
  if typing.get_origin(hint) is typing.Literal:
    if plain in typing.get_args(hint):
      return plain
    raise unknown(where, "value", str(plain), map(str, typing.get_args(hint)))
  if hint is float and type(plain) is int:
    plain = float(plain)
  if type(plain) is not hint:
    raise InputError(f"{where}: expected {getattr(hint, '__name__', hint)}, got {plain!r}")
  if hint is float and not math.isfinite(plain):
    raise InputError(f"{where}: expected a finite number, got {plain}")
  return plain


def _set_path(cls: Any, plain: Any, path: list[str], text: str) -> None:
  """Sets the field at `path` of nested plain values of record type `cls` from `text`.

  A record that is None on the way becomes one of defaults.
  """
  hint, family, where = cls, None, "config"
  for depth, name in enumerate(path):
    parent, last, hint = plain, depth == len(path) - 1, _strip_none(hint)
    if typing.get_origin(hint) is tuple:
      key: Any = _index(name, parent, where)
      arguments = typing.get_args(hint)
      hint = arguments[0] if arguments[-1] is Ellipsis else arguments[key]
    elif isinstance(parent, dict):
      key = name
      owner = _component_class(parent, family, where) if family is not None else hint
      fields = {field.name: field for field in dataclasses.fields(owner)}
      if name not in fields:
        raise _no_field(owner, where, name)
      hint, family = typing.get_type_hints(owner)[name], fields[name].metadata.get("family")
    else:
      raise InputError(f"{where}: has no field {name!r}; it holds {parent!r}")
    where = f"{where}.{name}"
    if last:
      parent[key] = _parse(hint, text, where, family)
    elif parent[key] is None and family is None:
      parent[key] = _defaults(_strip_none(hint))
    plain = parent[key]


def _no_field(owner: type, where: str, name: str) -> InputError:
  """Returns the error for a name on the command line that is no field of a record."""
  now = name_today(owner, name)
  if now != name:
    return InputError(f"{where}.{name}: is called {now} now; set {where}.{now}")
  names = [field.name for field in dataclasses.fields(owner)]
  return unknown(where, f"field of {owner.__name__}", name, names)


def _defaults(hint: Any) -> Any:
  """Returns the plain values of a record of defaults; None for what is none, or has none."""
  if not dataclasses.is_dataclass(hint):
    return None
  needs = [field.default is field.default_factory for field in dataclasses.fields(hint)]
  return None if any(needs) else to_plain(typing.cast(type, hint)())


def _index(name: str, parent: list, where: str) -> int:
  if not (name.isascii() and name.isdecimal() and len(name) < 10) or int(name) >= len(parent):
    raise InputError(f"{where}: has {len(parent)} entries (0 to {len(parent) - 1}), not {name!r}")
  return int(name)


def _strip_none(hint: Any) -> Any:
  arguments = [argument for argument in typing.get_args(hint) if argument is not type(None)]
  is_union = typing.get_origin(hint) in (typing.Union, types.UnionType)
  return arguments[0] if is_union and len(arguments) == 1 else hint


def _parse(hint: Any, text: str, where: str, family: Family | None) -> Any:
  """Returns the plain value `text` stands for, by the type of the field it goes to."""
  if text.lower() == "none" and _strip_none(hint) is not hint:
    return None
  hint = _strip_none(hint)
  if family is not None or dataclasses.is_dataclass(hint):
    raise InputError(
      f"{where}: is a component, not a value; name it in the config argument "
      "(--config=FILE.py:name=value) or set one of its fields"
    )
  if typing.get_origin(hint) is tuple:
    element = typing.get_args(hint)[0]
    items = [item.strip() for item in text.strip("[]()").split(",") if item.strip()]
    return [_parse(element, item, where, None) for item in items]
  try:
    return _from_text(hint, text)
  except ValueError:
    name = getattr(hint, "__name__", str(hint))
    raise InputError(f"{where}: expected {name}, got {text!r}") from None


def _from_text(hint: Any, text: str) -> Any:
  if typing.get_origin(hint) is typing.Literal:
    options = {str(option): option for option in typing.get_args(hint)}
    return options.get(text, text)
  if hint is bool:
    if text.lower() not in ("true", "false"):
      raise ValueError(text)
    return text.lower() == "true"
  return hint(text)
