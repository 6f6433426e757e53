import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxmoe.core import param_names
from jaxmoe.core.errors import InputError
from jaxmoe.core.init import Init
from jaxmoe.core.rng import Keys
from jaxmoe.core.tokens import Tokens
from jaxmoe.models.attention import SoftmaxAttention
from jaxmoe.models.attention_experts import AttentionExperts
from jaxmoe.models.block import BlockConfig, MLPConfig
from jaxmoe.models.cache import NoCache
from jaxmoe.models.stack import LayerGroup
from jaxmoe.models.stick_breaking_attention import StickBreaking
from jaxmoe.models.transformer import Decoder, TransformerConfig
from jaxmoe.moe.balance import LoadBalance
from jaxmoe.moe.routers import ROUTERS, TopK
from tests.contracts.oracles.attention import experts as oracle

D, L = 6, 7
SEGMENT = np.array([[1] * 3 + [2] * 3 + [0], [1] * L])
STICK = StickBreaking(4, 2, 4)


@functools.partial(jax.jit, static_argnums=0)
def run(graph, state, x, tokens):
  y, _, sums = nnx.merge(graph, state)(x, tokens, NoCache(), None)
  return y, sums


def build(config):
  layer = config.build(Init(Keys.from_seed(0)), D, 1e-6)
  return nnx.graphdef(layer), nnx.to_pure_dict(nnx.state(layer))


def tokens_of(segment):
  slot = np.broadcast_to(np.arange(segment.shape[1]), segment.shape)
  first = np.array([[np.argmax(row == one) for one in row] for row in segment])
  return Tokens(*(jnp.asarray(f, jnp.int32) for f in (0 * slot, slot - first, segment, slot)))


def draw(seed=1):
  return np.random.default_rng(seed).normal(size=(*SEGMENT.shape, D))


CONFIGS = {
  "softmax, grouped heads": AttentionExperts(3, 2, SoftmaxAttention(4, 2, 4)),
  "stick-breaking, weights as they are": AttentionExperts(4, 3, STICK, TopK(normalize=False)),
  "one of one": AttentionExperts(1, 1, STICK, TopK(normalize=False)),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_the_layer_equals_a_loop_over_tokens_and_experts(name):
  config, x = CONFIGS[name], draw()
  graph, state = build(config)
  y, sums = run(graph, state, jnp.asarray(x, jnp.float32), tokens_of(SEGMENT))
  weights = {
    path: np.asarray(leaf, np.float64) for path, leaf in param_names.flatten(state).items()
  }
  right = np.stack([oracle(config, weights, *row) for row in zip(x, SEGMENT, strict=True)])
  assert right.std() > 0.05
  np.testing.assert_allclose(y, right, rtol=1e-4, atol=1e-5)
  assert sums.router.tokens == (SEGMENT > 0).sum()
  assert np.sum(sums.router.counts_E) == config.num_active * (SEGMENT > 0).sum()


def test_choices_given_to_feed_forward_experts_are_not_taken_by_those_of_attention():
  (graph, state), x = build(CONFIGS["softmax, grouped heads"]), jnp.asarray(draw(), jnp.float32)
  tokens = tokens_of(SEGMENT)
  given = jnp.broadcast_to(jnp.arange(2), (*SEGMENT.shape, 2))
  other = dataclasses.replace(tokens, replayed_experts=given)
  jax.tree.map(
    np.testing.assert_array_equal, run(graph, state, x, other), run(graph, state, x, tokens)
  )


def test_weights_that_are_not_divided_by_their_sum_shrink_outputs_by_what_the_rest_holds():
  x, norms = jnp.asarray(draw(), jnp.float32), {}
  for normalize in (True, False):
    graph, state = build(AttentionExperts(8, 1 + normalize, STICK, TopK(normalize=normalize)))
    norms[normalize] = np.abs(run(graph, state, x, tokens_of(SEGMENT))[0]).mean()
  assert norms[False] < 0.6 * norms[True]


def test_a_cache_is_as_large_for_many_experts_as_for_one():
  sizes = {}
  for number in (1, 64):
    config = AttentionExperts(number, 1, STICK, TopK(normalize=False))
    shapes = jax.eval_shape(lambda c=config: c.empty_cache(2, 9, jnp.float32))
    sizes[number] = sum(leaf.size for leaf in jax.tree.leaves(shapes))
  plain = jax.tree.leaves(jax.eval_shape(lambda: STICK.empty_cache(2, 9, jnp.float32)))
  assert sizes[1] == sizes[64] == sum(leaf.size for leaf in plain)


def test_the_active_parameters_of_the_record_are_those_of_the_leaves():
  config = AttentionExperts(5, 2, STICK)
  flat = param_names.flatten(build(config)[1])
  share = {"experts/q": 2 / 5, "experts/o": 2 / 5}
  total = sum(leaf.size * share.get(path, 1) for path, leaf in flat.items())
  assert config.active_params(D) == round(total)


def test_what_the_layer_cannot_serve_is_refused():
  with pytest.raises(InputError, match="num_active"):
    AttentionExperts(2, 3)
  with pytest.raises(InputError, match="two losses"):
    AttentionExperts(balance=(LoadBalance(), LoadBalance(0.5)))
  ahead = next(router for _, router in ROUTERS.values() if router.depends_on == "batch")
  with pytest.raises(InputError, match="later"):
    AttentionExperts(router=dataclasses.replace(ahead, allow_future=False))


def test_a_decoder_reports_its_attention_experts_beside_its_layers_by_scan_and_without():
  config = AttentionExperts(3, 2, STICK)
  stack = (LayerGroup((BlockConfig(config, MLPConfig(mlp_dim=4)),), 2),)
  found, ids = {}, jnp.asarray(np.random.default_rng(0).integers(0, 9, (2, L)))
  for scan in (True, False):
    decoder = Decoder(TransformerConfig(dim=D, stack=stack, scan=scan), 9)
    params = decoder.init(Keys.from_seed(0))
    found[scan] = jax.jit(lambda p, d=decoder: d.hidden(p, Tokens.of_ids(ids))[::2])(params)
  jax.tree.map(
    lambda one, two: np.testing.assert_allclose(one, two, rtol=1e-5, atol=1e-6), *found.values()
  )
  sums = found[True][1]["0"]
  assert sums["0"] is None and set(sums) == {"0", "0.attention"}
  layers = param_names.by_layer(found[True][1], decoder.layer_groups, param_names.ATTENTION)
  assert {depth: of.router.tokens for depth, of in layers.items()} == {0: 2 * L, 1: 2 * L}
  assert param_names.by_layer(found[True][1], decoder.layer_groups) == {}
  assert decoder.routed_layers() == {"0": {"0.attention": config}}
