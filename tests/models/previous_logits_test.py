"""Gates that read the logits of the layer before, through stacks and generation."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmoe.core import param_names
from jaxmoe.core.errors import InputError
from jaxmoe.core.rng import Keys
from jaxmoe.core.tokens import Tokens
from jaxmoe.models.attention import SoftmaxAttention
from jaxmoe.models.block import BlockConfig, MLPConfig, MoEConfig
from jaxmoe.models.stack import LayerGroup
from jaxmoe.models.transformer import Decoder, TransformerConfig
from jaxmoe.moe.dispatch import Dense
from jaxmoe.moe.experts import SwiGLU
from jaxmoe.moe.routers import TopK
from jaxmoe.moe.routers.gates import ResidualGateConfig

VOCAB, ROWS, LENGTH = 11, ([4, 1], [6]), 6
RESIDUAL = MoEConfig(5, 2, TopK(gate=ResidualGateConfig()), SwiGLU(mlp_dim=4), Dense())
OTHER = MoEConfig(3, 1, TopK(normalize=False), SwiGLU(mlp_dim=4), Dense())
BLOCKS = tuple(
  BlockConfig(SoftmaxAttention(2, 1, 4), ffn) for ffn in (RESIDUAL, MLPConfig(mlp_dim=6), OTHER)
)
MODEL = TransformerConfig(dim=8, stack=(LayerGroup(BLOCKS, 2), LayerGroup(BLOCKS[:1], 1)))


def w_g(tree):
  """Returns W_g, or what belongs to it, of the three residual layers."""
  flat = {path: leaf for path, leaf in param_names.flatten(tree).items() if "gate/residual" in path}
  return np.concatenate([np.asarray(leaf) for leaf in flat.values()])


@pytest.fixture(scope="module")
def params():
  def at(path, leaf):
    rng = np.random.default_rng(len(jax.tree_util.keystr(path)))
    noise = jnp.asarray(rng.normal(0, 0.7, leaf.shape), leaf.dtype)
    return leaf + noise if getattr(path[-1], "key", "") == "residual" else leaf

  fresh = Decoder(MODEL, VOCAB).init(Keys.from_seed(0))
  assert not w_g(fresh).any()
  return jax.tree_util.tree_map_with_path(at, fresh)


@pytest.mark.parametrize("scan", [True, False])
def test_logits_pass_dense_layers_and_other_gates_to_the_next_residual_one(
  params, oracle_logits, batch_of, forward, scan
):
  decoder = Decoder(dataclasses.replace(MODEL, scan=scan), VOCAB)
  batch = batch_of(ROWS, LENGTH, VOCAB)
  valid = batch["segment"] > 0
  right = oracle_logits(decoder, params, batch)
  np.testing.assert_allclose(
    forward(decoder, params, batch)[valid], right[valid], rtol=1e-4, atol=2e-5
  )
  still = jax.tree_util.tree_map_with_path(
    lambda path, leaf: 0 * leaf if getattr(path[-1], "key", "") == "residual" else leaf, params
  )
  assert np.abs(oracle_logits(decoder, still, batch) - right)[valid].max() > 0.1


def test_the_first_layer_has_no_residual_and_the_others_learn_theirs(params, batch_of):
  decoder, batch = Decoder(MODEL, VOCAB), batch_of(ROWS, LENGTH, VOCAB)

  def loss(params):
    hidden, _, _ = decoder.hidden(params, Tokens.of_batch(batch))
    return jnp.sum(decoder.nll(params, hidden, batch["labels"]))

  grads = w_g(jax.jit(jax.grad(loss))(params))
  assert len(grads) == 3
  np.testing.assert_array_equal(grads[0], 0)
  assert (np.abs(grads[1:]).max((1, 2)) > 1e-3).all()


def test_a_token_at_a_time_gives_the_logits_of_the_whole_row(params, batch_of, forward):
  decoder, batch = Decoder(MODEL, VOCAB), batch_of(([LENGTH], [LENGTH]), LENGTH, VOCAB)
  whole, tokens = forward(decoder, params, batch), Tokens.of_batch(batch)

  @jax.jit
  def step(caches, tokens):
    hidden, caches, _ = decoder.hidden(params, tokens, caches)
    return decoder.logits(params, hidden)[:, 0], caches

  caches = decoder.empty_caches(2, LENGTH)
  for at in range(LENGTH):
    one = jax.tree.map(lambda leaf, at=at: leaf[:, at : at + 1], tokens)
    logits, caches = step(caches, one)
    np.testing.assert_allclose(logits, whole[:, at], rtol=1e-4, atol=1e-5)


def test_residual_gates_over_different_numbers_of_experts_are_refused():
  wide = BlockConfig(BLOCKS[0].attention, dataclasses.replace(RESIDUAL, num_experts=6))
  with pytest.raises(InputError, match=r"one number of open experts .* \[5, 6\]"):
    TransformerConfig(dim=8, stack=(LayerGroup((BLOCKS[0], wide), 1),))
