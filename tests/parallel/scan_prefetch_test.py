"""Weights are gathered a layer ahead: the numbers of a scan, and gathers no layer waits for."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params

from jaxmoe.models.block import BlockConfig, MLPConfig
from jaxmoe.parallel import Parallel, scan_with_prefetch
from tests.multidevice.programs import decoder_of, trace_gradients

WIDTH = 4


def step(state, weights, number):
  """Has a state of two leaves, and outputs with and without a gradient."""
  x, total = state
  y = jnp.tanh(x @ weights["w"] + weights["b"][None] * (number + 1))
  return (y, total + jnp.sum(y)), {"mean": jnp.mean(y), "signs": jnp.sum(y > 0), "all": y[0]}


def gather(stored):
  return {"w": 2 * stored["w"].T, "b": stored["b"]}


def plain_scan(step, gather, state, stored, unroll=False):
  def body(state, inputs):
    return step(state, gather(inputs[0]), inputs[1])

  num = jax.tree.leaves(stored)[0].shape[0]
  return jax.lax.scan(body, state, (stored, jnp.arange(num)), unroll=num if unroll else 1)


@pytest.mark.parametrize("remat", [False, True])
@pytest.mark.parametrize("unroll", [False, True])
@pytest.mark.parametrize("num", [1, 2, 5])
def test_values_and_gradients_are_those_of_a_scan(num, unroll, remat):
  rng = np.random.default_rng(num)
  stored = {"w": rng.normal(size=(num, WIDTH, WIDTH)), "b": rng.normal(size=(num, WIDTH))}
  stored = jax.tree.map(jnp.float32, stored)
  state = jnp.float32(rng.normal(size=(3, WIDTH))), jnp.float32(0.5)

  def loss(loop, state, stored):
    layer = jax.checkpoint(step) if remat else step
    (x, total), outputs = loop(layer, gather, state, stored, unroll)
    weighed = jnp.sum(outputs["mean"] * jnp.arange(num)) + jnp.sum(outputs["all"] ** 3)
    return jnp.sum(x**2) + total + weighed, outputs["signs"]

  def run(loop):
    gradient = jax.value_and_grad(lambda *args: loss(loop, *args), argnums=(0, 1), has_aux=True)
    return jax.jit(gradient)(state, stored)

  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-6, atol=1e-6),
               run(scan_with_prefetch), run(plain_scan))  # fmt: skip


def gathers_in_loops(jaxpr, inside=False):
  """Yields, for each all-gather over `fsdp` in a loop's body, whether anything there uses it."""
  for eqn in jaxpr.eqns:
    if inside and eqn.primitive.name == "all_gather" and eqn.params["axis_name"] == ("fsdp",):
      used = {id(var) for other in jaxpr.eqns for var in other.invars}
      yield any(id(var) in used for var in eqn.outvars)
    for part in jaxprs_in_params(eqn.params):
      yield from gathers_in_loops(part, inside or eqn.primitive.name == "scan")


def waits(parallel):
  decoder = decoder_of(BlockConfig(ffn=MLPConfig(32)), 4, 32, 64)
  return list(gathers_in_loops(trace_gradients(decoder, parallel, (8, 8))[0].jaxpr.jaxpr))


def test_no_layer_waits_for_a_gather_of_its_own_iteration():
  leaves = 2 + 4 + 2  # norms, attention, gate and up together with down
  found = waits(Parallel(fsdp=4))
  assert len(found) == 2 * leaves and not any(found)  # forwards and backwards


def test_in_a_plain_scan_every_layer_waits(monkeypatch):
  monkeypatch.setattr("jaxmoe.parallel.mesh_context.scan_with_prefetch", plain_scan)
  found = waits(Parallel(fsdp=4))
  assert found and all(found)
