import jax
import jax.numpy as jnp
import numpy as np

from jaxmoe.ops.norm import layer_norm, rms_norm


def test_norm_equals_the_float64_formula():
  rng = np.random.default_rng(0)
  x, scale = rng.normal(size=(2, 3, 16)) * 5, rng.normal(size=16)
  expected = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * scale
  for dtype, tolerance in ((jnp.float32, 1e-6), (jnp.bfloat16, 2e-2)):
    out = jax.jit(rms_norm)(jnp.asarray(x, dtype), jnp.asarray(scale, jnp.float32), 1e-6)
    assert out.dtype == dtype
    np.testing.assert_allclose(np.asarray(out, np.float64), expected, tolerance, tolerance)


def test_bfloat16_is_rounded_once_at_the_end():
  rng = np.random.default_rng(2)
  x, scale = (jnp.asarray(rng.normal(size=shape), jnp.bfloat16) for shape in ((64, 96), (96,)))
  wide, wide_scale = np.asarray(x, np.float64), np.asarray(scale, np.float64)
  expected = wide / np.sqrt((wide**2).mean(-1, keepdims=True)) * wide_scale
  # One rounding to 8 bits is off by at most 2^-8; three of them by more in some of 6,144 numbers.
  out = np.asarray(rms_norm(x, scale, 0.0), np.float64)
  np.testing.assert_allclose(out, expected, rtol=2**-8 + 1e-5)


def test_norm_ignores_the_scale_of_its_input_and_zero_stays_zero():
  x = jnp.asarray(np.random.default_rng(1).normal(size=(4, 8)), jnp.float32)
  ones = jnp.ones(8)
  np.testing.assert_allclose(rms_norm(x * 1024, ones, 0.0), rms_norm(x, ones, 0.0), rtol=1e-6)
  np.testing.assert_array_equal(rms_norm(jnp.zeros((2, 8)), ones, 1e-6), 0.0)


def test_layer_norm_equals_the_float64_formula():
  rng = np.random.default_rng(3)
  x, scale, bias = rng.normal(2, 5, (2, 3, 16)), rng.normal(size=16), rng.normal(size=16)
  centred = x - x.mean(-1, keepdims=True)
  expected = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-2) * scale + bias
  for dtype, tolerance in ((jnp.float32, 2e-6), (jnp.bfloat16, 4e-2)):
    out = jax.jit(layer_norm)(jnp.asarray(x, dtype), jnp.float32(scale), jnp.float32(bias), 1e-2)
    assert out.dtype == dtype
    np.testing.assert_allclose(np.asarray(out, np.float64), expected, tolerance, tolerance)
