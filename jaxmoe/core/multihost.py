"""Multi-host runs (multi-controller JAX): how what one process knows reaches all.

All processes of a run do the same things in the same order, or their collectives would not match.
What only one of them can know (a file it cannot read, a signal it got, a disk that is full) is
therefore exchanged before anything follows from it. Alone, a process exchanges nothing. Everything
here is called by all processes alike, from the main thread of each.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jaxmoe.core.errors import CheckpointError, InputError, PeerError, UserFacingError

_ROW_BYTES = 1024
"""What one process says at a time; one size, so that one program is compiled."""

# What gloo, NCCL and the coordinator say when a process is not there any more. JAX raises it as
# a RuntimeError or, where an array is fetched, as a ValueError.
_LOST = re.compile(
  r"gloo|nccl|connection (closed|reset|refused)|socket closed|coordination ?service|heartbeat"
  r"|broken pipe|^(UNAVAILABLE|ABORTED|DEADLINE_EXCEEDED)",
  re.IGNORECASE,
)


def is_multi_process() -> bool:
  """Whether the run has more than one process. Starts no backend of a process that is alone."""
  return jax.distributed.is_initialized() and jax.process_count() > 1


def is_main_process() -> bool:
  """Whether this is process 0, which writes the files, or the only one."""
  return not is_multi_process() or jax.process_index() == 0


def all_gather_text(text: str) -> list[str]:
  """Returns what each process says, in order."""
  if not is_multi_process():
    return [text]
  payload = text.encode(errors="surrogateescape")
  payload = len(payload).to_bytes(4, "little") + payload
  heard = _rows(payload)
  longest = max(int.from_bytes(row[:4], "little") for row in heard) + 4
  for start in range(_ROW_BYTES, longest, _ROW_BYTES):
    heard = [row + more for row, more in zip(heard, _rows(payload[start:]))]
  sizes = [int.from_bytes(row[:4], "little") for row in heard]
  return [row[4 : 4 + n].decode(errors="surrogateescape") for row, n in zip(heard, sizes)]


def broadcast(value: str) -> str:
  """Returns what process 0 says."""
  return all_gather_text(value)[0]


def sum_over_processes(values: np.ndarray) -> np.ndarray:
  """Returns the sum of what each process has, integers of one shape; it wraps around."""
  if not is_multi_process():
    return values
  return np.sum(multihost_utils.process_allgather(values), axis=0, dtype=values.dtype)


def first_error(trouble: str) -> str:
  """Returns the trouble of the first process that has some, and whose it is; '' if none has."""
  if not is_multi_process():
    return trouble
  texts = all_gather_text(trouble)
  index = next((i for i, text in enumerate(texts) if text), None)
  return "" if index is None else texts[index] + _whose(index)


@contextlib.contextmanager
def raise_on_all() -> Iterator[None]:
  """Raises on all processes what one of them raised inside: an error that ends with one line.

  Inside, no process may wait for another. Any other exception is left to the one that raised it.
  """
  if not is_multi_process():
    yield
    return
  mine: Exception | None = None
  try:
    yield
  except UserFacingError as error:
    mine = error
  texts = all_gather_text(f"{type(mine).__name__}\n{mine}" if mine else "")
  index = next((i for i, text in enumerate(texts) if text), None)
  if index is None:
    return
  name, _, text = texts[index].partition("\n")
  raise _kind(name)(text + _whose(index)) from mine


def assert_equal(what: str, value: str) -> None:
  """Returns if all processes have the same value.

  Raises:
    InputError: they have not; `what` says of what.
  """
  texts = all_gather_text(value)
  index = next((i for i, text in enumerate(texts) if text != texts[0]), None)
  if index is not None:
    raise InputError(
      f"{what} of process {index} is another than that of process 0 ({texts[index][:40]!r}, "
      f"{texts[0][:40]!r}); give all processes the same files, best by one shared folder"
    )


def put_on_mesh(tree: Any, shardings: Any) -> Any:
  """Returns values that every process has whole, as arrays of all processes in these shardings.

  `jax.device_put` would compare them over all processes first, with a program for every shape.
  """
  if not is_multi_process():
    return jax.device_put(tree, shardings)

  def one(leaf: Any, sharding: Any) -> jax.Array:
    whole = np.asarray(leaf)
    return jax.make_array_from_callback(whole.shape, sharding, lambda part: whole[part])

  return jax.tree.map(one, tree, shardings)


def peer_error(error: BaseException) -> PeerError | None:
  """Returns the error that says that another process died, if that is what `error` is about."""
  if isinstance(error, PeerError):
    return error
  if not is_multi_process() or not isinstance(error, RuntimeError | ValueError) or not _LOST.search(
    f"{error} {error.__cause__ or ''}"
  ):
    return None
  return PeerError(
    f"another process of this run died ({_short(error)}); the same command goes on from the last "
    "checkpoint"
  )


class AnyProcess:
  """Whether any process is asked to, found out without waiting: alike on all, a call later.

  Each call starts a sum over all devices, and returns that of the call before. Alone, a process
  answers at once.
  """

  def __init__(self, asked: Callable[[], bool]):
    self._asked = asked
    self._sum: Any = None
    self._before: jax.Array | None = None

  def __call__(self) -> bool:
    """Returns whether any process was asked to when all of them called last."""
    if not is_multi_process():
      return self._asked()
    if self._sum is None:
      mesh = Mesh(np.array(jax.devices()), ("all",), axis_types=(AxisType.Auto,))
      self._split = NamedSharding(mesh, PartitionSpec("all"))
      whole = NamedSharding(mesh, PartitionSpec())
      self._sum = jax.jit(lambda flags: flags.sum(), out_shardings=whole)
    flags = np.full(jax.local_device_count(), self._asked(), np.int32)
    before = self._before
    self._before = self._sum(jax.make_array_from_process_local_data(self._split, flags))
    return before is not None and int(np.asarray(before.addressable_data(0))) > 0


def _rows(payload: bytes) -> list[bytes]:
  """Returns the next `_ROW_BYTES` of what each process says."""
  row = np.zeros(_ROW_BYTES, np.uint8)
  row[: len(payload)] = np.frombuffer(payload[:_ROW_BYTES], np.uint8)
  return [bytes(row) for row in multihost_utils.process_allgather(row)]


def _kind(name: str) -> type[Exception]:
  """Returns the class of an error by its name."""
  kinds: list[type[Exception]] = [UserFacingError]
  for kind in kinds:
    kinds.extend(kind.__subclasses__())
  return next((kind for kind in kinds if kind.__name__ == name), CheckpointError)


def _whose(index: int) -> str:
  return f" (process {index})" if index else ""


def _short(error: BaseException) -> str:
  text = " ".join(str(error).split())
  return text if len(text) <= 120 else text[:117] + "..."
