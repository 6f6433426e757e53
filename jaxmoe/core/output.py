"""Files that a command writes where a user says: whole or not at all, and never over an input.

A link stays, and what it points to is written. What is no plain file (a device such as /dev/null, a
FIFO, /dev/stdout) is written into and never replaced. Of a plain file a reader sees the old content
or the new, never a part; nothing else is left.
"""

from __future__ import annotations

import contextlib
import errno
import os
import pathlib
import re
import shutil
import stat
import sys
import tempfile
import uuid
from collections.abc import Callable, Iterable, Iterator
from typing import IO

from jaxmoe.core.errors import InputError

AnyPath = str | os.PathLike[str]
Content = str | bytes | Callable[[IO[bytes]], object]
"""What is written, or a function that writes it into an open file."""

_DESCRIPTOR = re.compile(r"/proc/(\d+|self|thread-self)(?:/task/\d+)?/fd/(\d+)")
_TRIED_BYTES = 4096


def check_output(
  path: AnyPath, where: str, inputs: Iterable[AnyPath] = (), cure: str = "choose another"
) -> None:
  """Returns if a file can be written at `path`; leaves nothing there.

  Args:
    path: The file.
    where: What an error calls it, such as `--out=scores.npz`.
    inputs: Files that are read, and folders in which nothing may be written.
    cure: What helps, besides room and rights.

  Raises:
    InputError: it is a folder or an input, or it cannot be written.
  """
  if os.path.isdir(path):
    raise InputError(f"{where}: is a folder; give the file to write")
  if _is_stream(path):
    if not os.access(path, os.W_OK):
      raise InputError(f"{where}: cannot be written (Permission denied); {cure}")
    return
  for other in inputs:
    if _is_or_lies_in(path, other):
      raise InputError(f"{where}: would be written over {other}, which is read; {cure}")
  folder = os.path.dirname(os.path.realpath(path))
  if not os.path.isdir(folder):
    raise InputError(f"{where}: cannot be written: {folder} is no folder; make it first")
  try:
    with _beside(_target(path)) as (file, _):
      file.write(bytes(_TRIED_BYTES))  # a full disk takes empty files
  except OSError as error:
    raise InputError(f"{where}: cannot be written ({error.strerror}); {cure}") from None


def write_output(path: AnyPath, where: str, content: Content) -> None:
  """Writes a file as `write_atomic` does.

  Raises:
    InputError: it cannot be written.
  """
  try:
    write_atomic(path, content)
  except BrokenPipeError:
    raise
  except OSError as error:
    raise InputError(
      f"{where}: cannot be written ({error.strerror or error}); make room there, or choose another"
    ) from None


def write_atomic(path: AnyPath, content: Content) -> None:
  """Writes a file whole, or into what is no plain file.

  Raises:
    OSError: it cannot be written; nothing is left of the attempt.
  """
  if _is_stream(path):
    with tempfile.TemporaryFile() as made:
      _put(content, made)
      made.seek(0)
      with _opened(path) as stream:
        shutil.copyfileobj(made, stream)
    return
  target = _target(path)
  with _beside(target) as (file, name):
    _put(content, file)
    file.flush()
    os.fsync(file.fileno())
    name.replace(target)


def _put(content: Content, file: IO[bytes]) -> None:
  if callable(content):
    content(file)
  else:
    file.write(content.encode() if isinstance(content, str) else content)


@contextlib.contextmanager
def _beside(target: pathlib.Path) -> Iterator[tuple[IO[bytes], pathlib.Path]]:
  """Gives an open file in the folder of another, and its name; under that name nothing is left."""
  # Not by the process alone: another machine that shares the folder may have one of that number.
  name = target.with_name(f".{target.name[:60]}.{os.getpid()}.{uuid.uuid4().hex[:8]}")
  try:
    with open(name, "wb") as file:
      yield file, name
  finally:
    with contextlib.suppress(OSError):
      name.unlink(missing_ok=True)


def _target(path: AnyPath) -> pathlib.Path:
  """Returns the plain file that a path leads to, which need not be there."""
  target = pathlib.Path(os.path.realpath(path))
  if os.path.islink(target):
    raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), str(path))
  os.stat(target.parent)  # or an error would name the file that is written beside it
  if len(os.fsencode(target.name)) > os.pathconf(target.parent, "PC_NAME_MAX"):
    raise OSError(errno.ENAMETOOLONG, os.strerror(errno.ENAMETOOLONG), str(path))
  return target


def _is_stream(path: AnyPath) -> bool:
  """Whether a path leads to what cannot be replaced: a device, a FIFO, an open file of ours."""
  try:
    return not stat.S_ISREG(os.stat(path).st_mode) or _descriptor(path) is not None
  except OSError:
    return False


def _descriptor(path: AnyPath) -> int | None:
  """Returns the number of the open file of this process that a path names, such as /dev/stdout."""
  here = os.path.abspath(path)
  for _ in range(40):
    here = os.path.join(os.path.realpath(os.path.dirname(here)), os.path.basename(here))
    found = _DESCRIPTOR.fullmatch(here)
    if found and found[1] in ("self", "thread-self", str(os.getpid())):
      return int(found[2])
    if found or not os.path.islink(here):
      return None
    here = os.path.join(os.path.dirname(here), os.readlink(here))
  return None


@contextlib.contextmanager
def _opened(path: AnyPath) -> Iterator[IO[bytes]]:
  """Gives a stream to write into."""
  number = _descriptor(path)
  if number is None:
    with open(path, "wb") as file:
      yield file
    return
  # A copy shares the place in the file with what is printed; opened anew it would begin at 0.
  for stream in filter(None, (sys.stdout, sys.stderr)):
    stream.flush()
  with open(os.dup(number), "wb") as file:
    yield file


def _is_or_lies_in(path: AnyPath, other: AnyPath) -> bool:
  """Whether writing a file would change another, or the content of a folder."""
  with contextlib.suppress(OSError):
    if os.path.samefile(path, other):
      return True
  ours, theirs = os.path.realpath(path), os.path.realpath(other)
  return ours == theirs or (os.path.isdir(theirs) and ours.startswith(os.path.join(theirs, "")))
