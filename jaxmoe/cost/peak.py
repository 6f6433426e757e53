"""The matmul peak and the memory rate of a device, measured, so that MFU means something.

Nobody knows when a machine is quiet: half of its peak is what a busy one shows for a while. So the
best rate ever seen is kept, for each kind of machine and program that could have another one.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import pathlib
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxmoe.core.output import write_atomic
from jaxmoe.cost import host

_LONG_ENOUGH_S = 0.01
_SIZES = (512, 1024, 2048, 4096, 8192)
_FIRST_S, _AGAIN_S = 0.5, 0.1


def best_peak(dtype: str, folder: pathlib.Path | None = None) -> float:
  """Returns the best FLOP/s ever seen of a square matmul in `dtype` on the default device.

  Args:
    dtype: Of the factors; products are summed in float32.
    folder: Where the best is kept for all runs of this machine; None to measure alone. One that
      cannot be written keeps none.
  """
  return _best(lambda spend_s, size: matmul_peak(dtype, spend_s, size), _key(dtype), folder)


def kept_peak(dtype: str, folder: pathlib.Path | None = None) -> float:
  """Returns what `best_peak` has kept; where that is nothing, it is measured now."""
  path, key = _place(_key(dtype), folder), _key(dtype)
  return (_kept(path, key)[0] if path else 0.0) or best_peak(dtype, folder)


def best_memory_rate(folder: pathlib.Path | None = None) -> float:
  """Returns the best bytes per second ever seen of copying, read and written; `folder` as above."""
  key = {**_key("float32"), "what": "memory"}
  return _best(lambda spend_s, size: (memory_rate(spend_s), size), key, folder)


def matmul_peak(dtype: str, spend_s: float, size: int = 0) -> tuple[float, int]:
  """Returns the best FLOP/s of a square matmul in `dtype` on the default device, and its size.

  Sizes double from 512 until one product takes 10 ms; they take turns for about `spend_s`. Of one
  `size` alone a second process compiles nothing that the first one has not.
  """

  @jax.jit
  def product(a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.dot(a, b, preferred_element_type=jnp.float32)

  runs: dict[int, Callable[[], float]] = {}
  best, start = (0.0, 0), time.perf_counter()
  for tried in (size,) if size else _SIZES:
    runs[tried] = _timed(product, jax.device_put(np.ones((tried, tried), jnp.dtype(dtype))))
    seconds = runs[tried]()
    best = max(best, (2 * tried**3 / seconds, tried))
    if seconds >= _LONG_ENOUGH_S:
      break
  while time.perf_counter() - start < spend_s:
    best = max(best, *((2 * tried**3 / run(), tried) for tried, run in runs.items()))
  return best


def memory_rate(spend_s: float, size: int = 2**26) -> float:
  """Returns the best bytes per second of reading numbers and writing each of them plus 1."""
  run = _timed(jax.jit(lambda a, _: a + 1), jnp.ones(size // 4, jnp.float32))
  best, start = 0.0, time.perf_counter()
  while not best or time.perf_counter() - start < spend_s:
    best = max(best, 2 * size / run())
  return best


def peaks_of_machines(places: Sequence[str]) -> float:
  """Returns how many times the peak of the first place the cores of all places have.

  Args:
    places: `host.place()` of each process; those of one machine share the cores that they share.
  """
  cores: dict[str, set[str]] = {}
  for place in places:
    machine, _, own = place.partition(" ")
    cores.setdefault(machine, set()).update(own.split(","))
  first = places[0].partition(" ")[2].split(",")
  return sum(map(len, cores.values())) / len(first)


def _key(dtype: str) -> dict[str, Any]:
  """Returns all that a peak may depend on. Virtual devices are the processor they are made of."""
  kind = jax.devices()[0].device_kind
  machine = {"device": kind, "processor": host.processor(), "cores": host.cores()}
  return {**machine, "dtype": dtype, "jax": jax.__version__}


def _best(
  measure: Callable[[float, int], tuple[float, int]],
  key: dict[str, Any],
  folder: pathlib.Path | None,
) -> float:
  """Returns the best rate ever seen under a key, and keeps it in a folder."""
  path = _place(key, folder)
  if path is None:
    return measure(_FIRST_S, 0)[0]
  before, size = _kept(path, key)
  seen, size = measure(_AGAIN_S if before else _FIRST_S, size)
  kept, _ = _kept(path, key)  # now, for another process may have measured meanwhile
  if seen > kept:
    _keep(path, {**key, "size": size, "flops_per_s": seen})
  return max(seen, kept)


def _place(key: dict[str, Any], folder: pathlib.Path | None) -> pathlib.Path | None:
  name = f"{hashlib.sha256(json.dumps(key).encode()).hexdigest()[:16]}.json"
  return folder / name if folder else None


def _kept(path: pathlib.Path, key: dict[str, Any]) -> tuple[float, int]:
  """Returns the best that is kept under a key, and its size; 0 where none can be read."""
  try:
    found = json.loads(path.read_text(encoding="utf-8"))
    best, size = float(found.pop("flops_per_s")), int(found.pop("size", 0))
  except (OSError, ValueError, TypeError, KeyError, AttributeError):
    return 0.0, 0
  good = found == key and 0 < best < float("inf") and size in (0, *_SIZES)
  return (best, size) if good else (0.0, 0)


def _keep(path: pathlib.Path, record: dict[str, Any]) -> None:
  """Writes a record whole, or not at all."""
  with contextlib.suppress(OSError):
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, json.dumps(record) + "\n")


def _timed(product: Any, a: jax.Array) -> Callable[[], float]:
  """Returns what computes a product and returns its seconds; it was compiled before."""
  product(a, a).block_until_ready()

  def run() -> float:
    start = time.perf_counter()
    product(a, a).block_until_ready()
    return time.perf_counter() - start

  return run
