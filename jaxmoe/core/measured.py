"""Races of back ends on devices, by which `auto` chooses there.

`jaxmoe bench kernels` on a device that is no CPU writes a row for each back end that it raced, into
the machine's own file; `jaxmoe/ops/measured.json`, where there is one, has rows for everybody. A
need belongs to the nearest race of its operation, kind of device, JAX and dtype whose every size is
within a factor of `NEAR`: back ends do not change places within a few tiles. Where no race is near,
or none of its back ends fits, `auto` goes by the order of the dict, and kernels that nobody has
timed stay out.

On CPU nothing is looked up: what `auto` takes there is told by the code alone.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import hashlib
import inspect
import json
import math
import pathlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax

from jaxmoe.core.errors import InputError
from jaxmoe.core.output import write_atomic

NEAR = 4
"""How far a size may be from that of a race."""
_ROOT = pathlib.Path(__file__).parents[2]
SHIPPED = _ROOT / "jaxmoe/ops/measured.json"
"""Rows for everybody."""


@dataclasses.dataclass(frozen=True)
class MeasuredRow:
  """How a back end did in a race.

  Attributes:
    operation: Of `jaxmoe/ops`.
    backend: Its name.
    kind: Of the device, such as 'NVIDIA H200'.
    jax: The version.
    dtype: Of the rows.
    sizes: By letter, as a need has them.
    right: Whether values and gradients were those of the operation's oracle.
    ratio: Its seconds over those of the race's first back end that was right; 0 if it was not.
    sources: The digest of what it is made of.
  """

  operation: str
  backend: str
  kind: str
  jax: str
  dtype: str
  sizes: Mapping[str, int]
  right: bool
  ratio: float
  sources: str

  @property
  def race(self) -> tuple[Any, ...]:
    """What rows of one race share."""
    sizes = tuple(sorted(self.sizes.items()))
    return self.operation, self.kind, minor(self.jax), self.dtype, sizes

  @property
  def key(self) -> tuple[Any, ...]:
    """What there is one row of."""
    return *self.race, self.backend


def minor(version: str) -> str:
  """Returns '0.10' of '0.10.2'."""
  return ".".join(version.split(".")[:2])


class Measured:
  """Rows of races.

  Args:
    rows: Where two are of the same race and back end, the last one counts.
  """

  def __init__(self, rows: Iterable[MeasuredRow] = ()):
    self.rows = tuple({row.key: row for row in rows}.values())

  @functools.cached_property
  def digest(self) -> str:
    """A digest of all rows."""
    text = json.dumps([dataclasses.asdict(row) for row in self.rows], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]

  def near(
    self, operation: str, kind: str, dtype: str, sizes: Mapping[str, int]
  ) -> list[MeasuredRow]:
    """Returns the right rows of the nearest race, the fastest first; none where none is near."""
    races: dict[tuple[Any, ...], list[MeasuredRow]] = {}
    for row in self.rows:
      same = row.operation, row.kind, row.dtype, minor(row.jax)
      if same == (operation, kind, dtype, minor(jax.__version__)):
        races.setdefault(row.race, []).append(row)
    nearest, found = math.inf, []
    for rows in races.values():
      away = _away(rows[0].sizes, sizes)
      if away < nearest:
        nearest, found = away, rows
    return sorted((row for row in found if row.right), key=lambda row: row.ratio)


def _away(one: Mapping[str, int], other: Mapping[str, int]) -> float:
  """Returns how far sizes are from each other; infinity where a size is further than `NEAR`."""
  if set(one) != set(other) or min((*one.values(), *other.values()), default=1) < 1:
    return math.inf
  away = [abs(math.log(one[letter] / other[letter])) for letter in one]
  return math.inf if max(away, default=0.0) > math.log(NEAR) + 1e-9 else sum(away)


def read_measured(path: pathlib.Path) -> list[MeasuredRow]:
  """Returns the rows of a file; none where there is no file.

  Raises:
    InputError: the file is not one of rows.
  """
  if not path.is_file():
    return []
  try:
    rows = json.loads(path.read_text(encoding="utf-8"))["rows"]
    return [MeasuredRow(**row) for row in rows]
  except (ValueError, TypeError, KeyError) as error:
    raise InputError(
      f"{path} has no rows of measured back ends: {error}; remove it and run jaxmoe bench kernels"
    ) from None


def write_measured(rows: Iterable[MeasuredRow], path: pathlib.Path) -> None:
  """Writes rows over those of the same keys, and keeps the others; all or nothing."""
  merged = Measured((*read_measured(path), *rows)).rows
  lines = ",\n".join(json.dumps(dataclasses.asdict(row)) for row in merged)
  path.parent.mkdir(parents=True, exist_ok=True)
  write_atomic(path, f'{{"about": "measured by jaxmoe bench kernels", "rows": [\n{lines}\n]}}\n')


@functools.cache
def source_digest(function: Callable[..., Any]) -> str:
  """Returns a digest of the file of a function and of what that imports from its own package.

  A package is the first two names of a module, such as `jaxmoe.ops`. Functions that are made by
  `functools.partial` are those inside.
  """
  while isinstance(function, functools.partial):
    function = function.func
  return file_digest(pathlib.Path(inspect.getsourcefile(inspect.unwrap(function)) or __file__))


def file_digest(start: pathlib.Path, root: pathlib.Path = _ROOT) -> str:
  """Returns a digest of a file and of what it imports from its own package, directly or not."""
  package = ".".join(start.relative_to(root).parts[:2])
  seen: set[pathlib.Path] = set()
  todo = [start]
  while todo:
    path = todo.pop()
    if path in seen:
      continue
    seen.add(path)
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
      if isinstance(node, ast.ImportFrom) and f"{node.module}.".startswith(f"{package}."):
        file = root / f"{(node.module or '').replace('.', '/')}.py"
        todo.append(file if file.is_file() else file.with_suffix("") / "__init__.py")
  total = hashlib.sha256()
  for path in sorted(seen):
    total.update(path.relative_to(root).as_posix().encode())
    total.update(path.read_bytes())
  return total.hexdigest()[:16]


class _Files:
  """The files that this process goes by, read when first asked."""

  def __init__(self) -> None:
    self.paths: tuple[pathlib.Path, ...] = (SHIPPED,)

  def also(self, path: pathlib.Path) -> None:
    """Goes by another file, too, whose rows count before those of the others."""
    self.paths = (*(each for each in self.paths if each != path), path)
    self.__dict__.pop("known", None)

  @functools.cached_property
  def known(self) -> Measured:
    return Measured(row for path in self.paths for row in read_measured(path))


_FILES = _Files()


def also_read(path: pathlib.Path) -> None:
  """Makes this process go by a machine's own rows, too: a setting, like those of JAX."""
  _FILES.also(path)


def known() -> Measured:
  """Returns the rows that this process goes by.

  Raises:
    InputError: a file of them is not one of rows.
  """
  return _FILES.known
