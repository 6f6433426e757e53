"""PyTorch as a side finds what the references of single operations find."""

import sys

import jax
import jax.numpy as jnp
import pytest

from jaxmoe.bench.kernel_cases import CASES, SIZES, both_ways, operations
from jaxmoe.bench.rival_operations import rivals_of
from jaxmoe.bench.suite import Asked

pytest.importorskip("torch")
pytest.importorskip("transformers")


@pytest.mark.parametrize("name", ["attention", "cross_entropy", "grouped_matmul"])
def test_values_and_gradients_are_right_and_timed(name):
  case = CASES[name](SIZES["small8"])
  call = case.call(operations()[name][case.base])
  out = jax.eval_shape(call, *case.args)
  given = (*case.args, jnp.cos(jnp.arange(out.size, dtype=jnp.float32)).reshape(out.shape))
  right = jax.tree.leaves(jax.jit(both_ways(call))(*given))
  asked = Asked(
    (), ("torch",), count=False, rounds=1, pythons=(sys.executable, sys.executable), env={},
    peaks=lambda: (1.0, 1.0), say=print,
  )  # fmt: skip
  with rivals_of(asked, name, case.constants, given, right) as (runs, rows):
    assert not rows and runs["torch"]().cpu > 0
