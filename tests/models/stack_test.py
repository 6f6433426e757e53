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
from jaxmoe.moe.dispatch import Dense
from jaxmoe.moe.experts import SwiGLU

VOCAB, ROWS, LENGTH = 11, ([4, 3], [9]), 9
BLOCK = BlockConfig(SoftmaxAttention(4, 2, 4), MoEConfig(5, 2, experts=SwiGLU(mlp_dim=6)))
# Every expert on every token: the dispatch that compiles in no time.
DENSE = BlockConfig(
  SoftmaxAttention(4, 2, 4), MoEConfig(5, 2, experts=SwiGLU(mlp_dim=6), dispatch=Dense())
)
OTHER = BlockConfig(
  SoftmaxAttention(2, 2, 4), MoEConfig(3, 1, experts=SwiGLU(mlp_dim=4), dispatch=Dense())
)
PLAIN = TransformerConfig(dim=8, stack=(LayerGroup((BLOCK,), 3),))
SPLITS = {
  "one by one": (LayerGroup((DENSE,), 4),),
  "in pairs": (LayerGroup((DENSE, DENSE), 2),),
  "no repeats": (LayerGroup((DENSE,), 1),) * 4,
  "uneven": (LayerGroup((DENSE,), 1), LayerGroup((DENSE,), 3)),
}


def gradients(decoder):
  """Returns a compiled (params, batch) -> ((loss, logits, sums), gradients)."""

  def loss(params, batch):
    hidden, _, sums = decoder.hidden(params, Tokens.of_batch(batch))
    nll = decoder.nll(params, hidden, batch["labels"])
    balance = jax.tree.leaves(sums)
    penalty = 1e-2 * sum(jnp.sum(jnp.sin(leaf)) for leaf in balance)
    return jnp.sum(nll) + penalty, (decoder.logits(params, hidden), sums)

  return jax.jit(jax.value_and_grad(loss, has_aux=True))


@pytest.fixture(scope="module")
def reference(batch_of):
  """The scanned stack without remat."""
  decoder, batch = Decoder(PLAIN, VOCAB), batch_of(ROWS, LENGTH, VOCAB)
  params = decoder.init(Keys.from_seed(0))
  return params, batch, gradients(decoder)(params, batch)


@pytest.mark.parametrize(
  "fields", [{"scan": False}, {"remat": "full"}, {"remat": "dots"}], ids=str
)
def test_scan_and_remat_change_no_value_and_no_gradient(reference, fields):
  params, batch, (values, grads) = reference
  decoder = Decoder(dataclasses.replace(PLAIN, **fields), VOCAB)
  other_values, other_grads = gradients(decoder)(params, batch)
  jax.tree.map(
    lambda one, other: np.testing.assert_allclose(one, other, rtol=1e-6, atol=1e-6),
    values, other_values,
  )  # fmt: skip
  size = max(np.abs(grad).max() for grad in jax.tree.leaves(grads))
  jax.tree.map(
    lambda one, other: np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6 * size),
    grads, other_grads,
  )  # fmt: skip


def test_initial_parameters_and_outputs_do_not_depend_on_the_split(batch_of, forward):
  batch, named, logits = batch_of(ROWS, LENGTH, VOCAB), {}, {}
  for split, groups in SPLITS.items():
    decoder = Decoder(TransformerConfig(dim=8, stack=groups), VOCAB)
    params = decoder.init(Keys.from_seed(7))
    named[split] = param_names.unstack(param_names.flatten(params), decoder.layer_groups)
    logits[split] = forward(decoder, params, batch)
  first = named["one by one"]
  assert len({np.asarray(first[f"layers/{at}/attention/q"]).tobytes() for at in range(4)}) == 4
  for split in SPLITS:
    assert named[split].keys() == first.keys()
    for name, leaf in named[split].items():
      np.testing.assert_array_equal(leaf, first[name], err_msg=f"{split} {name}")
    np.testing.assert_allclose(logits[split], logits["one by one"], rtol=1e-6, atol=1e-6)


def test_a_stack_runs_its_blocks_in_the_order_of_the_names(batch_of, forward):
  batch = batch_of(ROWS, LENGTH, VOCAB)
  mixed = Decoder(TransformerConfig(dim=8, stack=(LayerGroup((DENSE, OTHER), 2),)), VOCAB)
  apart = Decoder(
    TransformerConfig(dim=8, stack=(LayerGroup((DENSE,), 1), LayerGroup((OTHER,), 1)) * 2), VOCAB
  )
  params = mixed.init(Keys.from_seed(0))
  named = param_names.unstack(param_names.flatten(params), mixed.layer_groups)
  paths = list(param_names.flatten(apart.shapes))
  other = param_names.unflatten(apart.shapes, param_names.stack(named, paths, apart.layer_groups))
  np.testing.assert_allclose(
    forward(mixed, params, batch), forward(apart, other, batch), rtol=1e-6, atol=1e-6
  )


def test_a_deeper_stack_compiles_to_as_many_instructions(batch_of):
  batch, counts = batch_of(ROWS, LENGTH, VOCAB), {}
  for layers in (2, 48):
    decoder = Decoder(TransformerConfig(dim=8, stack=(LayerGroup((BLOCK,), layers),)), VOCAB)

    def loss(params, batch, decoder=decoder):
      hidden, _, sums = decoder.hidden(params, Tokens.of_batch(batch))
      balance = sum(jnp.sum(leaf) for leaf in jax.tree.leaves(sums))
      return jnp.sum(decoder.nll(params, hidden, batch["labels"])) + balance

    text = jax.jit(jax.grad(loss)).lower(decoder.shapes, batch).compile().as_text()
    # Constants do not count: equal ones are merged, and the bound of a loop over 2 layers may
    # equal another number.
    lines = (line for line in text.splitlines() if " = " in line and " constant(" not in line)
    counts[layers] = sum(1 for _ in lines)
  assert counts[2] == counts[48] > 100


@pytest.mark.parametrize("split", ["groups", "pattern"])
def test_more_than_ten_groups_or_blocks_of_a_pattern_run_in_order_of_depth(
  split, batch_of, forward, oracle_logits
):
  """As text, which keys of a tree are sorted as, 10 comes before 2."""
  dense = BlockConfig(SoftmaxAttention(2, 1, 2), MLPConfig(mlp_dim=2))
  one = (LayerGroup((dense,), 1),) * 11
  stack = one if split == "groups" else (LayerGroup((dense,) * 11, 1),)
  decoder = Decoder(TransformerConfig(dim=4, stack=stack), VOCAB)
  params, batch = decoder.init(Keys.from_seed(0)), batch_of([[3]], 3, VOCAB)
  right = oracle_logits(decoder, params, batch)
  np.testing.assert_allclose(forward(decoder, params, batch), right, rtol=1e-4, atol=2e-5)
