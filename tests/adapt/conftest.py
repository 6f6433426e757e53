"""What the tests of surgery share: one small model of mixed blocks, and its logits."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmoe.core import param_names
from jaxmoe.core.rng import Keys
from jaxmoe.core.tokens import Tokens
from jaxmoe.models.attention import SoftmaxAttention
from jaxmoe.models.block import BlockConfig, MLPConfig, MoEConfig
from jaxmoe.models.stack import LayerGroup
from jaxmoe.models.transformer import Decoder, TransformerConfig
from jaxmoe.moe.experts import SwiGLU
from jaxmoe.moe.routers import TopK

VOCAB = 11


def make_model(ffn=None, **moe):
  """Returns dense, MoE, dense, MoE, MoE: a pattern that repeats, and a layer group of its own."""
  attention = SoftmaxAttention(num_heads=1, num_kv_heads=1, head_dim=4)
  moe = MoEConfig(**{"num_experts": 5, "num_active": 2, "experts": SwiGLU(mlp_dim=12)} | moe)
  dense = BlockConfig(attention, MLPConfig(mlp_dim=12))
  sparse = dataclasses.replace(dense, ffn=moe if ffn is None else ffn)
  return TransformerConfig(dim=12, stack=(LayerGroup((dense, sparse), 2), LayerGroup((sparse,), 1)))


MODEL = make_model()


@pytest.fixture(scope="session")
def logits_of():
  """Returns a function (decoder, params, ids) -> (logits, {depth: counts of choices})."""

  def run(decoder, params, ids):
    def forward(params, ids):
      tokens = Tokens.of_ids(ids)
      hidden, _, sums = decoder.hidden(params, tokens)
      counts = param_names.by_layer(sums, decoder.layer_groups)
      return decoder.logits(params, hidden), {d: of.router.counts_E for d, of in counts.items()}

    return jax.device_get(jax.jit(forward)(params, jnp.asarray(ids)))

  return run


@pytest.fixture(scope="session")
def patient():
  """Returns (decoder, parameters) of the model, not at their first values."""
  decoder = Decoder(MODEL, VOCAB)
  params = decoder.init(Keys.from_seed(3))
  noise = np.random.default_rng(0)
  move = lambda leaf: leaf + jnp.asarray(noise.normal(size=leaf.shape) * 0.1, leaf.dtype)  # noqa: E731
  return decoder, jax.tree.map(move, params)


@pytest.fixture(scope="session")
def by_name():
  """Returns a function (tree, decoder) -> {canonical name: NumPy array}."""

  def run(tree, decoder):
    named = param_names.unstack(param_names.flatten(tree), decoder.layer_groups)
    return {name: np.asarray(leaf) for name, leaf in named.items()}

  return run


@pytest.fixture(scope="session")
def model():
  """Returns `make_model`."""
  return make_model


@pytest.fixture(scope="session")
def top_k():
  """Returns routers for which a surgery keeps outputs, by what their weights sum to."""
  return {
    "normalised": TopK(), "bare softmax": TopK(normalize=False),
    "bare sigmoid": TopK(score="sigmoid", normalize=False),
    "normalised sigmoid": TopK(score="sigmoid", scale=2.0),
  }  # fmt: skip
