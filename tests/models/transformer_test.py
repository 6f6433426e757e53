import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmoe.core.backends import Chooser
from jaxmoe.core.errors import InputError
from jaxmoe.core.parallel_context import ParallelContext
from jaxmoe.core.rng import Keys
from jaxmoe.core.tokens import Tokens
from jaxmoe.models.attention import SoftmaxAttention
from jaxmoe.models.attention_experts import AttentionExperts
from jaxmoe.models.block import BlockConfig, MLPConfig, MoEConfig
from jaxmoe.models.latent_attention import LatentAttention
from jaxmoe.models.masks import CausalMask, DocumentMask, WindowMask
from jaxmoe.models.rope_scaling import LongRope, Yarn
from jaxmoe.models.stack import LayerGroup
from jaxmoe.models.transformer import Decoder, TransformerConfig
from jaxmoe.moe.dispatch import DISPATCHERS, Capacity, Dense, Dropless
from jaxmoe.moe.dispatch.capacity import Limited
from jaxmoe.moe.experts import SwiGLU
from jaxmoe.moe.routers import TopK

VOCAB, LENGTH = 11, 9
ROWS = ([4, 3], [9], [], [1, 5])
DOCUMENT = SoftmaxAttention(4, 2, 4)
LONG = LongRope((1.0, 1.5), (1.0, 9.0), original=4, long_gain=1.4)


def moe(dispatch=Dropless(), shared=0, normalize=True):  # noqa: B008
  return MoEConfig(
    5, 2, TopK(normalize=normalize), SwiGLU(mlp_dim=6), dispatch=dispatch, shared_mlp_dim=shared
  )


def decoder(*groups, **fields):
  return Decoder(TransformerConfig(dim=8, stack=groups, **fields), VOCAB)


def blocks(attention, *ffns):
  return tuple(BlockConfig(attention, ffn) for ffn in ffns)


LOCAL = SoftmaxAttention(4, 2, 4, mask=WindowMask(3))
BIASED = SoftmaxAttention(4, 2, 4, mask=WindowMask(2), bias="all", scale=0.3, sinks=True)
VARIANTS = {
  "grouped queries, dense layers with windows between": decoder(
    LayerGroup((BlockConfig(LOCAL, MLPConfig(mlp_dim=6)), BlockConfig(DOCUMENT, moe())), 2),
  ),
  "tied, a norm over each head": decoder(
    LayerGroup(
      blocks(SoftmaxAttention(2, 2, 6, qk_norm="head", rope_theta=100.0), moe(Dense())), 2
    ),
    tied=True, norm_eps=1e-2,
  ),
  "norm over all heads, a shared expert, across documents": decoder(
    LayerGroup(
      blocks(
        SoftmaxAttention(4, 2, 4, qk_norm="all", mask=CausalMask()), moe(Capacity(9.0), 3, False)
      ), 2
    )
  ),
  "biases, scores of sinks, a window between": decoder(
    LayerGroup(
      blocks(BIASED, MLPConfig(mlp_dim=6))
      + blocks(SoftmaxAttention(4, 2, 4, bias="all", sinks=True, rope=Yarn(original=8)), moe()), 2
    )
  ),
  "a norm over all heads, then a limit; biases before": decoder(
    LayerGroup(
      blocks(
        SoftmaxAttention(4, 2, 4, qk_norm="all", clip=0.6, bias="qkv", rope=LONG),
        MLPConfig(mlp_dim=6)
      ), 2
    )
  ),
  "LayerNorm, a head with a bias, parts of the stream scaled": decoder(
    LayerGroup(blocks(DOCUMENT, MLPConfig(mlp_dim=6), moe()), 1),
    norm="layer", norm_eps=1e-2, head_bias=True, embed_scale=3.0, residual_scale=0.4,
    logit_scale=0.7,
  ),
  "tied, with a bias": decoder(
    LayerGroup(blocks(DOCUMENT, MLPConfig(mlp_dim=6)), 1), tied=True, head_bias=True
  ),
  "one key head": decoder(LayerGroup(blocks(SoftmaxAttention(4, 1, 2), MLPConfig(mlp_dim=6)), 2)),
}  # fmt: skip
variant = pytest.mark.parametrize("name", VARIANTS)
MIXED = decoder(LayerGroup(blocks(DOCUMENT, MLPConfig(mlp_dim=6), moe()), 2))


@variant
def test_logits_equal_a_decoder_written_from_the_papers(
  name, oracle_logits, batch_of, perturbed_norms, forward
):
  model, batch = VARIANTS[name], batch_of(ROWS, LENGTH, VOCAB)
  params = perturbed_norms(model.init(Keys.from_seed(0)))
  logits = forward(model, params, batch)
  assert logits.dtype == jnp.float32
  right, valid = oracle_logits(model, params, batch), batch["segment"] > 0
  assert right[valid].std() > 0.3, "logits too even to tell anything"
  # Float32 through two to five layers.
  np.testing.assert_allclose(logits[valid], right[valid], rtol=1e-4, atol=2e-5)


def test_documents_packed_in_a_row_give_the_logits_of_each_alone(batch_of, forward):
  batch = batch_of(ROWS, LENGTH, VOCAB)
  params = MIXED.init(Keys.from_seed(0))
  packed = forward(MIXED, params, batch)
  for row, lengths in enumerate(ROWS):
    start = 0
    for size in lengths:
      alone = batch_of([[size]] * len(ROWS), LENGTH, VOCAB)
      alone["ids"][:, :size] = batch["ids"][row, start : start + size]
      logits = forward(MIXED, params, alone)[0, :size]
      np.testing.assert_allclose(
        packed[row, start : start + size], logits, rtol=1e-5, atol=1e-5, err_msg=f"{row} {start}"
      )
      start += size


def test_what_padding_holds_changes_nothing_and_no_sum_counts_it(batch_of):
  batch = batch_of(ROWS, LENGTH, VOCAB)
  params, valid = MIXED.init(Keys.from_seed(0)), batch["segment"] > 0

  @jax.jit
  def run(params, batch):
    def loss(params):
      hidden, _, sums = MIXED.hidden(params, Tokens.of_batch(batch))
      nll = MIXED.nll(params, hidden, batch["labels"])
      return jnp.sum(nll), (MIXED.logits(params, hidden), nll, sums)

    return jax.grad(loss, has_aux=True)(params)

  grads, (logits, nll, sums) = run(params, batch)
  moved = dict(batch, ids=np.where(valid, batch["ids"], (batch["ids"] + 3) % VOCAB))
  moved["position"] = np.where(valid, batch["position"], 77)
  other_grads, (other_logits, other_nll, other_sums) = run(params, moved)
  np.testing.assert_array_equal(logits[valid], other_logits[valid])
  jax.tree.map(np.testing.assert_array_equal, (nll, sums), (other_nll, other_sums))
  np.testing.assert_array_equal(np.asarray(nll)[~valid], 0)
  # The embedding gets the zeros of padding in other rows: the sum is still the same.
  jax.tree.map(np.testing.assert_array_equal, grads, other_grads)
  layers = sums["0"]["1"].router
  np.testing.assert_array_equal(layers.tokens, [valid.sum()] * 2)
  np.testing.assert_array_equal(np.sum(layers.counts_E, axis=1), [2 * valid.sum()] * 2)
  assert sums["0"]["0"] is None


CAUSAL_DISPATCH = {
  **{name: one for name, (_, one) in DISPATCHERS.items() if not one.looks_ahead},
  "capacity, tight": Capacity(0.5),
  "dropless, by rows": Dropless(),
}


@pytest.mark.parametrize("name", CAUSAL_DISPATCH)
def test_a_later_token_never_changes_an_earlier_output_of_its_document(name, batch_of):
  chooser = Chooser(names=(("expert_mlp", "rows"),) if "by rows" in name else ())
  config = TransformerConfig(8, (LayerGroup(blocks(DOCUMENT, moe(CAUSAL_DISPATCH[name])), 2),))
  model = Decoder(config, VOCAB, ParallelContext(chooser=chooser))
  params, batch = model.init(Keys.from_seed(0)), batch_of([[6, 9], [15]], 16, VOCAB)
  rng, trials = np.random.default_rng(1), 200
  row, at = rng.integers(0, 2, trials), rng.integers(0, 15, trials)
  slot = np.arange(16)
  here = (np.arange(2)[None, :] == row[:, None])[:, :, None]
  later = here & (slot >= at[:, None, None])
  same_document = batch["segment"] == batch["segment"][row, at][:, None, None]
  noise = rng.integers(1, VOCAB, (trials, 2, 16))
  ids = np.where(later, (batch["ids"] + noise) % VOCAB, batch["ids"])
  ids = np.concatenate([batch["ids"][None], ids])

  @jax.jit
  def run(ids):
    tokens = Tokens.of_batch(batch)
    once = lambda ids: model.hidden(  # noqa: E731
      params, Tokens(ids, tokens.position, tokens.segment, tokens.slot)
    )[0]
    return jax.lax.map(once, ids)

  y = np.asarray(run(jnp.asarray(ids, jnp.int32)))
  changed = np.any(y[1:] != y[:1], axis=-1)
  assert not (changed & here & ~later).any()
  assert (changed & later & same_document).any(axis=(1, 2)).mean() > 0.9
  if not isinstance(CAUSAL_DISPATCH[name], Limited):
    # Nothing outside of the row, and within it no document that was not touched.
    assert not (changed & ~here).any()

  @jax.jit
  def slope(x):
    early = lambda x: jnp.sum(model.blocks(params, x, Tokens.of_batch(batch))[0][:, :4])  # noqa: E731
    return jax.grad(early)(x)

  x = model.embed(params, jnp.asarray(batch["ids"]))
  np.testing.assert_array_equal(slope(x)[:, 4:], 0)
  assert np.abs(slope(x)[:, :4]).min(axis=-1).max() > 0


def test_an_earlier_document_of_the_row_changes_nothing_under_the_document_mask(batch_of, forward):
  batch = batch_of(ROWS, LENGTH, VOCAB)
  params = MIXED.init(Keys.from_seed(0))
  before = np.asarray(forward(MIXED, params, batch))
  batch["ids"][0, :4] = (batch["ids"][0, :4] + 1) % VOCAB
  after = np.asarray(forward(MIXED, params, batch))
  np.testing.assert_array_equal(before[0, 4:], after[0, 4:])
  assert (before[0, :4] != after[0, :4]).all()


LOSSES = [*list(VARIANTS)[:2], *(name for name in VARIANTS if "a bias" in name)]


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("chunk", [1000, 5])
def test_nll_equals_the_loss_of_all_logits(name, chunk, batch_of, perturbed_norms):
  model = Decoder(dataclasses.replace(VARIANTS[name].config, loss_chunk=chunk), VOCAB)
  params = perturbed_norms(model.init(Keys.from_seed(0)))
  batch = batch_of(ROWS, LENGTH, VOCAB)
  hidden = jax.random.normal(jax.random.key(1), (len(ROWS), LENGTH, 8))
  logits = np.asarray(model.logits(params, hidden), np.float64)
  log_probs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
  labels = batch["labels"]
  right = -np.take_along_axis(log_probs, np.maximum(labels, 0)[..., None], -1)[..., 0]
  nll = jax.jit(model.nll)(params, hidden, jnp.asarray(labels))
  np.testing.assert_allclose(nll, np.where(labels < 0, 0, right), rtol=1e-5, atol=1e-6)


def test_an_id_outside_the_vocabulary_gives_nan_and_not_another_row():
  params = MIXED.init(Keys.from_seed(0))
  x = MIXED.embed(params, jnp.array([[0, VOCAB - 1, VOCAB, 10**6]]))
  np.testing.assert_array_equal(np.isnan(x).any(-1), [[False, False, True, True]])
  np.testing.assert_array_equal(x[0, 1], params["embed"]["table"][VOCAB - 1])


def test_numbers_of_parameters_follow_the_formula():
  dim, heads, kv_heads, size, hidden, experts, shared = 8, 4, 2, 4, 6, 5, 3
  attention = 2 * dim * heads * size + 2 * dim * kv_heads * size
  dense = 3 * dim * hidden
  mixed = dim * experts + experts * dense + 3 * dim * shared
  stack = (LayerGroup(blocks(DOCUMENT, MLPConfig(mlp_dim=6), moe(shared=3)), 3),)
  for tied in (True, False):
    model = decoder(*stack, tied=tied)
    embedding = VOCAB * dim * (1 if tied else 2)
    norms = 6 * 2 * dim + dim
    assert model.num_params == embedding + norms + 3 * (2 * attention + dense + mixed)
  active = 3 * (2 * attention + dense + dim * experts + 2 * dense + 3 * dim * shared)
  assert model.config.active_params() == active
  assert model.config.num_layers == 6
  visible = (10 + 1) / 2
  flops = 6 * (active + dim * VOCAB) + 12 * 6 * heads * size * visible
  assert model.config.train_flops_per_token(VOCAB, 10) == flops
  normed = decoder(
    LayerGroup(blocks(SoftmaxAttention(4, 2, 4, qk_norm="all"), MLPConfig(mlp_dim=6)), 1)
  )
  each = decoder(
    LayerGroup(blocks(SoftmaxAttention(4, 2, 4, qk_norm="head"), MLPConfig(mlp_dim=6)), 1)
  )
  plain = decoder(LayerGroup(blocks(DOCUMENT, MLPConfig(mlp_dim=6)), 1))
  assert normed.num_params - plain.num_params == (heads + kv_heads) * size
  assert each.num_params - plain.num_params == 2 * size


def test_dims_and_names_match_the_parameters():
  for model in VARIANTS.values():
    jax.tree.map(
      lambda leaf, dims, name: len(leaf.shape) == len(dims) or pytest.fail(name),
      model.shapes, model.dims, model.parameter_names,
    )  # fmt: skip
    shapes = jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), model.init(Keys.from_seed(0)))
    assert shapes == jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), model.shapes)


@pytest.mark.parametrize(
  "make, message",
  [
    (lambda: SoftmaxAttention(num_heads=4, num_kv_heads=3), "multiple of num_kv_heads"),
    (lambda: SoftmaxAttention(num_heads=0), "must be at least 1"),
    (lambda: SoftmaxAttention(head_dim=5), "must be even"),
    (lambda: SoftmaxAttention(rope_theta=1.0), "must be above 1"),
    (lambda: SoftmaxAttention(clip=0.0), "clip must be above 0"),
    (lambda: SoftmaxAttention(scale=-1.0), "scale must be above 0"),
    (lambda: AttentionExperts(heads=SoftmaxAttention(sinks=True)), "without biases and sinks"),
    (lambda: AttentionExperts(heads=SoftmaxAttention(bias="qkv")), "without biases and sinks"),
    (lambda: LatentAttention(latent_dim=0), "at least 1"),
    (lambda: LatentAttention(query_dim=0), "query_dim=none"),
    (lambda: LatentAttention(rope_dim=5), "rope_dim must be even"),
    (lambda: LatentAttention(rope_theta=1.0), "rope_theta must be above 1"),
    (lambda: LatentAttention(rope=LONG), "each of the 32 pairs"),
    (lambda: MLPConfig(mlp_dim=0), "at least 1"),
    (lambda: SwiGLU(mlp_dim=0), "at least 1"),
    (lambda: MoEConfig(num_experts=8, num_active=99), "num_active must lie between"),
    (lambda: MoEConfig(num_active=0), "num_active must lie between"),
    (lambda: MoEConfig(shared_mlp_dim=-1), "must not be negative"),
    (lambda: Capacity(factor=0.0), "must be above 0"),
    (lambda: WindowMask(size=0), "at least 1"),
    (lambda: LayerGroup(repeats=0), "at least 1"),
    (lambda: LayerGroup(pattern=()), "at least one block"),
    (lambda: TransformerConfig(stack=()), "at least one layer group"),
    (lambda: TransformerConfig(dim=0), "at least 1"),
    (lambda: TransformerConfig(norm_eps=0.0), "norm_eps above 0"),
    (
      lambda: TransformerConfig(residual_scale=0.0),
      "residual_scale and logit_scale must be above 0",
    ),
  ],
)
def test_a_size_that_cannot_be_is_refused(make, message):
  with pytest.raises(InputError, match=message):
    make()


def test_the_default_mask_is_by_document():
  assert SoftmaxAttention().mask == DocumentMask()


def test_calling_a_model_gives_the_logits_that_scoring_reads_bit_for_bit():
  ids = jnp.asarray(np.random.default_rng(0).integers(0, VOCAB, (2, LENGTH)), jnp.int32)
  params = MIXED.init(Keys.from_seed(0))

  @jax.jit
  def score(params, ids):
    hidden, _, _ = MIXED.hidden(params, Tokens.of_ids(ids))
    return MIXED.nll(params, hidden, ids), MIXED.logits(params, hidden)

  np.testing.assert_array_equal(jax.jit(MIXED)(params, ids), score(params, ids)[1])
