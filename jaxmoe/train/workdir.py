"""The folder of a run: its paths, its lock, and whether a recipe may go on in it."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import pathlib
import tempfile
from collections.abc import Mapping
from typing import IO, Any

from jaxmoe.core.config_io import from_json, to_json
from jaxmoe.core.errors import InputError, NoRunError
from jaxmoe.core.output import write_atomic
from jaxmoe.train.experiment import Experiment, unsafe_changes
from jaxmoe.train.run_folder import check_folder
from jaxmoe.train.saved_steps import check_saved

_TRIED_BYTES = 4096


class Workdir:
  """Paths of a run's folder. Nothing is made before `claim`.

  Args:
    path: The folder.
    flag: What named it, for errors.

  Attributes:
    last_alive_unix_s: When the process that held the folder before gave its last sign of life;
      None if there was none, or as long as the folder is not locked.
  """

  def __init__(self, path: str | os.PathLike[str], flag: str = "--workdir"):
    self.path = pathlib.Path(path)
    self._named = f"{flag}={self.path}"
    self.config = self.path / "config.json"
    self.metrics = self.path / "metrics.jsonl"
    self.events = self.path / "events.jsonl"
    self.checkpoints = self.path / "checkpoints"
    self.tokenizer = self.path / "tokenizer.json"
    self.samples = self.path / "samples.md"
    self.evaluation = self.path / "eval.json"
    self.stacks = self.path / "stacks.txt"
    self.last_alive_unix_s: float | None = None
    self._lock: IO[bytes] | None = None

  @property
  def needed(self) -> tuple[pathlib.Path, ...]:
    """The files and folders of a run that no other output may take the place of."""
    names = ("lock", "pretrained")
    files = (self.config, self.metrics, self.events, self.tokenizer, self.samples, self.evaluation)
    return (*files, self.checkpoints, *(self.path / name for name in names))

  def experiment(self) -> Experiment:
    """Returns the recipe of the run.

    Raises:
      NoRunError: there is no run here.
      InputError: config.json is damaged.
    """
    if not os.path.isfile(self.config):
      raise NoRunError(f"{self.path}: no run here (no config.json); train one first")
    try:
      text = self.config.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
      raise InputError(f"{self.config}: cannot be read ({error}); restore the file") from None
    return from_json(Experiment, text, str(self.config))

  def begun(self) -> Any:
    """Returns what config.json holds, None where there is none or it is damaged; see `check`."""
    with contextlib.suppress(OSError, ValueError):
      return json.loads(self.config.read_bytes())
    return None

  def check(self, experiment: Experiment) -> None:
    """Returns if `experiment` may start or go on here; writes nothing.

    Raises:
      InputError: the folder cannot be written, another run holds it, or it holds the run of
        another recipe or something else.
      CheckpointError: the run has saved steps, and none of them is there.
    """
    self._look_up()
    check_folder(self.path, self._named)
    existing = next(p for p in (self.path, *self.path.absolute().parents) if os.path.exists(p))
    try:
      # Permission bits do not tell, for root least of all; a file without a name leaves nothing.
      with tempfile.TemporaryFile(dir=existing) as file:
        if not os.path.exists(self.config):  # a run that goes on outlives a disk that is full
          file.write(bytes(_TRIED_BYTES))  # which takes empty files
          file.flush()
    except OSError as error:
      raise InputError(
        f"{self._named}: cannot write to {existing} ({error.strerror}); choose another folder"
      ) from None
    if os.path.exists(self.path / "lock"):
      self._take_lock()
    check_saved(self.checkpoints, self.events)
    if not os.path.exists(self.config):
      return
    changes = unsafe_changes(self.experiment(), experiment)
    if changes:
      raise InputError(
        f"{self._named} holds a run of another config ({changes_line(changes)}); "
        "use another workdir, or the same config"
      )

  def claim(self, experiment: Experiment) -> None:
    """Makes the folder, locks it until the process ends, and writes config.json if there is none.

    Raises:
      InputError, CheckpointError: as `check`.
    """
    check_folder(self.path, self._named)
    try:
      self.path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
      raise InputError(f"{self._named}: {error.strerror}; choose another folder") from None
    self._take_lock()
    self.check(experiment)
    if not os.path.exists(self.config):
      self.write_config(experiment)

  def write_config(self, experiment: Experiment) -> None:
    """Writes config.json; a run that goes on may have changed what is safe to change.

    Raises:
      InputError: as `replace`.
    """
    self.replace(self.config, to_json(experiment))

  def replace(self, path: pathlib.Path, text: str) -> None:
    """Writes a text file of the folder whole, unless it holds just that already.

    Raises:
      InputError: it cannot be written.
    """
    if path.exists() and path.read_bytes() == text.encode():
      return
    try:
      write_atomic(path, text)
    except OSError as error:
      raise InputError(
        f"{self._named}: cannot write {path.name} ({error.strerror}); make room there, or "
        "choose another folder"
      ) from None

  def touch(self) -> None:
    """Gives a sign of life: the time of the lock, if the disk lets us."""
    with contextlib.suppress(OSError):
      os.utime(self.path / "lock")

  def _look_up(self) -> None:
    """Raises InputError if the path itself cannot be looked up: as a name too long."""
    try:
      self.path.stat()
    except (FileNotFoundError, NotADirectoryError):
      return
    except OSError as error:
      raise InputError(f"{self._named}: {error.strerror}; choose another folder") from None

  def release(self) -> None:
    """Frees the lock, for a process that lives on; the end of a process does it by itself."""
    if self._lock is not None:
      self._lock.close()
    self._lock = None

  def _take_lock(self) -> None:
    """Takes the lock of the folder; the system frees it when the process dies, however it does."""
    if self._lock is not None:
      return
    path = self.path / "lock"
    before = path.stat().st_mtime if os.path.exists(path) else None
    try:
      file = open(path, "ab")  # noqa: SIM115 - held until the process ends
    except OSError as error:
      raise InputError(
        f"{self._named}: cannot open its lock ({error.strerror}); choose another folder"
      ) from None
    try:
      fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
      file.close()
      raise InputError(
        f"{self._named} is in use by another run; wait for it, or use another workdir"
      ) from None
    self._lock, self.last_alive_unix_s = file, before


def changes_line(changes: Mapping[str, tuple[Any, Any]]) -> str:
  """Returns the differences of two recipes on one line."""
  return "; ".join(f"{path}: {old!r} -> {new!r}" for path, (old, new) in changes.items())

