"""Digests of arrays: two 32-bit words that do not depend on how an array is laid out.

The digest of an array is, modulo 2**32, the sum over its elements of a hash of (global linear
index, bits of the element), plus a constant made from its dtype and shape. Sums of integers do
not care who adds first, so every sharding, device count and process count gives the same words,
and a sharded array costs one all-reduce of eight bytes, never a gather.

The hash of one element is, for a fixed index, a bijection of its bits onto the two words. So a
change confined to one element, a single flipped bit above all, always changes the digest; any
other change goes unnoticed with a chance of about 2**-64. It protects against accidents, not
against an adversary.
"""

import functools
import hashlib
import math
from collections.abc import Callable, Iterator, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec, Sharding

from jaxmoe.checkpoint.process_parts import is_first_holder, on_all_processes
from jaxmoe.core import multihost
from jaxmoe.core.errors import InputError

_BITS_BY_BYTES = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}


def digest(arrays: Mapping[str, jax.Array]) -> dict[str, tuple[int, int]]:
  """Returns the digest words of every array, on the host; blocks until they are computed."""
  return fetch_words(launch_digest(arrays))


def launch_digest(arrays: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
  """Starts the digests and returns their words, uint32 (2,), still on the devices.

  Does not block, but on several devices of a CPU. The arrays may be donated to a later computation
  right afterwards: the runtime orders it behind this one. One small program is compiled for each
  shape, dtype and sharding.
  Cost: one read of each array, about ten integer multiply-and-shift steps an element.
  """
  words = {}
  # Sorted, so that all processes enter the same collectives in the same order.
  for name in sorted(arrays):
    x = arrays[name]
    words[name] = _digest_under(x.sharding)(x)
    if x.sharding.num_devices > 1 and jax.default_backend() == "cpu":
      # A collective holds a thread of the CPU client for each device until all have come. Of many
      # at once each process would run others, and wait for ever.
      words[name].block_until_ready()
  return words


def fetch_words(words: Mapping[str, jax.Array]) -> dict[str, tuple[int, int]]:
  """Returns what `launch_digest` started as Python integers; blocks.

  Words that only some processes can compute reach all in one exchange.
  """
  apart = sorted(name for name, pair in words.items() if not on_all_processes(pair.sharding))
  pairs = dict(jax.device_get({name: pair for name, pair in words.items() if name not in apart}))
  if apart:
    mine = np.zeros((len(apart), 2), np.uint32)
    for row, name in enumerate(apart):
      if is_first_holder(words[name].sharding):
        mine[row] = np.asarray(words[name].addressable_data(0))
    pairs |= dict(zip(apart, multihost.sum_over_processes(mine), strict=True))
  return {name: (int(pair[0]), int(pair[1])) for name, pair in pairs.items()}


@functools.cache
def _digest_under(sharding: Sharding) -> Callable[[jax.Array], jax.Array]:
  """The jitted digest of arrays in one sharding; its words can be read on every process.

  The sharding is given, not inferred, or each kind of array would be compiled once more when it
  comes from a file, since it is then committed to its device.
  """
  replicated = lie = None
  if isinstance(sharding, NamedSharding):
    whole = NamedSharding(sharding.mesh, PartitionSpec())
    replicated = whole if sharding.num_devices > 1 else None
    lie = None if on_all_processes(sharding) else whole
  words = functools.partial(_words, replicated=replicated)
  return jax.jit(words, in_shardings=sharding, out_shardings=lie)


def _words(x: jax.Array, replicated: NamedSharding | None) -> jax.Array:
  """The two words of one array: sum of element hashes plus the constant of dtype and shape."""
  low, high = _bits(x)
  index_low, index_high = _linear_index(x.shape)
  hash_0, hash_1 = _hash_element(index_low, index_high, low, high)
  if replicated is None:
    # One reduce for both sums: of two, each would hash anew on CPU.
    zero = np.uint32(0)
    sums = lax.reduce((hash_0, hash_1), (zero, zero), _add_pairs, tuple(range(x.ndim)))
  else:
    # Of a reduce with two results XLA would gather the parts; of two it all-reduces them.
    sums = [jnp.sum(hash_0, dtype=jnp.uint32), jnp.sum(hash_1, dtype=jnp.uint32)]
  words_2 = jnp.stack(sums) + jnp.asarray(identity_words(x.shape, x.dtype))
  return words_2 if replicated is None else lax.with_sharding_constraint(words_2, replicated)


def _add_pairs(
  a: tuple[jax.Array, jax.Array], b: tuple[jax.Array, jax.Array]
) -> tuple[jax.Array, jax.Array]:
  return a[0] + b[0], a[1] + b[1]


def identity_words(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
  """Returns the constant of a shape and dtype: it tells apart what the elements cannot."""
  text = f"{np.dtype(dtype).name}[{','.join(map(str, shape))}]"
  return np.frombuffer(hashlib.sha256(text.encode()).digest()[:8], "<u4").astype(np.uint32)


def _bits(x: jax.Array) -> tuple[jax.Array, jax.Array | None]:
  """The bits of each element as a low and, for elements of 64 bits, a high uint32 word."""
  dtype = x.dtype
  if dtype == jnp.bool_:
    return x.astype(jnp.uint32), None
  if dtype == jnp.complex64:
    real, imag = lax.real(x), lax.imag(x)
    return lax.bitcast_convert_type(real, jnp.uint32), lax.bitcast_convert_type(imag, jnp.uint32)
  if jax.dtypes.issubdtype(dtype, jax.dtypes.extended) or dtype == jnp.complex128:
    raise InputError(
      f"a digest needs elements of plain bits, got {dtype}; store jax.random.key_data(key) of a"
      " key, and the real and imaginary part of a complex128 array"
    )
  num_bits = jnp.finfo(dtype).bits if jnp.issubdtype(dtype, jnp.floating) else jnp.iinfo(dtype).bits
  if num_bits < 8:
    same_width = {2: jnp.uint2, 4: jnp.uint4}[num_bits]
    return lax.bitcast_convert_type(x, same_width).astype(jnp.uint32), None
  if num_bits == 64:
    pairs = lax.bitcast_convert_type(x, jnp.uint32)
    return pairs[..., 0], pairs[..., 1]
  return lax.bitcast_convert_type(x, _BITS_BY_BYTES[num_bits // 8]).astype(jnp.uint32), None


def _linear_index(shape: tuple[int, ...]) -> tuple[jax.Array, jax.Array | None]:
  """The row-major index of every element as a low and, if any needs it, a high uint32 word."""
  low = jnp.zeros(shape, jnp.uint32)
  if math.prod(shape) <= 2**32:
    for place, stride in _places(shape):
      low += place * np.uint32(stride)
    return low, None
  high = jnp.zeros(shape, jnp.uint32)
  for place, stride in _places(shape):
    product_low, product_high = multiply_wide(place, stride)
    low += product_low
    high += product_high + (low < product_low).astype(jnp.uint32)
  return low, high


def _places(shape: tuple[int, ...]) -> Iterator[tuple[jax.Array, int]]:
  """Each element's place along every dim longer than one, with the dim's row-major stride."""
  for dim, size in enumerate(shape):
    if size > 1:
      yield lax.broadcasted_iota(jnp.uint32, shape, dim), math.prod(shape[dim + 1 :])


def multiply_wide(a: jax.Array, b: int) -> tuple[jax.Array, jax.Array]:
  """Returns the low and high words of uint32 `a` times `b` < 2**64, modulo 2**64.

  By 16-bit halves, since neither XLA nor a jaxlib without 64-bit types has a wide product.
  """
  half = np.uint32(0xFFFF)
  a_0, a_1 = a & half, a >> 16
  b_0, b_1 = np.uint32(b & 0xFFFF), np.uint32(b >> 16 & 0xFFFF)
  middle = a_1 * b_0 + (a_0 * b_0 >> 16)
  carried = (middle & half) + a_0 * b_1
  low = a * np.uint32(b & 0xFFFFFFFF)
  high = a_1 * b_1 + (middle >> 16) + (carried >> 16) + a * np.uint32(b >> 32)
  return low, high


def _hash_element(
  index_low: jax.Array,
  index_high: jax.Array | None,
  low: jax.Array,
  high: jax.Array | None,
) -> tuple[jax.Array, jax.Array]:
  """Two words of each element; for a fixed index a bijection of (low, high).

  The index becomes two keys, again by a bijection, so no two elements share both. A missing high
  word is zero and costs nothing.
  """
  none = jnp.zeros((), jnp.uint32)
  index_high = none if index_high is None else index_high
  key_0 = _mix(index_low ^ _mix(index_high ^ np.uint32(0x9E3779B9)))
  key_1 = _mix(key_0 ^ (index_high * np.uint32(0x85EBCA77) + np.uint32(0x6A09E667)))
  if high is not None:
    low = low ^ _mix(high ^ np.uint32(0xBB67AE85))
  word_0 = _mix(low ^ key_0)
  word_1 = _mix((word_0 ^ key_1) if high is None else (word_0 ^ key_1 ^ high))
  return word_0, word_1


def _mix(x: jax.Array) -> jax.Array:
  """A bijection of 32 bits where every input bit reaches every output bit.

  The constants are C. Wellons' `lowbias32` (bias 0.17 of the best known 2-round hash).
  """
  x = (x ^ (x >> 16)) * np.uint32(0x7FEB352D)
  x = (x ^ (x >> 15)) * np.uint32(0x846CA68B)
  return x ^ (x >> 16)
