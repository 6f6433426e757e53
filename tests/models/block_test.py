import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxmoe.core.init import Init
from jaxmoe.core.parallel_context import ONE_DEVICE
from jaxmoe.core.rng import Keys
from jaxmoe.core.tokens import Tokens
from jaxmoe.models.attention import SoftmaxAttention
from jaxmoe.models.block import BlockConfig, BlockLayer, MLPConfig, MoEConfig
from jaxmoe.models.cache import NoCache
from jaxmoe.models.residual import ResidualStream
from jaxmoe.moe.dispatch import Capacity
from jaxmoe.moe.experts import SwiGLU

D, E, A, B, L, TRIALS = 8, 5, 2, 3, 12, 60
SEGMENT = np.array([[1] * 5 + [2] * 7, [1] * 4 + [2] * 6 + [0] * 2, [1] * 12], np.int32)
TIGHT = MoEConfig(E, A, experts=SwiGLU(mlp_dim=6), dispatch=Capacity(0.8))


def build(layer, ffn=TIGHT):
  block = BlockConfig(SoftmaxAttention(4, 2, 4), ffn).build(
    Init(Keys.from_seed(layer)), ResidualStream(D, 1e-6)
  )
  return nnx.graphdef(block), nnx.to_pure_dict(nnx.state(block))


def tokens_of(segment):
  slot = jnp.broadcast_to(jnp.arange(L, dtype=jnp.int32)[None], segment.shape)
  return Tokens(slot, slot, jnp.asarray(segment), slot)


@functools.partial(jax.jit, static_argnums=0)
def two_blocks(graphs, states, inputs, tokens):
  """Returns, for each input, the stream and the kept choices after each of two blocks."""

  def once(x):
    streams, kept = [], []
    for graph, state in zip(graphs, states, strict=True):
      block = nnx.merge(graph, state)
      attended, _, _ = block.attention(block.attention_norm(x), tokens, NoCache())
      normed = block.ffn_norm(x + attended).reshape(-1, D)
      routing, _ = block.moe.router(normed, tokens, None, None)
      plan = block.moe.dispatch.plan(routing)
      kept.append((plan.row_TA < plan.token_R.shape[0]).reshape(B, L, A))
      x = block(x, None, tokens, NoCache(), None)[0]
      streams.append(x)
    return jnp.stack(streams), jnp.stack(kept)

  return jax.lax.map(once, inputs)


def test_where_choices_drop_only_the_drop_pattern_depends_on_other_documents():
  graphs, states = zip(build(0), build(1), strict=True)
  rng = np.random.default_rng(0)
  x = rng.normal(size=(1, B, L, D))
  # Trials change the first document of row 0, which stands before all else in every queue.
  changed_tokens = np.zeros((B, L, 1), bool)
  changed_tokens[0, :5] = True
  inputs = np.concatenate([x, x + 2 * changed_tokens * rng.normal(size=(TRIALS, B, L, D))])
  inputs = jnp.asarray(inputs, jnp.float32)
  streams, kept = map(np.asarray, two_blocks(graphs, states, inputs, tokens_of(SEGMENT)))
  streams, kept = np.moveaxis(streams, 1, 0), np.moveaxis(kept, 1, 0)
  elsewhere = np.broadcast_to((SEGMENT > 0) & ~changed_tokens[..., 0], (TRIALS, B, L))
  # In the first block a token changes exactly where its own drop pattern does.
  changed = [np.any(stream[1:] != stream[:1], axis=-1) & elsewhere for stream in streams]
  pattern = [np.any(has_row[1:] != has_row[:1], axis=-1) & elsewhere for has_row in kept]
  np.testing.assert_array_equal(changed[0], pattern[0])
  # In the second also where it attends to such a token: later ones of the same document.
  same = SEGMENT[:, :, None] == SEGMENT[:, None, :]
  sees = same & np.tril(np.ones((L, L), bool))
  reached = np.einsum("bls,tbs->tbl", sees, changed[0]) > 0
  assert not (changed[1] & ~(reached | pattern[1])).any()
  assert (changed[1] & ~changed[0]).any() and (changed[0]).any()
  # Documents in which no pattern changed are equal bit for bit, and there are some.
  touched = np.einsum("bls,tbs->tbl", same, changed[0] | pattern[1]) > 0
  assert not (changed[1] & ~touched).any()
  assert (elsewhere & ~touched).any()


def test_a_dense_block_adds_its_two_parts_to_the_stream():
  graph, state = build(0, MLPConfig(mlp_dim=6))
  x = jnp.asarray(np.random.default_rng(0).normal(size=(B, L, D)), jnp.float32)

  @jax.jit
  def run(state):
    return nnx.merge(graph, state)(x, "carried", tokens_of(SEGMENT), NoCache(), None)[0]

  cut = {name: dict(child) for name, child in state.items()}
  cut["attention"]["o"] = jnp.zeros_like(cut["attention"]["o"])
  only_mlp = run(cut)
  cut["mlp"]["down"] = jnp.zeros_like(cut["mlp"]["down"])
  np.testing.assert_array_equal(run(cut), x)
  assert np.abs(only_mlp - x).max() > 0.1


def test_a_block_hands_on_the_carry_and_gives_padding_nothing_from_experts():
  graph, state = build(0)
  block = nnx.merge(graph, state)
  x = jnp.asarray(np.random.default_rng(0).normal(size=(B, L, D)), jnp.float32)
  carry = {"scores": jnp.ones(3)}
  y, handed, _, sums = block(x, carry, tokens_of(SEGMENT), NoCache(), None)
  assert handed is carry
  # Padding sees no key and reaches no expert: the stream passes as it came.
  np.testing.assert_array_equal(np.asarray(y)[SEGMENT == 0], np.asarray(x)[SEGMENT == 0])
  assert sums["moe"].router.tokens == (SEGMENT > 0).sum()


def test_attention_and_the_feed_forward_part_draw_from_keys_of_their_own():
  seen = {}

  def attention(x, tokens, cache, keys):
    seen["attention"] = keys
    return x, cache, None

  def moe(x, tokens, carry, keys):
    seen["moe"] = keys
    return x, carry, None

  same = lambda x: x  # noqa: E731
  parts = types.SimpleNamespace(
    attention_norm=same, ffn_norm=same, attention=attention, moe=moe, mlp=None, parallel=ONE_DEVICE,
    stream=ResidualStream(1, 1e-6),
  )
  BlockLayer.__call__(parts, jnp.zeros(1), None, None, NoCache(), Keys.from_seed(0))
  assert seen["attention"]("router/noise") != seen["moe"]("router/noise")
