"""Columns run by one scan over ticks: a chain of products, and a pass that must not be there."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, PartitionSpec

from jaxmoe.core.errors import InputError
from jaxmoe.parallel.pipelines import KINDS, PIPELINES, lower
from jaxmoe.parallel.tick_scan import PassResult, scan_ticks

MICRO, DEVICES = 5, 3
MESSAGE = jax.ShapeDtypeStruct((2,), jnp.float32)


def on_stages(function):
  mesh = Mesh(np.array(jax.devices()[:DEVICES]), ("pipe",), axis_types=(AxisType.Auto,))
  whole = PartitionSpec()
  return jax.jit(
    jax.shard_map(function, mesh=mesh, in_specs=(whole, whole), out_specs=whole, check_vma=False)
  )


def product_of_stages(table, w_S, x_M2, body=lambda x: x):
  """Returns each stage's gradient of the sum of squares of x times all weights; by hand."""
  columns = lower(table)
  stages = columns.stages_PN
  last = stages.size - 1

  def ahead(row, taken, state):
    stage = jnp.asarray(stages)[jax.lax.axis_index("pipe"), row["f_stage"]]
    x_2 = jnp.where(stage == 0, x_M2[row["f_micro"]], taken["f_input"])
    return PassResult(state, forward=body(x_2 * w_S[stage]))

  def back(row, taken, state):
    stage = jnp.asarray(stages)[jax.lax.axis_index("pipe"), row["b_stage"]]
    x_2 = jnp.where(stage == 0, x_M2[row["b_micro"]], taken["b_input"])
    d_2 = jnp.where(stage == last, 2 * x_2 * w_S[stage], taken["b_grad"])
    state = state.at[stage].add(jnp.sum(d_2 * x_2))
    return PassResult(state, backward=d_2 * w_S[stage])

  idle = ("idle", lambda row, taken, state: PassResult(state))
  which = np.searchsorted([0, KINDS.index("F"), KINDS.index("BW")], columns.kind)
  passes = [idle, ("F", ahead), ("BW", back)]
  d_S = scan_ticks(columns, "pipe", passes, which, MESSAGE, jnp.zeros_like(w_S))
  return jax.lax.psum(d_S, "pipe")


@pytest.mark.parametrize("name", ["gpipe", "1f1b"])
def test_ticks_give_the_gradient_of_the_whole_chain(name):
  table = PIPELINES[name](DEVICES, MICRO)
  rng = np.random.default_rng(0)
  w_S, x_M2 = rng.uniform(0.5, 1.5, DEVICES), rng.normal(size=(MICRO, 2))
  run = on_stages(functools.partial(product_of_stages, table))
  found = run(jnp.float32(w_S), jnp.float32(x_M2))
  true = 2 * np.prod(w_S) ** 2 * np.sum(x_M2**2) / w_S
  np.testing.assert_allclose(found, true, rtol=1e-5)


def test_a_pass_with_a_permute_inside_is_refused_by_name():
  def ring(x_2):
    return jax.lax.ppermute(x_2, "pipe", [(at, (at + 1) % DEVICES) for at in range(DEVICES)])

  table = PIPELINES["gpipe"](DEVICES, MICRO)
  run = on_stages(functools.partial(product_of_stages, table, body=jax.checkpoint(ring)))
  with pytest.raises(InputError, match="the pass F of a pipeline has a permute inside"):
    run(jnp.ones(DEVICES), jnp.ones((MICRO, 2)))
