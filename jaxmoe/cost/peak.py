"""The matmul peak of a device, measured, so that MFU means something on any machine."""

from __future__ import annotations

import time

import jax
import jax.numpy as jnp

_LONG_ENOUGH_S = 0.01


def matmul_peak(dtype: str, max_size: int = 8192, trials: int = 5) -> float:
  """Returns the best FLOP/s of a square matmul in `dtype` on the default device.

  The size doubles from 512 until one product takes 10 ms; the best of `trials` counts.
  """
  product = jax.jit(lambda a, b: jnp.dot(a, b, preferred_element_type=jnp.float32))
  size = 512
  while True:
    a = jnp.ones((size, size), dtype)
    product(a, a).block_until_ready()
    seconds = min(_time(product, a) for _ in range(trials))
    if seconds >= _LONG_ENOUGH_S or size >= max_size:
      return 2 * size**3 / seconds
    size *= 2


def _time(product: object, a: jax.Array) -> float:
  start = time.perf_counter()
  product(a, a).block_until_ready()  # type: ignore[operator]
  return time.perf_counter() - start
