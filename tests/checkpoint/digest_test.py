"""Digests against an oracle in Python integers, and the laws they must keep."""

import hashlib
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmoe.checkpoint import digest as digest_module
from jaxmoe.checkpoint.digest import digest, fetch_words, launch_digest, multiply_wide
from jaxmoe.core.errors import InputError

WORD = 2**32
DTYPES = ["bool", "int2", "uint2", "int4", "uint4", "int8", "uint8", "int16", "uint16", "int32"]
DTYPES += ["uint32", "float16", "bfloat16", "float32", "complex64", "float4_e2m1fn"]
DTYPES += ["float8_e4m3fn", "float8_e5m2", "float8_e4m3b11fnuz", "float8_e8m0fnu"]
WIDE_DTYPES = ["int64", "uint64", "float64"]


def bits_of(dtype):
  """How many low bits of an element's bytes mean something."""
  narrow = {"bool": 1, "int2": 2, "uint2": 2, "int4": 4, "uint4": 4, "float4_e2m1fn": 4}
  return narrow.get(jnp.dtype(dtype).name, 8 * jnp.dtype(dtype).itemsize)


def random_array(dtype, shape, seed=0):
  """Every bit pattern, NaN payloads and infinities too."""
  dtype = jnp.dtype(dtype)
  raw = np.random.default_rng(seed).bytes(int(np.prod(shape)) * dtype.itemsize)
  x = np.frombuffer(raw, np.uint8).copy()
  if dtype.itemsize == 1:
    x &= (1 << bits_of(dtype.name)) - 1
  return x.view(dtype).reshape(shape)


def oracle(x):
  def mix(v):
    v = (v ^ v >> 16) * 0x7FEB352D % WORD
    v = (v ^ v >> 15) * 0x846CA68B % WORD
    return v ^ v >> 16

  name = f"{x.dtype.name}[{','.join(str(n) for n in x.shape)}]".encode()
  start = hashlib.sha256(name).digest()
  first, second = int.from_bytes(start[:4], "little"), int.from_bytes(start[4:8], "little")
  for i, element in enumerate(x.reshape(-1)):
    bits = int.from_bytes(element.tobytes(), "little") % 2 ** bits_of(x.dtype.name)
    key = mix(i % WORD ^ mix(i // WORD ^ 0x9E3779B9))
    other_key = mix(key ^ (i // WORD * 0x85EBCA77 + 0x6A09E667) % WORD)
    low, high = bits % WORD, bits // WORD
    if x.dtype.itemsize == 8:
      low ^= mix(high ^ 0xBB67AE85)
    word = mix(low ^ key)
    first, second = (first + word) % WORD, (second + mix(word ^ other_key ^ high)) % WORD
  return first, second


def one(x):
  return digest({"x": jnp.asarray(x)})["x"]


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_dtype_agrees_with_the_oracle(dtype):
  for shape in [(), (7,), (3, 1, 5), (0, 3)]:
    x = random_array(dtype, shape)
    assert one(x) == oracle(x), (dtype, shape)


@pytest.mark.parametrize("dtype", WIDE_DTYPES)
def test_elements_of_64_bits_agree_with_the_oracle(dtype):
  with jax.enable_x64(True):
    for shape in [(), (3, 5), (0,)]:
      x = random_array(dtype, shape)
      assert one(x) == oracle(x), (dtype, shape)


@pytest.mark.parametrize("dtype", DTYPES + WIDE_DTYPES)
def test_each_single_flipped_bit_changes_the_digest(dtype):
  with jax.enable_x64(dtype in WIDE_DTYPES):
    x = random_array(dtype, (3,), seed=1)
    flipped = []
    for element, bit in itertools.product(range(3), range(bits_of(dtype))):
      raw = np.frombuffer(x.tobytes(), np.uint8).copy()
      raw[element * x.dtype.itemsize + bit // 8] ^= 1 << bit % 8
      flipped.append(raw.view(x.dtype))
    words = digest({str(i): jnp.asarray(y) for i, y in enumerate([x, *flipped])})
    assert len(set(words.values())) == len(flipped) + 1


def test_an_element_hash_is_a_bijection_of_the_bits_for_every_index():
  # All patterns of 16 bits at several indices, the mixer of 32 bits by its inverse: word 0 is
  # mix(low ^ key), and given word 0 word 1 is mix(constant ^ high).
  patterns = jnp.arange(2**16, dtype=jnp.uint32)
  for index in (0, 1, 2**31, 2**32 - 1):
    for bits in ((patterns, None), (patterns << 16, None), (jnp.zeros_like(patterns), patterns)):
      words = digest_module._hash_element(jnp.uint32(index), None, *bits)
      pairs = np.asarray(words[0]).astype(np.uint64) << 32 | np.asarray(words[1])
      assert len(np.unique(pairs)) == 2**16
  x = np.random.default_rng(0).integers(0, WORD, 2**18, dtype=np.uint32)
  y = np.asarray(digest_module._mix(jnp.asarray(x))).astype(np.uint64)
  y ^= y >> 16
  y = y * pow(0x846CA68B, -1, WORD) % WORD
  y ^= (y >> 15) ^ (y >> 30)
  y = y * pow(0x7FEB352D, -1, WORD) % WORD
  y ^= y >> 16
  np.testing.assert_array_equal(x, y)


def test_swaps_and_moves_of_elements_change_the_digest():
  x = np.zeros(16, np.float32)
  x[[3, 10]] = 1.0  # many equal elements: only places tell the moves apart
  assert len({one(np.roll(x, n)) for n in range(16)}) == 16
  y = np.arange(12, dtype=np.int32)
  for a, b, c, d in itertools.islice(itertools.permutations(range(12), 4), 0, None, 60):
    z = y.copy()
    z[[a, b, c, d]] = z[[b, a, d, c]]
    assert one(z) != one(y), (a, b, c, d)
  rng = np.random.default_rng(0)
  orders = {tuple(rng.permutation(12)) for _ in range(200)}
  assert len({one(y[list(order)]) for order in orders}) == len(orders)


def test_shape_and_dtype_are_part_of_the_identity():
  x = np.arange(6, dtype=np.int32)
  same_bits = [x, x.reshape(2, 3), x.reshape(3, 2), x.reshape(6, 1), x.view(np.uint32)]
  same_bits += [x.view(np.float32), np.zeros((0, 2), np.int8), np.zeros((2, 0), np.int8)]
  same_bits += [np.zeros((0,), np.uint8), np.zeros((), np.int8), np.zeros((1,), np.int8)]
  assert len({one(y) for y in same_bits}) == len(same_bits)


def test_a_product_of_two_words_is_exact():
  rng = np.random.default_rng(0)
  a = np.concatenate([rng.integers(0, WORD, 50), [0, 1, WORD - 1]]).astype(np.uint32)
  for b in [0, 1, WORD - 1, WORD, 2**63, 2**64 - 1, *map(int, rng.integers(0, 2**63, 20))]:
    low, high = multiply_wide(jnp.asarray(a), b)
    got = [int(h) * WORD + int(w) for w, h in zip(low, high)]
    assert got == [int(v) * b % 2**64 for v in a]


def test_indices_beyond_32_bits_are_linear_and_carried():
  shape = (2**16 + 3, 5, 2**15 - 1)
  places = [(0, 0, 0), (0, 4, 32766), (40000, 4, 1), (2**16 + 2, 4, 32766)]
  places += [(26215, 1, 3), (26215, 1, 4), (26215, 4, 5)]  # 2**32 - 1, 2**32, and beyond

  @jax.jit
  def at_places():
    # XLA computes only what is taken: the whole index would be 40 GiB.
    low, high = digest_module._linear_index(shape)
    return [(high[place], low[place]) for place in places]

  for (high, low), place in zip(at_places(), places):
    assert int(high) * WORD + int(low) == np.ravel_multi_index(place, shape)


def test_an_array_may_be_donated_once_its_digest_is_launched():
  x = jnp.arange(2**20, dtype=jnp.float32)
  expected = one(np.arange(2**20, dtype=np.float32))
  overwrite = jax.jit(lambda x: x * 0 - 1, donate_argnums=0)
  for _ in range(5):
    x = jnp.arange(2**20, dtype=jnp.float32)
    words = launch_digest({"x": x})
    y = overwrite(x)
    assert x.is_deleted()
    assert fetch_words(words)["x"] == expected
    assert float(y[7]) == -1


def test_what_has_no_plain_bits_is_refused():
  with pytest.raises(InputError, match="key_data"):
    digest({"key": jax.random.key(0)})
