"""One device against eight virtual ones and two processes: same digests, same arrays."""

import json
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

HERE = pathlib.Path(__file__).parent
ROOT = HERE.parent.parent


def environment(num_devices):
  own = {"JAX_NUM_CPU_DEVICES": str(num_devices), "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
  return {**os.environ, **own}


@pytest.fixture(scope="module")
def host():
  rng = np.random.default_rng(0)
  return {
    "float32": rng.standard_normal((16, 24)).astype(np.float32),
    "int8": rng.integers(-128, 128, (8, 8, 3)).astype(np.int8),
    "uint32": rng.integers(0, 2**32, (8, 16), dtype=np.uint32),
  }


@pytest.fixture(scope="module")
def state(host):
  arrays = {name: jnp.asarray(x) for name, x in host.items()}
  return {**arrays, "bfloat16": arrays["float32"].astype(jnp.bfloat16)}


@pytest.fixture(scope="module")
def eight(host, state, tmp_path_factory):
  """What eight devices computed, wrote and read, and the folder they did it in."""
  folder = tmp_path_factory.mktemp("layouts")
  np.savez(folder / "arrays.npz", **host)
  store = OrbaxStore(folder / "single")
  store.write(0, state, {})
  store.close()
  done = subprocess.run(
    [sys.executable, HERE / "eight_devices.py", folder],
    env=environment(8),
    capture_output=True,
    text=True,
    timeout=200,
  )
  assert done.returncode == 0, done.stderr
  return json.loads(done.stdout.splitlines()[-1]), folder


def test_digests_are_the_same_under_every_sharding(eight, state):
  said, _ = eight
  expected = {name: list(words) for name, words in digest(state).items()}
  for layout in ("unsharded", "2x4", "columns", "all rows", "replicated"):
    assert said[layout] == expected, layout


def test_a_digest_of_a_sharded_array_gathers_nothing(eight):
  collectives = eight[0]["collectives"]
  assert collectives["replicated"] == []
  for layout in ("2x4", "columns", "all rows"):
    assert collectives[layout], layout
    for shape, kind in collectives[layout]:
      assert kind == "all-reduce" and shape in ("u32[]", "(u32[], u32[])"), (layout, shape, kind)


def test_any_layout_reads_what_any_layout_wrote(eight):
  assert len(eight[0]["read"]) == 20
  assert all(eight[0]["read"].values()), eight[0]["read"]


def read_here(folder, step, state):
  one = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  like = {k: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=one) for k, x in state.items()}
  arrays, record = OrbaxStore(folder).read(step, like)
  for name, x in state.items():
    np.testing.assert_array_equal(np.asarray(arrays[name]), np.asarray(x))
  return record


def test_one_device_reads_what_eight_wrote(eight, state):
  for step, layout in enumerate(["2x4", "columns", "all rows", "replicated"]):
    assert read_here(eight[1] / "sharded", step, state) == {"layout": layout}


TWO_PROCESSES = """
import sys
import jax, numpy as np
jax.distributed.initialize(sys.argv[2], 2, int(sys.argv[3]))
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from jaxmoe.checkpoint.digest import digest
from jaxmoe.checkpoint.orbax_store import OrbaxStore
from jaxmoe.checkpoint.store import read_latest
mesh = jax.make_mesh((4,), ("a",), axis_types=(AxisType.Auto,))
host = dict(np.load(sys.argv[1] + "/arrays.npz"))
sharding = NamedSharding(mesh, P("a"))
state = {k: jax.make_array_from_callback(x.shape, sharding, lambda i, x=x: x[i])
         for k, x in host.items()}
like = {k: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding) for k, x in state.items()}
store = OrbaxStore(sys.argv[1] + "/two", keep=2)
for step in range(4):
  store.write(step, state, {"digest": {k: list(v) for k, v in digest(state).items()}})
store.wait()
assert store.steps() == [2, 3]
store.set_aside(3, "to see it done by two")
assert store.steps() == [2]
step, arrays, record = read_latest(store, like, print)
assert step == 2 and digest(arrays) == digest(state)
single, _ = OrbaxStore(sys.argv[1] + "/single").read(0, like)
assert digest(single) == digest(state)
store.write(7, arrays, {})
store.close()
"""


@pytest.mark.slow
def test_two_processes_write_and_read_what_one_reads_and_writes(host, state, tmp_path):
  del state["bfloat16"]
  np.savez(tmp_path / "arrays.npz", **host)
  store = OrbaxStore(tmp_path / "single")
  store.write(0, state, {})
  store.close()
  with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    address = f"127.0.0.1:{free.getsockname()[1]}"
  running = [
    subprocess.Popen(
      [sys.executable, "-c", TWO_PROCESSES, tmp_path, address, str(i)],
      env=environment(2),
      stdout=subprocess.PIPE,
      stderr=subprocess.STDOUT,
      text=True,
    )
    for i in range(2)
  ]
  try:
    for process in running:
      output, _ = process.communicate(timeout=100)
      assert process.returncode == 0, output
  finally:
    for process in running:
      process.kill()
      process.communicate()
  expected = {name: list(words) for name, words in digest(state).items()}
  assert read_here(tmp_path / "two", 2, state) == {"digest": expected}
  assert OrbaxStore(tmp_path / "two").steps() == [2, 7]
