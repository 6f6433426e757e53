"""Parts of the keys, put together in any grouping and order, are the whole."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmoe.ops.attention import AttentionPart, join_sink, merge, reference
from jaxmoe.ops.attention.blocks import Blocks, blocks
from tests.ops.attention import attention_oracle
from tests.ops.attention.backends_test import SCALE, SIGHTS, L, cast, draw, sight_of

SINK = np.array([-40.0, 0.5, 2.0, 60.0])
CUTS = (slice(0, 4), slice(4, 9), slice(9, L))


def small(q, k, v, sight):
  return blocks(q, k, v, sight, Blocks(4, 4, 1))


def parts_of(attend, arrays, sight):
  """Returns the parts of three cuts of the keys, without sinks."""
  q, k, v = arrays
  return [
    attend(q, k[:, cut], v[:, cut], dataclasses.replace(sight, slot_BS=sight.slot_BS[:, cut]))
    for cut in CUTS
  ]


@pytest.mark.parametrize("attend", [reference, small])
@pytest.mark.parametrize("name", ["causal", "documents that end inside a block", "nothing"])
def test_parts_merge_in_any_order_and_grouping_to_the_whole_with_its_gradients(attend, name):
  arrays, sink = draw(), jnp.asarray(SINK, jnp.float32)
  sight = sight_of(SIGHTS[name])
  rng = np.random.default_rng(1)
  cotangents = rng.normal(size=arrays[2].shape[:2] + (4, 8)), np.zeros((2, L, 4))

  def loss(arrays, sink):
    parts, found = parts_of(attend, arrays, sight), []
    for one, two, three in itertools.permutations(parts):
      found.append(join_sink(merge(merge(one, two), three), sink))
      found.append(join_sink(merge(one, merge(two, three)), sink))
    return sum(jnp.sum(part.out_BLNP * cotangents[0]) for part in found) / len(found), found

  run = jax.jit(jax.grad(loss, (0, 1), has_aux=True))
  grads, found = run(cast(arrays), sink)
  mask = np.asarray(sight.dense())
  out, lse = attention_oracle.find(arrays, mask, SCALE, SINK)
  for part in found:
    np.testing.assert_allclose(part.out_BLNP, out, rtol=1e-5, atol=2e-5)
    np.testing.assert_allclose(part.lse_BLN, lse, rtol=1e-5, atol=1e-5)
  right = attention_oracle.pull_back(arrays, mask, SCALE, cotangents, SINK)
  for one, other in zip((*grads[0], grads[1]), right, strict=True):
    np.testing.assert_allclose(one, other, rtol=2e-4, atol=2e-4)


def test_a_part_without_a_key_changes_nothing_and_two_of_them_are_one():
  part = AttentionPart(jnp.ones((1, 2, 3, 4)), jnp.array([[[0.0, -7.0, 90.0]] * 2]))
  none = AttentionPart(jnp.zeros((1, 2, 3, 4)), jnp.full((1, 2, 3), -jnp.inf))
  for merged in (merge(part, none), merge(none, part)):
    jax.tree.map(np.testing.assert_array_equal, merged, part)
  jax.tree.map(np.testing.assert_array_equal, merge(none, none), none)
  total = lambda lse: merge(none, AttentionPart(none.out_BLNP, lse)).out_BLNP.sum()  # noqa: E731
  np.testing.assert_array_equal(jax.grad(total)(none.lse_BLN), 0.0)


def test_scores_too_large_for_float32_merge():
  low, high = (
    AttentionPart(jnp.full((1, 1, 1, 1), value), jnp.full((1, 1, 1), 300.0 * value))
    for value in (1.0, 2.0)
  )
  merged = merge(low, high)
  np.testing.assert_allclose(merged.out_BLNP, 2.0)
  np.testing.assert_allclose(merged.lse_BLN, 600.0)
