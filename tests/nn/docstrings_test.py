"""What the docstrings of `jaxmoe.nn` show runs as it stands there."""

import inspect
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import Mesh

import jaxmoe


@pytest.mark.parametrize("name", ["MoE", "Router", "Attention", "Block", "Transformer", "shard"])
def test_the_example_of_a_module_runs(name):
  x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 4, 512)), jnp.float32)
  known = {
    "jaxmoe": jaxmoe, "nnx": nnx, "x": x, "ids": jnp.arange(8).reshape(2, 4), "labels": None,
    "task_loss": jnp.mean, "cross_entropy": lambda logits, labels: -jnp.mean(logits),
    "model": nnx.Linear(2, 2, rngs=nnx.Rngs(0)),
    "mesh": Mesh(np.array(jax.devices()[:1]), ("expert",)),
  }  # fmt: skip
  code = inspect.getdoc(getattr(jaxmoe.nn, name)).split("\n\n")[1]
  assert "jaxmoe.nn." + name in code and all(line.startswith("    ") for line in code.split("\n"))
  exec(textwrap.dedent(code), known)
  for shown in {"y", "logits"} & known.keys():
    assert known[shown].shape[:2] == (2, 4) and np.isfinite(known[shown]).all()
