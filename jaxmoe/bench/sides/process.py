"""The process of a side: begun, asked and ended.

While one side works the others wait for their next line, so that a race between processes is as
fair as one within a process, and none sees the threads or the memory of another.
"""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
import re
import subprocess
import tempfile
from collections.abc import Mapping
from types import TracebackType
from typing import Any

import jaxmoe
from jaxmoe.bench.race import Seconds

ROOT = pathlib.Path(jaxmoe.__file__).parents[1]
_ERROR = re.compile(r"[\w.]*(Error|Exception|Interrupt): ")


class SideError(RuntimeError):
  """A side ended, or could not do what it was asked; the message is its error, or its last line."""


@dataclasses.dataclass(frozen=True)
class Rival:
  """A side that need not be installed.

  Attributes:
    module: What is run.
    install: How it gets there.
    env: Of its process. Threads of OpenMP that wait for work in a loop would count as work.
  """

  module: str
  install: str = "pip install -e '.[rivals]'"
  env: tuple[tuple[str, str], ...] = (("OMP_WAIT_POLICY", "PASSIVE"),)


OWN = "jaxmoe.commands.bench_side"
RIVALS = {
  "torch": Rival("jaxmoe.bench.sides.torch"),
  "llama_cpp": Rival("jaxmoe.bench.sides.llama_cpp"),
  "tokamax": Rival("jaxmoe.bench.sides.tokamax", "pip install -e '.[kernels]'"),
}


class Side:
  """A process that answers; leaving its context ends it."""

  def __init__(self, module: str, python: str, env: Mapping[str, str]):
    self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115 - until the side ends
    path = os.pathsep.join(filter(None, [str(ROOT), env.get("PYTHONPATH")]))
    self._process = subprocess.Popen(
      [python, "-m", module],
      stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log, text=True, bufsize=1,
      env={**env, "PYTHONPATH": path},
    )  # fmt: skip
    self.missing: list[str] = self._answer()["missing"]

  def __enter__(self) -> Side:
    """Returns the side."""
    return self

  def __exit__(
    self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
  ) -> None:
    """Ends the process."""
    self._process.kill()
    self._process.communicate()
    self._log.close()

  def ask(self, do: str, **fields: Any) -> Any:
    """Returns the answer to a request.

    Raises:
      SideError: the process ended instead.
    """
    assert self._process.stdin is not None
    try:
      self._process.stdin.write(json.dumps({"do": do, **fields}) + "\n")
    except OSError:
      raise SideError(self._last_line()) from None
    return self._answer()

  def seconds(self, do: str, **fields: Any) -> Seconds:
    """Returns how long a request took, as the side itself measured it."""
    return Seconds(*self.ask(do, **fields))

  def _answer(self) -> Any:
    assert self._process.stdout is not None
    line = self._process.stdout.readline()
    if not line:
      raise SideError(self._last_line())
    return json.loads(line)

  def _last_line(self) -> str:
    self._process.wait()
    self._log.seek(0)
    lines = [line.strip() for line in self._log.read().splitlines() if line.strip()]
    errors = [line for line in lines if _ERROR.match(line)]  # a library may have the last word
    return (errors or lines or [f"it ended with {self._process.returncode}"])[-1]
