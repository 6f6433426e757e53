"""Requests to a side and its answers: a JSON object a line, over its standard input and output.

It needs the standard library alone: a side may run where jaxmoe's own requirements are not.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

Handlers = Mapping[str, Callable[..., Any]]


def serve(needs: tuple[str, ...], make: Callable[[], Handlers]) -> None:
  """Answers requests until there are no more.

  Args:
    needs: Packages; the first answer names those that are missing, and then nothing is made.
    make: Returns what answers each kind of request, of the request's other fields.
  """
  # What libraries print must not stand between answers.
  answers = os.fdopen(os.dup(1), "w", buffering=1)
  os.dup2(2, 1)
  missing = [name for name in needs if not _is_there(name)]
  answers.write(json.dumps({"missing": missing}) + "\n")
  if missing:
    return
  handlers = make()
  for line in sys.stdin:
    request = json.loads(line)
    answers.write(json.dumps(handlers[request.pop("do")](**request)) + "\n")


def clocked(run: Callable[[], Any]) -> list[float]:
  """Returns seconds of the clock and of the processor that a call takes; it must wait for all."""
  wall, cpu = time.perf_counter(), time.process_time()
  run()
  return [time.perf_counter() - wall, time.process_time() - cpu]


def _is_there(name: str) -> bool:
  try:
    __import__(name)
  except ImportError:
    return False
  return True
