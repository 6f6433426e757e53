"""Attention beside that of transformers, with the same weights: what is added by families."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxmoe.core.init import Init
from jaxmoe.core.rng import Keys
from jaxmoe.core.tokens import Tokens
from jaxmoe.models.attention import SoftmaxAttention
from jaxmoe.models.cache import NoCache
from jaxmoe.models.latent_attention import LatentAttention
from jaxmoe.models.masks import DocumentMask, WindowMask
from jaxmoe.models.rope_scaling import PlainRope, Yarn

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
pytestmark = pytest.mark.filterwarnings("ignore")

D, L, THETA = 12, 20, 1e4


@functools.cache
def drawn(config):
  """Returns a module and its leaves, none of them zero."""
  layer = config.build(Init(Keys.from_seed(1)), D, 1e-6)
  rng = np.random.default_rng(2)
  move = lambda leaf: leaf + rng.normal(size=leaf.shape).astype(np.float32) * 0.4  # noqa: E731
  state = jax.tree.map(lambda leaf: jnp.asarray(move(np.asarray(leaf))), nnx.state(layer))
  return nnx.merge(nnx.graphdef(layer), state)


def ours(config, x):
  tokens = Tokens.of_ids(jnp.zeros(x.shape[:2], jnp.int32))
  return np.asarray(drawn(config)(jnp.asarray(x, jnp.float32), tokens, NoCache())[0])


def tensor(leaf, *shape):
  return torch.tensor(np.asarray(leaf.get_value()).reshape(shape))




def mask_of(window):
  query, key = np.indices((L, L))
  seen = (key <= query) & (query - key < window)
  return torch.tensor(np.where(seen, 0.0, -1e30).astype(np.float32))[None, None]


def rope_of(rope, theta=THETA):
  if isinstance(rope, PlainRope):
    return {"rope_type": "default", "rope_theta": theta}
  fields = {"factor": rope.factor, "original_max_position_embeddings": rope.original}
  if rope.mscale_all:
    fields |= {"mscale": rope.mscale, "mscale_all_dim": rope.mscale_all}
  return {"rope_type": "yarn", "rope_theta": theta, "truncate": rope.truncate, **fields}


def draw():
  return np.random.default_rng(3).normal(size=(2, L, D)).astype(np.float32)


@pytest.mark.parametrize("window", [L, 3])
def test_biases_sinks_windows_and_yarn_are_those_of_gpt_oss(window):
  from transformers import GptOssConfig
  from transformers.models.gpt_oss import modeling_gpt_oss as public

  mask = WindowMask(window) if window < L else DocumentMask()
  yarn = Yarn(8.0, original=8, truncate=False)
  config = SoftmaxAttention(4, 2, 8, bias="all", sinks=True, mask=mask, rope=yarn, rope_theta=THETA)
  layer = drawn(config)
  of = GptOssConfig(
    hidden_size=D, head_dim=8, num_attention_heads=4, num_key_value_heads=2, num_hidden_layers=1,
    rope_parameters=rope_of(yarn), attn_implementation="eager", max_position_embeddings=64,
  )  # fmt: skip
  theirs = public.GptOssAttention(of, 0).eval()
  with torch.no_grad():
    for name in "qkv":
      proj = getattr(theirs, f"{name}_proj")
      proj.weight.copy_(tensor(getattr(layer, name), D, -1).T)
      proj.bias.copy_(tensor(getattr(layer, f"{name}_bias"), -1))
    theirs.o_proj.weight.copy_(tensor(layer.o, -1, D).T)
    theirs.o_proj.bias.copy_(tensor(layer.o_bias, -1))
    theirs.sinks.copy_(tensor(layer.sink_bias, -1))
    x = torch.tensor(draw())
    turns = public.GptOssRotaryEmbedding(of)(x, torch.arange(L)[None])
    right = theirs(x, turns, mask_of(window))[0].numpy()
  assert right.std() > 0.3
  np.testing.assert_allclose(ours(config, draw()), right, rtol=1e-4, atol=2e-5)


LATENT = {"num_heads": 3, "head_dim": 6, "rope_dim": 4, "value_dim": 5, "latent_dim": 7}


@pytest.mark.parametrize(
  "config",
  [
    LatentAttention(**LATENT, query_dim=8),
    LatentAttention(**LATENT, query_dim=None, neighbours=False),
    LatentAttention(**LATENT, query_dim=8, rope=Yarn(8.0, 8, mscale=1.0, mscale_all=0.7)),
  ],
  ids=["queries of latents", "queries of x", "yarn"],
)
def test_latent_attention_is_that_of_deepseek_v3(config):
  from transformers import DeepseekV3Config
  from transformers.models.deepseek_v3 import modeling_deepseek_v3 as public

  layer = drawn(config)
  of = DeepseekV3Config(
    hidden_size=D, num_attention_heads=3, num_key_value_heads=3, q_lora_rank=config.query_dim,
    kv_lora_rank=7, qk_nope_head_dim=6, qk_rope_head_dim=4, v_head_dim=5, num_hidden_layers=1,
    rope_parameters=rope_of(config.rope), rope_interleave=config.neighbours,
    attn_implementation="eager", max_position_embeddings=64,
  )  # fmt: skip
  theirs = public.DeepseekV3Attention(of, 0).eval()
  joined = lambda leaves, axis: torch.cat(leaves, dim=axis)  # noqa: E731
  with torch.no_grad():
    if config.query_dim is None:
      theirs.q_proj.weight.copy_(tensor(layer.q, D, -1).T)
    else:
      theirs.q_a_proj.weight.copy_(tensor(layer.q_down, D, -1).T)
      theirs.q_a_layernorm.weight.copy_(tensor(layer.q_norm.scale, -1))
      theirs.q_b_proj.weight.copy_(tensor(layer.q, 8, -1).T)
    down = joined([tensor(layer.down, D, -1), tensor(layer.k_rope, D, -1)], 1)
    theirs.kv_a_proj_with_mqa.weight.copy_(down.T)
    theirs.kv_a_layernorm.weight.copy_(tensor(layer.norm.scale, -1))
    up = joined([tensor(layer.k, 7, 3, 6), tensor(layer.v, 7, 3, 5)], 2)
    theirs.kv_b_proj.weight.copy_(up.reshape(7, -1).T)
    theirs.o_proj.weight.copy_(tensor(layer.o, -1, D).T)
    x = torch.tensor(draw())
    turns = public.DeepseekV3RotaryEmbedding(of)(x, torch.arange(L)[None])
    right = theirs(x, turns, mask_of(L))[0].numpy()
  assert right.std() > 0.3
  np.testing.assert_allclose(ours(config, draw()), right, rtol=1e-4, atol=5e-5)
