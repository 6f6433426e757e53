"""Rings of a kind of attention whose weights hold integers, such as quantised ones."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, PartitionSpec

from jaxmoe.core.backends import HERE
from jaxmoe.core.tokens import Tokens
from jaxmoe.models.attention import softmax_parts
from jaxmoe.models.masks import CausalMask
from jaxmoe.parallel.attend import ATTEND, ContextGroup
from jaxmoe.parallel.context_rows import spread_rows

N, SHAPE = 4, (1, 16, 2, 3)
WHOLE = {"integers": jnp.array([[[[3, -2, 5]]]], jnp.int8), "scale": jnp.float32(0.25)}


def quantised_parts(weights):
  """Returns softmax attention whose values are multiplied by integers times a scale."""
  plain = softmax_parts(HERE, 0.7)

  def part(weights, q, k, v, sight):
    return plain.part(plain.weights, q, k, v * weights["integers"] * weights["scale"], sight)

  def attend(q, k, v, sight):
    return plain.finalize(part(weights, q, k, v, sight)).astype(q.dtype)

  return dataclasses.replace(plain, attend=attend, part=part, weights=weights)


def gradients(attend):
  """Returns the gradients of a sum by queries, keys, values and the scale."""
  mesh = Mesh(np.array(jax.devices()[:N]), ("context",), axis_types=(AxisType.Auto,))

  def on_device(q, k, v, scale):
    slot = jnp.broadcast_to(jnp.arange(q.shape[1], dtype=jnp.int32), q.shape[:2])
    tokens = spread_rows(Tokens(slot, slot, jnp.ones_like(slot), slot), "context", True)
    parts = quantised_parts({**WHOLE, "scale": scale})
    return ATTEND[attend](parts, (q, k, v), tokens, CausalMask(), ContextGroup("context", N, True))

  rows = PartitionSpec(None, "context")
  run = jax.shard_map(
    on_device, mesh=mesh, in_specs=(rows, rows, rows, PartitionSpec()), out_specs=rows,
    check_vma=False,
  )  # fmt: skip
  rng = np.random.default_rng(0)
  q, k, v, weight = (jnp.float32(rng.normal(size=SHAPE)) for _ in range(4))
  loss = jax.grad(lambda *given: jnp.sum(weight * run(*given)), (0, 1, 2, 3))
  return jax.jit(loss)(q, k, v, WHOLE["scale"])


@pytest.mark.parametrize("attend", ["ring", "token_ring"])
def test_integers_in_weights_have_no_gradient_and_the_others_have_theirs(attend):
  for found, right in zip(gradients(attend), gradients("gather"), strict=True):
    np.testing.assert_allclose(found, right, rtol=1e-5, atol=1e-5)
    assert np.any(right)
