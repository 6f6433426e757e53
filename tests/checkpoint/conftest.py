"""A small state with every dtype, and what stores are asked for it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmoe.checkpoint.orbax_store import quiet_orbax

quiet_orbax()

DTYPES = ["bool", "int4", "int8", "uint8", "int16", "uint16", "int32", "uint32"]
DTYPES += ["float16", "bfloat16", "float32", "complex64", "float8_e4m3fn", "float8_e5m2"]


@pytest.fixture
def record():
  return {"step": 7, "data": {"state": [1, 2, {"at": 0.1}]}, "config": "text", "none": None}


@pytest.fixture
def state():
  """Arrays of all dtypes with random bits, a scalar, an empty one, names that are prefixes."""
  rng = np.random.default_rng(0)
  arrays = {}
  for dtype in DTYPES:
    raw = np.frombuffer(rng.bytes(24 * jnp.dtype(dtype).itemsize), np.uint8)
    raw = raw & {"bool": 1, "int4": 15}.get(dtype, 255)
    arrays[f"params/{dtype}"] = jnp.asarray(raw.view(jnp.dtype(dtype)).reshape(8, 3))
  arrays["params/layers/7/moe/experts/up"] = jax.random.normal(jax.random.key(0), (32, 64))
  arrays["params/layers"] = jnp.float32(3.5)
  arrays["optimizer/0/mu/empty"] = jnp.zeros((0, 4))
  arrays["optimizer/0/count"] = jnp.int32(9)
  return arrays


@pytest.fixture
def like_of():
  """What to ask a store for, to get such arrays on the first device."""

  def like(arrays):
    one = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return {k: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=one) for k, x in arrays.items()}

  return like


@pytest.fixture
def same():
  """Whether two dicts hold the same arrays in every bit."""

  def same_bits(a, b):
    return a.keys() == b.keys() and all(
      a[k].dtype == b[k].dtype
      and a[k].shape == b[k].shape
      and np.asarray(a[k]).tobytes() == np.asarray(b[k]).tobytes()
      for k in a
    )

  return same_bits
