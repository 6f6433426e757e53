"""TensorBoard: event files in WORKDIR/tensorboard, through tensorboardX.

    tensorboard --logdir=WORKDIR/tensorboard

Points are written here and not by tensorboardX's own thread, whose errors nobody would see.
"""

from __future__ import annotations

import os
import pathlib
import socket
import time
from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxmoe.core.errors import InputError
from jaxmoe.train.sinks import flatten

FLUSH_S = 5.0


class TensorBoard:
  """Writes one event a step: a scalar for every number, a histogram for every longer list."""

  name = "tensorboard"

  def __init__(self, workdir: pathlib.Path, env: Mapping[str, str]):
    del env
    self._folder = workdir / "tensorboard"
    self._event, self._summary, self._record_writer = _import()
    self._writer: Any = None
    self._flushed = 0.0

  def resume(self, step: int) -> None:
    """Opens a new file that takes back the points after `step`."""
    self.close()
    self._folder.mkdir(parents=True, exist_ok=True)
    now = time.time_ns()
    # Files are read in the order of their names; two may start in one second.
    name = f"events.out.tfevents.{now // 10**9:010d}.{socket.gethostname()}.{os.getpid()}.{now}"
    self._writer = self._record_writer(str(self._folder / name))
    self._put(file_version="brain.Event:2", wall_time=now / 1e9)
    start = self._event.SessionLog(status=self._event.SessionLog.START)
    self._put(session_log=start, step=step + 1, wall_time=now / 1e9)

  def write(self, line: dict[str, Any]) -> None:
    """Writes the numbers of a line at its step."""
    scalars, lists = flatten(line)
    value = self._summary.Summary.Value
    values = [value(tag=tag, simple_value=number) for tag, number in scalars.items()]
    values += [value(tag=tag, histo=self._histogram(numbers)) for tag, numbers in lists.items()]
    wall_time = line.get("time", {}).get("unix_s", time.time())
    summary = self._summary.Summary(value=values)
    self._put(summary=summary, step=line["step"], wall_time=wall_time)
    if time.monotonic() - self._flushed > FLUSH_S:
      self._writer.flush()
      self._flushed = time.monotonic()

  def close(self) -> None:
    """Returns once all points are on the disk."""
    if self._writer is not None:
      self._writer.flush()
      self._writer.close()
    self._writer = None

  def _put(self, **fields: Any) -> None:
    self._writer.write(self._event.Event(**fields).SerializeToString())

  def _histogram(self, numbers: list[float]) -> Any:
    counts, edges = np.histogram(numbers, bins=30)
    return self._summary.HistogramProto(
      min=min(numbers, default=0),
      max=max(numbers, default=0),
      num=len(numbers),
      sum=sum(numbers),
      sum_squares=sum(number**2 for number in numbers),
      bucket_limit=edges[1:].tolist(),
      bucket=counts.tolist(),
    )


def _import() -> tuple[Any, Any, Any]:
  """Returns tensorboardX's messages for events and summaries, and its writer of records."""
  try:
    from tensorboardX.proto import event_pb2, summary_pb2
    from tensorboardX.record_writer import RecordWriter
  except ImportError as error:
    raise InputError(
      f"--sinks=tensorboard needs tensorboardX ({error}); pip install 'jaxmoe[tb]'"
    ) from None
  return event_pb2, summary_pb2, RecordWriter
