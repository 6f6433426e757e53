"""What kernels for accelerators owe where there is none: a lowering, no races, no fault unseen."""

import functools
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from jaxmoe.core.backends import Devices, Need
from jaxmoe.ops import attention, stick_breaking
from jaxmoe.ops.attention import Sight
from jaxmoe.ops.attention.tpu_walk import Tiles
from tests.ops.attention import attention_oracle
from tests.planted_faults_of_kernels import FAULTS

OPERATIONS = {"attention": attention, "stick_breaking": stick_breaking}
KERNELS = [(name, "mosaic_tpu") for name in OPERATIONS]
kernel = pytest.mark.parametrize(("operation", "backend"), KERNELS)
TINY = Tiles(4, 4, interpret=True)


def test_every_kernel_is_here():
  found = {
    (name, backend)
    for name, package in OPERATIONS.items()
    for backend in package.BACKENDS
    if backend.startswith("mosaic")
  }
  assert found == set(KERNELS)


def sizes(**more):
  return {"B": 1, "L": 512, "S": 512, "N": 4, "K": 2, "H": 64, "P": 64, **more}


@kernel
def test_a_kernel_is_for_its_platform_and_no_other(operation, backend):
  fits = OPERATIONS[operation].BACKENDS[backend].fits
  assert fits(Need(Devices("tpu"), sizes=sizes())) is None
  assert "the devices are cpu" in fits(Need(Devices("cpu"), sizes=sizes()))
  assert "at most 256" in fits(Need(Devices("tpu"), sizes=sizes(H=512)))
  wrong = Need(Devices("tpu"), sizes=sizes(), features=frozenset({attention.ANY_MASK}))
  assert "has no masks that are no span" in fits(wrong)


@kernel
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_a_kernel_and_its_gradients_lower_for_its_platform(operation, backend, dtype):
  call = OPERATIONS[operation].BACKENDS[backend]
  array = lambda heads, size: jax.ShapeDtypeStruct((1, 600, heads, size), dtype)  # noqa: E731
  spans = [jax.ShapeDtypeStruct((1, 600), jnp.int32)] * 3

  args = array(4, 64), array(2, 64), array(2, 32), *spans
  both = functools.partial(_both, call)
  text = jax.jit(both).trace(*args).lower(lowering_platforms=("tpu",)).as_text()
  assert text.count("tpu_custom_call") == 3


def _both(call, q, k, v, *spans):
  part, vjp = jax.vjp(lambda *x: call(*x, Sight(*spans, 0.1)), q, k, v)
  return vjp(jax.tree.map(jnp.ones_like, part))


def inputs():
  """Returns arrays of two rows of 11, of documents that end inside blocks."""
  rng = np.random.default_rng(0)
  arrays = [rng.normal(size=(2, 11, heads, 8)) for heads in (4, 2, 2)]
  slot = np.broadcast_to(np.arange(11), (2, 11))
  first = np.stack([np.array([0] * 3 + [3] * 7 + [10]), np.zeros(11, int)])
  return arrays, Sight(*(jnp.asarray(x, jnp.int32) for x in (first, slot, slot)), 0.3)


def found(operation, tiles):
  """Returns what a kernel finds and all gradients, and what `reference` does."""
  arrays, sight = inputs()
  arrays = [jnp.asarray(x, jnp.float32) for x in arrays]
  rng = np.random.default_rng(1)
  shapes = (2, 11, 4, 8), (2, 11, 4)
  cotangents = [jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes]
  package = OPERATIONS[operation]
  calls = functools.partial(package.mosaic_tpu, tiles=tiles), package.BACKENDS["reference"]
  made = []
  for call in calls:
    part, vjp = jax.vjp(lambda *x, call=call: call(*x, sight), *arrays)
    made.append((*part, *vjp(type(part)(*cotangents))))
  return made


def differ(operation, tiles=TINY):
  """Returns whether a kernel and `reference` differ by more than rounding."""
  return any(
    not np.allclose(one, other, rtol=1e-4, atol=1e-4)
    for one, other in zip(*found(operation, tiles), strict=True)
  )


@pytest.mark.slow
@kernel
def test_cores_that_share_the_blocks_do_not_race(operation, backend):
  from jax._src.pallas.mosaic.interpret import interpret_pallas_call  # it is told nowhere else

  del backend
  params = pltpu.InterpretParams(detect_races=True, num_cores_or_threads=2)
  assert not differ(operation, Tiles(4, 4, params))
  assert not interpret_pallas_call.races.races_found


@pytest.mark.slow
@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_in_a_kernel_shows(name):
  fault = FAULTS[name]
  assert not differ(fault.operation)
  jax.clear_caches()
  right = fault.owner.__dict__[fault.name]
  right = right.__get__(None, fault.owner) if isinstance(right, classmethod) else right
  with mock.patch.object(fault.owner, fault.name, fault.planted(right)):
    assert differ(fault.operation)
  jax.clear_caches()


def test_the_oracle_of_kernels_is_that_of_a_float64_loop():
  arrays, sight = inputs()
  out, _ = attention_oracle.find(arrays, np.asarray(sight.dense()), 0.3)
  np.testing.assert_allclose(found("attention", TINY)[1][0], out, rtol=1e-5, atol=1e-5)
