import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmoe.core.rng import Keys
from jaxmoe.core.tokens import Tokens
from jaxmoe.models.attention import SoftmaxAttention
from jaxmoe.models.block import BlockConfig, MLPConfig, MoEConfig
from jaxmoe.models.latent_attention import LatentAttention
from jaxmoe.models.masks import WindowMask
from jaxmoe.models.rope_scaling import DynamicRope, LongRope, Yarn
from jaxmoe.models.stack import LayerGroup
from jaxmoe.models.transformer import Decoder, TransformerConfig
from jaxmoe.moe.experts import SwiGLU

VOCAB, SLOTS, LENGTHS = 11, 14, (12, 8)
MOE = MoEConfig(5, 2, experts=SwiGLU(mlp_dim=6), shared_mlp_dim=3)
LOCAL = SoftmaxAttention(4, 2, 4, qk_norm="head", mask=WindowMask(3))
STACK = (
  LayerGroup(
    (BlockConfig(LOCAL, MLPConfig(mlp_dim=6)), BlockConfig(SoftmaxAttention(4, 2, 4), MOE)), 2
  ),
)
# Float32 sums over keys in rows of other lengths.
CLOSE = {"rtol": 1e-4, "atol": 1e-4}


@dataclasses.dataclass(frozen=True)
class Model:
  decoder: Decoder
  params: dict
  ids: np.ndarray
  full: np.ndarray


@functools.lru_cache(maxsize=1)
def compiled_chunk(decoder):
  @jax.jit
  def run(params, tokens, caches):
    hidden, caches, _ = decoder.hidden(params, tokens, caches)
    return decoder.logits(params, hidden), caches

  return run


@pytest.fixture(scope="module")
def model(forward):
  """An untied decoder and its logits without a cache."""
  return whole(TransformerConfig(dim=8, stack=STACK), forward)


def whole(config, forward, perturb=lambda params: params):
  """Returns the decoder of a record and the logits of two rows of unequal length."""
  decoder = Decoder(config, VOCAB)
  params = perturb(decoder.init(Keys.from_seed(0)))
  ids = np.random.default_rng(0).integers(0, VOCAB, (2, SLOTS)).astype(np.int32)
  slot = np.broadcast_to(np.arange(SLOTS, dtype=np.int32), ids.shape)
  segment = (slot < np.array(LENGTHS)[:, None]).astype(np.int32)
  full = forward(decoder, params, {"ids": ids, "position": slot, "segment": segment})
  return Model(decoder, params, ids, np.asarray(full))


def chunk_of(ids, starts, lengths, width):
  """Returns the tokens [start, start + length) of each row, padded on the right to `width`."""
  slot = np.array(starts)[:, None] + np.arange(width)
  segment = (np.arange(width) < np.array(lengths)[:, None]).astype(np.int32)
  # Padding holds an id and a slot of its own, which must not matter.
  chosen = np.take_along_axis(ids, np.minimum(slot, ids.shape[1] - 1), axis=1)
  fields = (chosen, slot, segment, slot)
  return Tokens(*(jnp.asarray(field, jnp.int32) for field in fields))


def generate(model, prefill, corrupt=lambda caches: caches):
  """Returns {(row, slot): logits}: a prefill of each row, then a token at a time."""
  run, found = compiled_chunk(model.decoder), {}
  caches = model.decoder.empty_caches(2, SLOTS)
  starts, lengths, width = [0, 0], [min(prefill, length) for length in LENGTHS], prefill
  while any(lengths):
    tokens = chunk_of(model.ids, starts, lengths, width)
    logits, caches = run(model.params, tokens, caches)
    for row in range(2):
      found |= {(row, starts[row] + at): np.asarray(logits[row, at]) for at in range(lengths[row])}
    if starts == [0, 0]:
      caches = corrupt(caches)
    starts = [start + length for start, length in zip(starts, lengths, strict=True)]
    lengths = [int(start < end) for start, end in zip(starts, LENGTHS, strict=True)]
    width = 1
  return found


def by_slot(caches):
  """Returns the leaves of caches as (repeats, B, S, ...)."""
  return [leaf.swapaxes(2, 3) if leaf.ndim == 5 else leaf for leaf in jax.tree.leaves(caches)]


def worst(model, found):
  assert found.keys() == {(row, at) for row in range(2) for at in range(LENGTHS[row])}
  return max(np.abs(logits - model.full[place]).max() for place, logits in found.items())


@pytest.mark.parametrize("prefill", [1, 5, 10])
def test_a_prefill_and_then_token_by_token_equals_the_whole_row(model, prefill):
  for (row, at), logits in generate(model, prefill).items():
    np.testing.assert_allclose(logits, model.full[row, at], **CLOSE, err_msg=f"{row} {at}")


FULL = SoftmaxAttention(4, 2, 4)
# Rows are past the original length of either, and the prompt is not.
STRETCHED = (DynamicRope(original=6), LongRope((1.0, 1.5), (1.0, 9.0), original=6, long_gain=1.4))
LATENT = LatentAttention(
  3, head_dim=6, rope_dim=4, value_dim=5, latent_dim=7, query_dim=None, rope=Yarn(original=8)
)
VARIANTS = {
  "latents, a window between": TransformerConfig(
    dim=8,
    stack=(
      LayerGroup(
        tuple(
          BlockConfig(dataclasses.replace(LATENT, mask=mask), MLPConfig(6))
          for mask in (WindowMask(3), LATENT.mask)
        ), 2,
      ),
    ),
  ),
  "angles that depend on the room of a row": TransformerConfig(
    dim=8,
    stack=(
      LayerGroup(
        tuple(BlockConfig(SoftmaxAttention(4, 2, 4, rope=r), MLPConfig(6)) for r in STRETCHED)
      ),
    ),
  ),
  "biases, a limit, sinks, a window between, scales and LayerNorm": TransformerConfig(
    dim=8, norm="layer", embed_scale=2.0, residual_scale=0.5, logit_scale=0.7, head_bias=True,
    stack=(
      LayerGroup(
        tuple(
          BlockConfig(
            SoftmaxAttention(4, 2, 4, mask=mask, bias="all", clip=0.9, scale=0.4, sinks=True),
            MLPConfig(6),
          )
          for mask in (WindowMask(2), FULL.mask)
        ), 2,
      ),
    ),
  ),
}  # fmt: skip


@pytest.mark.parametrize("name", VARIANTS)
def test_every_variant_writes_token_by_token_what_the_whole_row_gives(
  name, forward, perturbed_norms
):
  model = whole(VARIANTS[name], forward, perturbed_norms)
  for (row, at), logits in generate(model, 5).items():
    np.testing.assert_allclose(logits, model.full[row, at], **CLOSE, err_msg=f"{row} {at}")


@pytest.mark.parametrize("field", ["k_BKSH", "v_BKSH", "segment_BS"])
def test_a_corrupted_cache_is_seen_in_the_logits(model, field):
  def corrupt(caches):
    cache = caches["0"]["1"]
    if field == "segment_BS":
      moved = cache.segment_BS.at[:, :, 2].add(1)
    else:
      moved = getattr(cache, field).at[:, :, :, 2].add(1.0)
    cache = dataclasses.replace(cache, **{field: moved})
    return {"0": {**caches["0"], "1": cache}}

  assert worst(model, generate(model, 5, corrupt)) > 100 * CLOSE["atol"]
  assert worst(model, generate(model, 5)) < CLOSE["atol"]


def test_padding_writes_nothing_into_a_cache(model):
  run = compiled_chunk(model.decoder)
  empty = model.decoder.empty_caches(2, SLOTS)
  _, caches = run(model.params, chunk_of(model.ids, [0, 0], [5, 3], 5), empty)
  for cache in jax.tree.leaves(caches, is_leaf=lambda node: hasattr(node, "k_BKSH")):
    for leaf in by_slot(cache):
      np.testing.assert_array_equal(leaf[:, 0, 5:], 0)
      np.testing.assert_array_equal(leaf[:, 1, 3:], 0)
    np.testing.assert_array_equal(np.sum(cache.segment_BS, axis=2), [[5, 3]] * len(leaf))
    assert (np.abs(cache.k_BKSH[:, 1, :, :3]).max(axis=(1, 3)) > 0).all()
  _, after = run(model.params, chunk_of(model.ids, [5, 3], [0, 0], 5), caches)
  jax.tree.map(np.testing.assert_array_equal, caches, after)


def test_a_token_past_the_last_slot_is_dropped_and_overwrites_nothing(model):
  run = compiled_chunk(model.decoder)
  empty = model.decoder.empty_caches(2, SLOTS)
  _, after = run(model.params, chunk_of(model.ids, [SLOTS, SLOTS], [5, 5], 5), empty)
  jax.tree.map(np.testing.assert_array_equal, empty, after)


def test_with_a_cache_a_later_token_never_changes_an_earlier_output(model):
  run, at = compiled_chunk(model.decoder), 3
  empty = model.decoder.empty_caches(2, SLOTS)
  before, kept = run(model.params, chunk_of(model.ids, [0, 0], [5, 5], 5), empty)
  moved = model.ids.copy()
  moved[:, at:] = (moved[:, at:] + 1) % VOCAB
  after, other = run(model.params, chunk_of(moved, [0, 0], [5, 5], 5), empty)
  np.testing.assert_array_equal(before[:, :at], after[:, :at])
  assert (np.asarray(before[:, at:]) != np.asarray(after[:, at:])).any(axis=-1).all()
  for one, two in zip(by_slot(kept), by_slot(other), strict=True):
    np.testing.assert_array_equal(one[:, :, :at], two[:, :, :at])


def test_the_rows_of_a_batch_do_not_see_each_other(model):
  run = compiled_chunk(model.decoder)
  empty = model.decoder.empty_caches(2, SLOTS)
  before, _ = run(model.params, chunk_of(model.ids, [0, 0], [5, 5], 5), empty)
  moved = model.ids.copy()
  moved[0] = (moved[0] + 1) % VOCAB
  after, _ = run(model.params, chunk_of(moved, [0, 0], [5, 5], 5), empty)
  np.testing.assert_array_equal(before[1], after[1])
