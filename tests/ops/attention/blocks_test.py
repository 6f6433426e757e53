"""Softmax in blocks visits what is seen, as counted by hand, and holds memory linear in length."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmoe.core.tokens import Tokens
from jaxmoe.models.masks import CausalMask, DocumentMask, WindowMask
from jaxmoe.ops.attention import BACKENDS, Sight, reference
from jaxmoe.ops.attention.blocks import Blocks, blocks
from jaxmoe.ops.attention.seen_blocks import cut_spans, seen_blocks, visits

LONG, DOCUMENT = 8192, 512
LAYER = (1, LONG, 8, 64)


def sight_of(mask, segment):
  segment = jnp.asarray(segment, jnp.int32)
  slot = jnp.broadcast_to(jnp.arange(segment.shape[1], dtype=jnp.int32), segment.shape)
  tokens = Tokens(slot, slot, segment, slot)
  return mask(tokens, tokens)


def visited(mask, segment, cut):
  _, number_Bi = visits(seen_blocks(*cut_spans(sight_of(mask, segment).spans, *cut[:2])))
  return np.asarray(number_Bi)


def test_blocks_are_visited_as_counted_by_hand():
  cut = Blocks.of(LAYER, LAYER)
  assert cut == (128, 128, 2)
  documents = np.arange(LONG)[None] // DOCUMENT + 1
  # A document of 4 blocks: its queries visit 1, 2, 3 and 4 of them. One of 64 blocks: 1 to 64.
  assert visited(DocumentMask(), documents, cut).tolist() == [[1, 2, 3, 4] * 16]
  assert visited(DocumentMask(), 0 * documents + 1, cut).tolist() == [list(range(1, 65))]
  assert visited(CausalMask(), documents, cut).sum() == 64 * 65 / 2
  # A window of 129: the first query of a block sees one key of the block before the last one.
  assert visited(WindowMask(129), 0 * documents + 1, cut).tolist() == [[1] + [2] * 63]
  assert visited(WindowMask(130), 0 * documents + 1, cut).tolist() == [[1, 2] + [3] * 62]
  assert visited(WindowMask(1), documents, cut).tolist() == [[1] * 64]
  # Each row of a batch by itself; padding visits nothing.
  rows = np.concatenate([documents, 0 * documents, 0 * documents + 1])
  assert visited(DocumentMask(), rows, cut).sum(axis=1).tolist() == [160, 0, 2080]


def test_heads_that_share_a_key_are_rows_of_one_product_and_short_rows_have_small_blocks():
  assert Blocks.of((1, LONG, 64, 64), (1, LONG, 8, 64)) == (16, 128, 2)
  assert Blocks.of((1, 256, 8, 64), (1, 256, 8, 64)) == (64, 64, 8)
  assert Blocks.of((1, 3, 4, 8), (1, 5, 2, 8)) == (3, 5, 2)


@pytest.mark.parametrize("which", ["values", "gradients"])
def test_a_block_that_nobody_sees_is_not_visited(which):
  """What it holds is no number, which 0 times it would not be either."""
  segment = np.array([[1] * 8 + [0] * 8 + [2] * 8])
  sight = sight_of(DocumentMask(), segment)
  rng = np.random.default_rng(0)
  q, k, v = (jnp.asarray(rng.normal(size=(1, 24, 2, 4)), jnp.float32) for _ in range(3))
  broken = [x.at[:, 8:16].set(jnp.nan) for x in (k, v)]

  def loss(q, k, v):
    return jnp.sum(jnp.sin(blocks(q, k, v, sight, Blocks(4, 4, 1)).out_BLNP))

  run = jax.jit(loss if which == "values" else jax.grad(loss, (0, 1, 2)))
  right, found = run(q, k, v), run(q, *broken)
  jax.tree.map(np.testing.assert_array_equal, found, right)
  # The other way round it would show: document 2 sees its own blocks.
  assert np.isnan(loss(q, k.at[:, 17].set(jnp.nan), v))


def test_temporaries_are_linear_in_length():
  def temporary(name, length):
    def loss(q, k, v, weight, spans):
      return jnp.sum(BACKENDS[name](q, k, v, Sight(*spans, 0.125)).out_BLNP * weight)

    arrays = [jax.ShapeDtypeStruct((1, length, *LAYER[2:]), jnp.float32)] * 4
    spans = (jax.ShapeDtypeStruct((1, length), jnp.int32),) * 3
    run = jax.jit(jax.value_and_grad(loss, (0, 1, 2)))
    return run.lower(*arrays, spans).compile().memory_analysis().temp_size_in_bytes

  assert temporary("blocks", LONG) <= 192 * 2**20
  assert temporary("blocks", 4 * LONG) <= 4.1 * temporary("blocks", LONG)
  assert temporary("reference", LONG) > 8 * LONG * LONG * 4


def test_the_gradient_of_the_log_sum_exp_is_that_of_the_reference():
  sight = sight_of(WindowMask(5), np.array([[1] * 9 + [2] * 6]))
  rng = np.random.default_rng(3)
  arrays = [jnp.asarray(rng.normal(size=(1, 15, heads, 4)), jnp.float32) for heads in (4, 2, 2)]
  weight = jnp.asarray(rng.normal(size=(1, 15, 4)), jnp.float32)

  def grads(attend):
    return jax.grad(lambda *x: jnp.sum(attend(*x, sight).lse_BLN * weight), (0, 1, 2))(*arrays)

  small = lambda *x: blocks(*x, Blocks(4, 4, 1))  # noqa: E731
  for one, other in zip(grads(small), grads(reference), strict=True):
    np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)
