"""The loss in pieces: composed they are the loss of a step; apart they make its gradient, too."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmoe.core.metrics import Mean
from jaxmoe.core.rng import Keys
from jaxmoe.core.tokens import Tokens
from jaxmoe.models.attention import SoftmaxAttention
from jaxmoe.models.attention_experts import AttentionExperts
from jaxmoe.models.block import BlockConfig, MLPConfig, MoEConfig
from jaxmoe.models.layer_runs import join_runs, layer_runs
from jaxmoe.models.loss_pieces import LossPieces
from jaxmoe.models.stack import LayerGroup
from jaxmoe.models.transformer import Decoder, TransformerConfig
from jaxmoe.moe.balance import LoadBalance, RouterZ
from jaxmoe.moe.experts import SwiGLU
from jaxmoe.moe.routers import ROUTERS, TopK

VOCAB, ROWS, LENGTH = 11, ([4, 2], [6], [3, 1], [5]), 6
BALANCE = (LoadBalance(), LoadBalance(scope="sequence"), RouterZ())
SOFTMAX = SoftmaxAttention(2, 1, 4)
KEYS = Keys.from_seed(5)


def moe(router, num_experts=5, **fields):
  return MoEConfig(num_experts, 2, router, SwiGLU(mlp_dim=4), balance=BALANCE, **fields)


def blocks(*ffns, attention=SOFTMAX):
  return tuple(BlockConfig(attention, ffn) for ffn in ffns)


HANDED_ON = blocks(moe(ROUTERS["residual"][1]), MLPConfig(6), moe(TopK(), 3))
QUERIES = AttentionExperts(3, 2, SoftmaxAttention(2, 1, 4), balance=BALANCE[:1])
MODELS = {
  "gates that hand on logits, dense layers between": TransformerConfig(
    dim=8, stack=(LayerGroup(HANDED_ON, 2), LayerGroup(HANDED_ON[:1], 1))
  ),
  "a tied table, noise, a shared expert": TransformerConfig(
    dim=8, tied=True, stack=(LayerGroup(blocks(moe(ROUTERS["noisy"][1], shared_mlp_dim=4)), 3),)
  ),
  "experts in attention": TransformerConfig(
    dim=8, scan=False, stack=(LayerGroup(blocks(moe(TopK()), attention=QUERIES), 2),)
  ),
}
CUTS = {
  "gates that hand on logits, dense layers between": (0, 4, 7),
  "experts in attention": (0, 1, 2),
}
each = pytest.mark.parametrize("name", MODELS)


@pytest.fixture(scope="module")
def case(batch_of):
  """Returns a function from a name to a decoder, its parameters, a batch and the step's totals."""

  @functools.cache
  def make(name):
    decoder = Decoder(MODELS[name], VOCAB)
    params = jax.tree.map(lambda leaf: leaf * 1.5, decoder.init(Keys.from_seed(0)))
    batch = {key: jnp.asarray(of) for key, of in batch_of(ROWS, LENGTH, VOCAB).items()}
    return decoder, params, batch

  return make


def composed(decoder, cuts):
  """Returns a program from parameters and a batch to the loss and its gradient."""
  pieces = LossPieces(decoder)

  def loss(params, batch):
    tokens = Tokens.of_batch(batch)
    totals = pieces.totals(tokens.valid, batch["labels"])
    handed, runs, losses = pieces.embed(params, tokens), [], []
    for start, stop in itertools.pairwise(cuts):
      here = pieces.runs(start, stop)
      weights = [run.take(params["stack"]) for run in here]
      (handed, found), _ = pieces.layers(here, weights, handed, tokens, KEYS.at(0), totals)
      runs, losses = runs + here, losses + found
    nll = pieces.head(params, handed[0], batch["labels"])
    return pieces.total(nll, runs, losses, totals)

  return jax.jit(jax.value_and_grad(loss))


def apart(decoder, params, batch, cuts):
  """Returns loss and gradient by a program a piece, forward and backward, chained by hand."""
  pieces, tokens = LossPieces(decoder), Tokens.of_batch(batch)
  totals = jax.jit(lambda: pieces.totals(tokens.valid, batch["labels"]))()
  stages = [pieces.runs(start, stop) for start, stop in itertools.pairwise(cuts)]
  weights = [[run.take(params["stack"]) for run in runs] for runs in stages]

  def layers(stage, weights, handed):
    found, _ = pieces.layers(stages[stage], weights, handed, tokens, KEYS.at(0), totals)
    return found

  def end(weights, x, losses):
    nll = pieces.head(weights, x, batch["labels"])
    return pieces.total(nll, [*itertools.chain(*stages)], losses, totals)

  def pull(function, *static):
    return jax.jit(lambda ct, *args: jax.vjp(functools.partial(function, *static), *args)[1](ct))

  table = {"embed": params["embed"]}
  handed, losses = [jax.jit(pieces.embed)(table, tokens)], []
  for stage in range(len(stages)):
    after, found = jax.jit(functools.partial(layers, stage))(weights[stage], handed[-1])
    handed.append(after)
    losses.append(found)
  beside = {name: of for name, of in params.items() if name != "stack"}
  last = (beside, handed[-1][0], [*itertools.chain(*losses)])
  loss = jax.jit(end)(*last)
  grads, x_ct, losses_ct = pull(end)(jnp.float32(1), *last)
  ct = (x_ct, jax.tree.map(jnp.zeros_like, handed[-1][1]))
  of_runs = []
  for stage in reversed(range(len(stages))):
    mine, losses_ct = losses_ct[-len(stages[stage]) :], losses_ct[: -len(stages[stage])]
    of_weights, ct = pull(layers, stage)((ct, mine), weights[stage], handed[stage])
    of_runs = of_weights + of_runs
  (of_table,) = pull(lambda table: pieces.embed(table, tokens))(ct, table)
  grads = {**grads, "embed": jax.tree.map(jnp.add, grads["embed"], of_table["embed"])}
  return loss, {**grads, "stack": join_runs([*itertools.chain(*stages)], of_runs)}


def in_one_go(decoder):
  """Returns the same of the loss written out, without pieces: the whole forward pass, then sums."""

  def loss(params, batch):
    tokens = Tokens.of_batch(batch)
    totals = LossPieces(decoder).totals(tokens.valid, batch["labels"])
    hidden, _, sums = decoder.hidden(params, tokens, keys=KEYS.at(0))
    nll = Mean.of(decoder.nll(params, hidden, batch["labels"]), batch["labels"] >= 0)
    total = nll.sum / totals.labels
    for s, places in decoder.routed_layers().items():
      for place, layer in places.items():
        for aux_loss in layer.balance:

          def of_repeat(sums, rows, running, aux_loss=aux_loss, layer=layer):
            here = dataclasses.replace(totals, running=running)
            return aux_loss.weight_of(sums) * aux_loss.share(sums, rows, here, layer)

          found = sums[s][place]
          of_layers = jax.vmap(of_repeat)(
            found.router, found.per_sequence, totals.running[s][place]
          )
          total = total + jnp.sum(of_layers)
    return total

  return jax.jit(jax.value_and_grad(loss))


@pytest.fixture(scope="module")
def whole(case):
  """Returns a function from a name to the loss and the gradient of the whole loss."""

  @functools.cache
  def make(name):
    decoder, params, batch = case(name)
    loss, grads = in_one_go(decoder)(params, batch)
    assert all(np.any(leaf) for leaf in jax.tree.leaves(grads))
    return loss, grads

  return make


@each
def test_composed_in_one_program_the_pieces_are_the_loss_and_its_gradient_bit_for_bit(
  case, whole, name
):
  decoder, params, batch = case(name)
  found = composed(decoder, (0, decoder.config.num_layers))(params, batch)
  jax.tree.map(np.testing.assert_array_equal, found, whole(name))


@pytest.mark.parametrize("name", CUTS)
def test_compiled_apart_and_chained_by_hand_they_make_the_same_gradient(case, whole, name):
  decoder, params, batch = case(name)
  found = apart(decoder, params, batch, CUTS[name])

  def close(got, right):
    np.testing.assert_allclose(got, right, rtol=1e-6, atol=1e-6 * np.max(np.abs(right)))

  jax.tree.map(close, found, whole(name))


@pytest.mark.parametrize("sizes", [((1, 1),), ((3, 2), (1, 4)), ((2, 1), (2, 3), (1, 1))])
def test_runs_cut_any_range_of_layers_and_join_to_what_was_cut(sizes):
  depth = sum(width * repeats for width, repeats in sizes)
  first = [sum(w * r for w, r in sizes[:s]) for s in range(len(sizes))]
  stack = {
    str(s): {str(j): jnp.arange(repeats) * width + first[s] + j for j in range(width)}
    for s, (width, repeats) in enumerate(sizes)
  }
  for start in range(depth):
    for stop in range(start + 1, depth + 1):
      parts = [layer_runs(sizes, *cut) for cut in ((0, start), (start, stop), (stop, depth))]
      layers = [
        int(run.take(stack)[j][repeat])
        for run in parts[1]
        for repeat in range(run.stop - run.start)
        for j in run.positions
      ]
      assert layers == list(range(start, stop))
      assert all(run.depth + int(run.positions[0]) == run.take(stack)[run.positions[0]][0]
                 for run in parts[1])  # fmt: skip
      runs = [*itertools.chain(*parts)]
      joined = join_runs(runs, [run.take(stack) for run in runs])
      jax.tree.map(np.testing.assert_array_equal, joined, stack)
