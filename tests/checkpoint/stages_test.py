"""Layers of stages over several processes: written, read and digested where they lie."""

import os
import pathlib
import socket
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmoe.checkpoint.digest import digest
from jaxmoe.checkpoint.orbax_store import OrbaxStore

pytestmark = pytest.mark.slow

ROOT = pathlib.Path(__file__).parents[2]
LAYOUTS = {  # processes, devices of each, stages
  "a stage a process": (2, 1, 2),
  "a stage on two devices of each": (2, 2, 2),
  "two stages a process": (2, 2, 4),
  "two processes a stage": (4, 1, 2),
}
NAMES = ("layers/0/w", "layers/1/w", "layers/2/w", "", "layers/3/w", "layers/4/w", "", "")

ONE_OF_SEVERAL = """
import pathlib, sys
import jax, numpy as np
folder, address = pathlib.Path(sys.argv[1]), sys.argv[2]
processes, stages, index = map(int, sys.argv[3:])
jax.distributed.initialize(address, processes, index)
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from jaxmoe.checkpoint.digest import digest
from jaxmoe.checkpoint.manifest import DamagedStepError
from jaxmoe.checkpoint.orbax_store import OrbaxStore
from jaxmoe.train.stage_arrays import is_staged, layer_shardings, put_together, take_apart
from tests.checkpoint.stages_test import NAMES, drawn

shape = (stages, len(jax.devices()) // stages)
mesh = jax.make_mesh(shape, ("pipe", "expert"), axis_types=(AxisType.Auto,) * 2)
whole, cut = NamedSharding(mesh, P()), NamedSharding(mesh, P("pipe", "expert"))

def put(x, sharding):
  return jax.make_array_from_callback(x.shape, sharding, lambda part: x[part])

host = drawn()
stacked = np.stack([host.get(name, np.zeros_like(host["layers/0/w"])) for name in NAMES])
leaf, embed = put(stacked, cut), put(host["embed"], whole)
assert is_staged(cut)
state = {**dict(take_apart(leaf, NAMES)), "embed": embed}
assert state.keys() == host.keys()
for row, name in enumerate(NAMES):
  if name:
    stage = set(mesh.devices[row * stages // len(NAMES)].flat)
    assert state[name].sharding.device_set == stage
like = {k: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding) for k, x in state.items()}
store = OrbaxStore(folder / "several")
for step in range(2):
  store.write(step, state, {"words": {k: list(v) for k, v in digest(state).items()}})
store.wait()

def check(arrays):
  assert digest(arrays) == digest(state)
  where = jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)
  again = put_together(arrays, NAMES, where, cut)
  assert again.sharding == cut
  for mine, was in zip(again.addressable_shards, leaf.addressable_shards, strict=True):
    assert mine.device == was.device
    np.testing.assert_array_equal(np.asarray(mine.data), np.asarray(was.data))

check(store.read(1, like)[0])
check(OrbaxStore(folder / "single").read(0, like)[0])
try:
  OrbaxStore(folder / "damaged").read(0, like)
except DamagedStepError as error:
  assert "other values than were written in layers/4/w" in str(error), error
else:
  raise AssertionError("a damaged layer was read as intact")
store.write(7, state, {})
store.close()
"""


def drawn():
  """Returns the arrays of five layers and one that is not of a layer."""
  rng = np.random.default_rng(0)
  names = [*filter(None, NAMES), "embed"]
  return {name: rng.normal(size=(4, 6)).astype(np.float32) for name in names}


def run_all(folder, processes, devices, stages):
  with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    address = f"127.0.0.1:{free.getsockname()[1]}"
  own = {"JAX_NUM_CPU_DEVICES": str(devices), "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
  command = [sys.executable, "-c", ONE_OF_SEVERAL, folder, address, str(processes), str(stages)]
  running = [
    subprocess.Popen(
      [*command, str(index)],
      env={**os.environ, **own},
      stdout=subprocess.PIPE,
      stderr=subprocess.STDOUT,
      text=True,
    )
    for index in range(processes)
  ]
  try:
    for process in running:
      output, _ = process.communicate(timeout=200)
      assert process.returncode == 0, output
  finally:
    for process in running:
      process.kill()
      process.communicate()


def write_damaged(path, state):
  """Writes a step whose record belongs to another value of one layer."""
  for name, add in (("right", 0), ("wrong", 1)):
    store = OrbaxStore(path / name)
    store.write(0, {**state, "layers/4/w": state["layers/4/w"] + add}, {})
    store.close()
  (path / "wrong" / "0" / "label" / "metadata").write_bytes(
    (path / "right" / "0" / "label" / "metadata").read_bytes()
  )
  (path / "wrong").rename(path / "damaged")


@pytest.mark.parametrize("name", LAYOUTS)
def test_several_processes_write_and_read_layers_that_some_have_no_part_of(name, tmp_path):
  state = {name: jnp.asarray(x) for name, x in drawn().items()}
  store = OrbaxStore(tmp_path / "single")
  store.write(0, state, {})
  store.close()
  write_damaged(tmp_path, state)
  run_all(tmp_path, *LAYOUTS[name])
  one = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  like = {k: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=one) for k, x in state.items()}
  arrays, record = OrbaxStore(tmp_path / "several").read(1, like)
  assert record == {"words": {k: list(words) for k, words in digest(state).items()}}
  for path, x in state.items():
    np.testing.assert_array_equal(np.asarray(arrays[path]), np.asarray(x))
  assert OrbaxStore(tmp_path / "several").steps() == [0, 1, 7]
