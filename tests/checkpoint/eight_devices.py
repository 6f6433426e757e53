"""Run by layouts_test.py with eight virtual devices: digests, then writes and reads sharded.

Prints one line of JSON. Takes the folder with what the parent wrote on one device.
"""

import json
import re
import sys

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxmoe.checkpoint import digest as digest_module
from jaxmoe.checkpoint.digest import digest
from jaxmoe.checkpoint.orbax_store import OrbaxStore

LAYOUTS = {
  "2x4": P("a", "b"),
  "columns": P(None, "b"),
  "all rows": P(("b", "a")),
  "replicated": P(),
}


def main(folder):
  mesh = jax.make_mesh((2, 4), ("a", "b"), axis_types=(AxisType.Auto,) * 2)
  host = dict(np.load(f"{folder}/arrays.npz"))
  state = {name: jnp.asarray(x) for name, x in host.items()}
  state["bfloat16"] = state["float32"].astype(jnp.bfloat16)
  out = {"unsharded": digest(state), "collectives": {}}
  layouts = {name: NamedSharding(mesh, spec) for name, spec in LAYOUTS.items()}
  store = OrbaxStore(f"{folder}/sharded", keep=9)
  for step, (name, sharding) in enumerate(layouts.items()):
    sharded = {k: jax.device_put(x, sharding) for k, x in state.items()}
    out[name] = digest(sharded)
    text = digest_module._digest_under(sharding).lower(sharded["float32"]).compile().as_text()
    pattern = r"= (.*) (all-\w+|reduce-\w+|collective-\w+)(?:-start)?\("
    out["collectives"][name] = re.findall(pattern, text)
    store.write(step, sharded, {"layout": name})
  store.wait()
  reads = {"written on one device": (OrbaxStore(f"{folder}/single"), 0)}
  reads |= {name: (store, step) for step, name in enumerate(LAYOUTS)}
  out["read"] = {}
  for written, (where, step) in reads.items():
    for name, sharding in layouts.items():
      asked = {
        k: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding) for k, x in state.items()
      }
      arrays, _ = where.read(step, asked)
      out["read"][f"{written} -> {name}"] = all(
        np.array_equal(np.asarray(arrays[k]), np.asarray(x)) and arrays[k].sharding == sharding
        for k, x in state.items()
      )
  store.close()
  print(json.dumps(out))


main(sys.argv[1])
