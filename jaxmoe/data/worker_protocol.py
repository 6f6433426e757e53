"""The wire format between a data worker and its parent: JSON and raw bytes, no pickle.

To the worker go lines of JSON: first the job, then one command {generation, state} for every state
it shall go on from. From the worker come frames, each a JSON header and any number of byte parts:

  alive {reading: [domain, document], failures: [[domain, document, why]]}   about once a second
  ready {fingerprint}                                                    when the corpus is open
  batch {generation, counts, busy_s, shape}; the state after it, then its arrays, little endian
  error {message}                                                        an InputError; the last
"""

from __future__ import annotations

import json
import struct
from typing import Any, BinaryIO

import numpy as np

from jaxmoe.data.batches import NAMES, ProducedBatch

Frame = tuple[dict[str, Any], list[bytearray]]
_LENGTH = struct.Struct("<I")


def write_frame(pipe: BinaryIO, header: dict[str, Any], *parts: bytes) -> None:
  """Writes one frame; blocks while the pipe is full."""
  head = json.dumps({**header, "parts": [len(part) for part in parts]}).encode()
  pipe.write(b"".join([_LENGTH.pack(len(head)), head, *parts]))
  pipe.flush()


def read_frame(pipe: BinaryIO) -> Frame | None:
  """Returns (header, parts), or None when the other end was closed."""
  length = _read(pipe, _LENGTH.size)
  head = None if length is None else _read(pipe, _LENGTH.unpack(length)[0])
  if head is None:
    return None
  header, parts = json.loads(head), []
  for size in header["parts"]:
    part = _read(pipe, size)
    if part is None:
      return None
    parts.append(part)
  return header, parts


def batch_frame(
  generation: int, made: ProducedBatch, state: Any
) -> tuple[dict[str, Any], list[bytes]]:
  """Returns the header and parts of a batch."""
  batch, counts, busy_s = made
  header = {
    "kind": "batch",
    "generation": generation,
    "counts": counts.tolist(),
    "busy_s": busy_s,
    "shape": batch["ids"].shape,
  }
  arrays = [np.ascontiguousarray(batch[name], "<i4").tobytes() for name in NAMES]
  return header, [json.dumps(state).encode(), *arrays]


def read_batch(frame: Frame) -> tuple[ProducedBatch, str]:
  """Returns what the producer made, and its state as JSON text."""
  header, (state, *arrays) = frame
  batch = {
    name: np.frombuffer(array, "<i4").astype(np.int32, copy=False).reshape(header["shape"])
    for name, array in zip(NAMES, arrays, strict=True)
  }
  counts = np.array(header["counts"], np.int64)
  return (batch, counts, header["busy_s"]), state.decode()


def _read(pipe: BinaryIO, size: int) -> bytearray | None:
  """Returns exactly `size` bytes, or None when there are fewer."""
  data = bytearray(size)
  view, at = memoryview(data), 0
  while at < size:
    got = pipe.readinto(view[at:])  # type: ignore[attr-defined]
    if not got:
      return None
    at += got
  return data
