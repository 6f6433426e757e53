"""Rings compiled for TPU chips that are not there: what is sent is hidden behind products.

For `make look-ahead`, whose environment has libtpu. XLA's schedule of each device is in the text of
the compiled program: what stands between a permute's start and its end runs meanwhile.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jaxmoe.core.backends import HERE
from jaxmoe.core.tokens import Tokens
from jaxmoe.hlo.text import parse_program
from jaxmoe.models.attention import softmax_parts
from jaxmoe.models.masks import DocumentMask
from jaxmoe.parallel.attend import ATTEND, ContextGroup
from jaxmoe.parallel.context_rows import spread_rows
from jaxmoe.plan.topology import topology_devices

pytest.importorskip("libtpu")
N, LENGTH, HEADS, SIZE = 8, 2048, 8, 128
ROWS = PartitionSpec(None, "context")
PRODUCTS = ("dot", "convolution")


@functools.cache
def program(attend):
  """Returns outputs and gradients of a document over 8 chips, compiled for v5e:2x4."""
  devices = np.array(topology_devices("v5e:2x4"))
  mesh = Mesh(devices, ("context",), axis_types=(AxisType.Auto,))
  parts = softmax_parts(HERE.of_devices(devices.flat), SIZE**-0.5)

  def on_device(q, k, v, segment):
    slot = jnp.broadcast_to(jnp.arange(segment.shape[1], dtype=jnp.int32), segment.shape)
    tokens = spread_rows(Tokens(slot, slot, segment, slot), "context", True)
    group = ContextGroup("context", N, True)
    return ATTEND[attend](parts, (q, k, v), tokens, DocumentMask(), group)

  def both(q, k, v, segment, weight):
    run = jax.shard_map(
      on_device, mesh=mesh, in_specs=(ROWS,) * 4, out_specs=ROWS, check_vma=False
    )
    out, pull = jax.vjp(lambda q, k, v: run(q, k, v, segment), q, k, v)
    return out, pull(weight)

  lies = NamedSharding(mesh, ROWS)
  heads = jax.ShapeDtypeStruct((1, LENGTH, HEADS, SIZE), jnp.bfloat16, sharding=lies)
  segment = jax.ShapeDtypeStruct((1, LENGTH), jnp.int32, sharding=lies)
  compiled = jax.jit(both).lower(heads, heads, heads, segment, heads).compile()
  return parse_program(compiled.as_text())


def multiplies(found, instruction):
  """Whether an instruction is a product, or has one inside."""
  inside = [found.computations[name] for name in called(found, instruction)]
  return instruction.opcode in PRODUCTS or any(
    multiplies(found, each) for computation in inside for each in computation.values()
  )


def called(found, instruction):
  """Returns the computations that an instruction runs."""
  keys = ("calls", "body", "to_apply", "branch_computations")
  names = [name for key in keys for name in instruction.called(key)]
  return [name for name in names if name in found.computations]


def permutes(found):
  """Returns of each permute whether it is asynchronous, its numbers, and the products meanwhile."""
  told = []
  for computation in found.computations.values():
    started = {}
    for each in computation.values():
      if each.opcode == "collective-permute":
        told.append((False, math.prod(each.shapes[0].dims), 0))
      if each.opcode == "collective-permute-start":
        started[each.name] = 0
      elif each.opcode == "collective-permute-done":
        told.append((True, math.prod(each.shapes[0].dims), started.pop(each.operands[0])))
      elif multiplies(found, each):
        started = {name: count + 1 for name, count in started.items()}
    assert not started
  return told


@pytest.mark.parametrize("attend, count", [("ring", 42), ("token_ring", 49)])
def test_every_permute_is_asynchronous(attend, count):
  told = permutes(program(attend))
  assert len(told) == count and all(is_asynchronous for is_asynchronous, *_ in told)


@pytest.mark.parametrize("attend, bare", [("ring", 0), ("token_ring", 1)])
def test_products_run_while_heads_are_sent(attend, bare):
  """In a token ring the first of what gradients need of what was found, one float32 a token and
  head, is sent before there is a product of the backward pass to hide it.
  """
  told = permutes(program(attend))
  alone = [numbers for _, numbers, products in told if not products]
  assert alone == [LENGTH // N * HEADS] * bare
  heads = [products for _, numbers, products in told if numbers == LENGTH // N * HEADS * SIZE]
  assert len(heads) >= 28 and all(heads)
