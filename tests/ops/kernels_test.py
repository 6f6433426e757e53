"""What kernels for accelerators owe where there is none: a lowering, no races, no fault unseen."""

import functools
import importlib
import pkgutil
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from jaxmoe import ops
from jaxmoe.core.backends import Devices, Need
from jaxmoe.ops import attention, cross_entropy, grouped_matmul, stick_breaking
from jaxmoe.ops.attention import Sight
from jaxmoe.ops.attention.tpu_walk import Tiles
from jaxmoe.ops.cross_entropy.mosaic_tpu import LogitTiles
from jaxmoe.ops.grouped_matmul.mosaic_tpu import RowTiles
from tests.planted_faults_of_kernels import FAULTS

KERNELS = ("attention", "cross_entropy", "grouped_matmul", "stick_breaking")
ATTENTION = {"attention": attention, "stick_breaking": stick_breaking}
LOSS = functools.partial(cross_entropy.mosaic_tpu, spec="td,vd->tv", chunk=5)
REFERENCE_LOSS = functools.partial(cross_entropy.reference, spec="td,vd->tv", chunk=5)
kernel = pytest.mark.parametrize("operation", KERNELS)


def test_every_kernel_is_here():
  names = (each.name for each in pkgutil.iter_modules(ops.__path__, "jaxmoe.ops."))
  packages = map(importlib.import_module, names)
  found = {
    package.__name__.rpartition(".")[2]
    for package in packages
    if "mosaic_tpu" in getattr(package, "BACKENDS", ())
  }
  assert found == set(KERNELS)


def backend_of(operation):
  return importlib.import_module(f"jaxmoe.ops.{operation}").BACKENDS["mosaic_tpu"]


@kernel
def test_a_kernel_is_for_tpus_and_is_asked_for_by_name(operation):
  sizes = {"B": 1, "L": 512, "S": 512, "N": 4, "K": 2, "H": 64, "P": 64, "T": 8, "D": 8, "C": 8}
  backend = backend_of(operation)
  need = Need(Devices("tpu"), sizes=sizes)
  assert backend.fits(need) is None and "ask for it by name" in backend.auto(need)
  assert "the devices are cpu" in backend.fits(Need(Devices("cpu"), sizes=sizes))
  wrong = {attention.ANY_MASK, cross_entropy.FORMAT}
  assert "has no heads in a weight" in backend.fits(Need(Devices("tpu"), "float32", sizes, wrong))
  if operation in ATTENTION:
    large = Need(Devices("tpu"), sizes={**sizes, "H": 512})
    assert "at most 256" in backend.fits(large)


@kernel
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_a_kernel_and_its_gradients_lower_for_tpus(operation, dtype):
  if operation == "cross_entropy":
    call, shapes = loss, ((600, 64), (1000, 64))
  elif operation == "grouped_matmul":
    call, shapes = product, ((600, 64), (4, 64, 96))
  else:
    call = attend(ATTENTION[operation].mosaic_tpu, 600)
    shapes = (1, 600, 4, 64), (1, 600, 2, 64), (1, 600, 2, 32)
  args = [jax.ShapeDtypeStruct(shape, dtype) for shape in shapes]
  traced = jax.jit(functools.partial(both_ways, call)).trace(*args)
  assert traced.lower(lowering_platforms=("tpu",)).as_text().count("tpu_custom_call") == 3


def both_ways(call, *arrays):
  """Returns what a function of arrays finds, and the gradients of its product with some numbers."""
  found, vjp = jax.vjp(call, *arrays)
  leaves, treedef = jax.tree.flatten(found)
  numbers = [jnp.cos(jnp.arange(x.size, dtype=x.dtype)).reshape(x.shape) for x in leaves]
  return *leaves, *vjp(jax.tree.unflatten(treedef, numbers))


def attend(call, length):
  """Returns a function of q, k and v of two rows, of documents of 3, 7 and more tokens."""
  slot = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), (1, length))
  first = jnp.where(slot < 3, 0, jnp.where(slot < 10, 3, 10))
  return lambda *arrays: call(*arrays, Sight(first, slot, slot, 0.3))


def loss(hidden_TD, head_VD, call=LOSS):
  labels_T = (jnp.arange(hidden_TD.shape[0]) * 7) % head_VD.shape[0] - 1
  return call(hidden_TD, head_VD, labels_T=labels_T)


def product(rows_RD, weight_SDF, call=grouped_matmul.mosaic_tpu):
  """Returns the products of slots of 5, 0, 3 and 1 rows, with rows past the last."""
  return call(rows_RD, weight_SDF, jnp.asarray([5, 0, 3, 1], jnp.int32))


def differ(operation, interpret=True):
  """Returns whether a kernel in tiles of 4 and `reference` differ by more than rounding."""
  rng = np.random.default_rng(0)
  draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)  # noqa: E731
  if operation == "cross_entropy":
    arrays, tiles = (draw(11, 8), draw(13, 8)), LogitTiles(4, 4, interpret)
    one = functools.partial(loss, call=functools.partial(LOSS, tiles=tiles))
    other = functools.partial(loss, call=REFERENCE_LOSS)
  elif operation == "grouped_matmul":
    arrays, tiles = (draw(11, 8), draw(4, 8, 6)), RowTiles(4, 4, 4, interpret)
    one = functools.partial(product, call=functools.partial(grouped_matmul.mosaic_tpu, tiles=tiles))
    other = functools.partial(product, call=grouped_matmul.loop)
  else:
    package, tiles = ATTENTION[operation], Tiles(4, 4, interpret)
    arrays = draw(1, 11, 4, 8), draw(1, 11, 2, 8), draw(1, 11, 2, 8)
    one = attend(functools.partial(package.mosaic_tpu, tiles=tiles), 11)
    other = attend(package.BACKENDS["reference"], 11)
  found, right = both_ways(one, *arrays), both_ways(other, *arrays)
  return not all(map(functools.partial(np.allclose, rtol=1e-4, atol=1e-4), found, right))


@pytest.mark.slow
@kernel
def test_cores_that_share_the_blocks_do_not_race(operation):
  from jax._src.pallas.mosaic.interpret import interpret_pallas_call  # it is told nowhere else

  assert not differ(operation, pltpu.InterpretParams(detect_races=True, num_cores_or_threads=2))
  assert not interpret_pallas_call.races.races_found


@pytest.mark.slow
@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_in_a_kernel_shows(name):
  fault = FAULTS[name]
  assert not differ(fault.operation)
  jax.clear_caches()
  right = getattr(fault.owner, fault.name)
  with mock.patch.object(fault.owner, fault.name, fault.planted(right)):
    assert differ(fault.operation)
  jax.clear_caches()
