"""Files that a path stands for: a folder, a glob or one file; each real file once.

Links are followed. A folder that links reach again, or that holds a link to itself, is entered
once, and a file with several names goes by the one that has no link in it, or by the first.
"""

from __future__ import annotations

import fnmatch
import glob
import os
from collections.abc import Iterable, Iterator

from jaxmoe.core.errors import InputError

FoundFiles = list[tuple[str, str]]
"""(path relative to the folder, path) of files, sorted."""


def check_path(path: str, what: str) -> None:
  """Raises InputError for an empty path; whether it exists is seen when the corpus is opened."""
  if not path:
    raise InputError(f"path is empty; set it to {what}")


def find_files(
  path: str, suffixes: tuple[str, ...], as_found: bool = False, instead: tuple[str, ...] = ()
) -> FoundFiles:
  """Returns the files `path` stands for.

  A glob counts from its longest leading folder without a wildcard. A file named outright, or by a
  glob, may have any suffix; in a folder only `suffixes` count. Hidden files are found by no folder.

  Args:
    path: A folder, a glob (`**` crosses folders) or a file.
    suffixes: Of the files that count in a folder.
    as_found: As often as links lead to them; links to nothing and closed folders are passed over.
    instead: The suffixes that count in a folder without a file of `suffixes`.

  Raises:
    InputError: nothing is there, or a folder cannot be listed.
  """
  if os.path.isfile(path):
    return [(os.path.basename(path), path)]
  in_folder = os.path.isdir(path)
  root = path if in_folder else _fixed_folder(path)
  try:
    found = list(_glob(path, in_folder) if as_found else _expand_all(path, in_folder))
  except OSError as error:
    raise InputError(f"{error.filename}: cannot be listed ({error.strerror})") from None
  names = [(os.path.relpath(item, root).replace(os.sep, "/"), item) for item in found]
  for kinds in (suffixes, instead) if in_folder else (("",),):
    files = [(name, item) for name, item in names if item.endswith(kinds)]
    if files:
      return sorted(files) if as_found else deduplicate(files, root)
  shown = " or ".join((*suffixes, *instead))
  raise InputError(f"no {shown} file at {path!r}; name a file, a folder or a glob of them")


def deduplicate(files: Iterable[tuple[str, str]], root: str) -> FoundFiles:
  """Returns each real file once, under its name without a link below `root` if it has one."""
  real_root, names = os.path.realpath(root), dict[str, tuple[bool, str, str]]()
  for name, item in files:
    real = os.path.realpath(item)
    candidate = (real != os.path.join(real_root, *name.split("/")), name, item)
    names[real] = min(candidate, names.get(real, candidate))
  return sorted((name, item) for _, name, item in names.values())


def _fixed_folder(pattern: str) -> str:
  """Returns the longest leading folder of `pattern` without a wildcard."""
  folder = pattern
  while glob.has_magic(folder):
    folder = os.path.dirname(folder)
  return folder or "."


def _glob(path: str, in_folder: bool) -> Iterator[str]:
  pattern = os.path.join(glob.escape(path), "**", "*") if in_folder else path
  return filter(os.path.isfile, glob.iglob(pattern, recursive=True))


def _expand_all(path: str, in_folder: bool) -> Iterator[str]:
  """Yields the files of a folder or a glob, and links to nothing, which are files that are lost."""
  start, pattern = (path, "**/*") if in_folder else ("/" if os.path.isabs(path) else "", path)
  for item in _expand(start, [part for part in pattern.split("/") if part]):
    if os.path.isfile(item) or (os.path.islink(item) and not os.path.exists(item)):
      yield item


def _expand(folder: str, parts: list[str]) -> Iterator[str]:
  """Yields what the parts of a pattern stand for in `folder`, as module glob does."""
  part, *rest = parts
  if part == "**":
    for below in _folders(folder):
      yield from _expand(below, rest or ["*"])
    return
  if not glob.has_magic(part):
    names = [part] if os.path.lexists(os.path.join(folder, part)) else []
  else:
    names = [name for name in _list(folder) if _matches(name, part)]
  for name in names:
    item = os.path.join(folder, name)
    if not rest:
      yield item
    elif os.path.isdir(item):
      yield from _expand(item, rest)


def _matches(name: str, pattern: str) -> bool:
  return fnmatch.fnmatch(name, pattern) and (pattern[0] == "." or name[0] != ".")


def _folders(root: str) -> Iterator[str]:
  """Yields `root` and each real folder below it once; those that no link leads to come first."""
  seen, waiting = set[str](), [root]
  while waiting:
    plain, waiting = waiting, []
    while plain:
      folder = plain.pop()
      real = os.path.realpath(folder)
      if real in seen:
        continue
      seen.add(real)
      yield folder
      below = [os.path.join(folder, name) for name in _list(folder) if name[0] != "."]
      plain += [item for item in below if os.path.isdir(item) and not os.path.islink(item)]
      waiting += [item for item in below if os.path.isdir(item) and os.path.islink(item)]


def _list(folder: str) -> list[str]:
  return sorted(os.listdir(folder or "."))
