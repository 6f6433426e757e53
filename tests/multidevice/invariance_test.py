"""The global balance loss and its gradient, whatever a step is spread over, cut into or remade."""

import dataclasses
import functools
import itertools

import jax
import numpy as np
import pytest

from jaxmoe.core import param_names
from jaxmoe.core.rng import Keys
from jaxmoe.models.transformer import Decoder
from jaxmoe.moe.balance import LoadBalance
from jaxmoe.parallel import Parallel, make_layout
from jaxmoe.parity import Cell
from jaxmoe.parity.fixture import VOCAB, batch_of, decoder_of, params_of
from jaxmoe.train.sharded_gradients import context_of, sharded_gradients

NAME = "load_balance_global"
FAST = {(8, 1, "none"), (2, 4, "full")}
GRID = [
  pytest.param(*point, marks=[] if point in FAST else pytest.mark.slow)
  for point in itertools.product((1, 2, 4, 8), (1, 2, 4), ("none", "full"))
]


def batch_of_32():
  """Returns rows without labels, so that the balance loss is the whole loss."""
  parts = [batch_of(seed) for seed in range(4)]
  batch = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
  return {**batch, "labels": np.full_like(batch["labels"], -1)}


@functools.lru_cache
def balance(data, micro, remat):
  """Returns the global loss and its gradient by path."""
  config = decoder_of(Cell(Parallel())).config.map_ffns(
    lambda moe: dataclasses.replace(moe, balance=(LoadBalance(0.5, "global"),))
  )
  decoder, parallel = Decoder(dataclasses.replace(config, remat=remat), VOCAB), Parallel(data=data)
  layout = make_layout(parallel, jax.devices())
  gradients = sharded_gradients(decoder, micro, context_of(decoder, parallel, layout))
  params = jax.device_put(params_of(decoder), layout.replicated)
  run = jax.jit(lambda params, batch, root: gradients(params, batch, Keys(root)))
  grads, metrics, _ = run(params, layout.put_batch(batch_of_32()), Keys.from_seed(0).root)
  grads, metrics = jax.device_get((grads, metrics))
  assert metrics["total_loss"] == pytest.approx(0.5 * metrics["balance"][NAME], rel=1e-6)
  return metrics["balance"][NAME], param_names.flatten(grads)


@pytest.mark.parametrize("data, micro, remat", GRID)
def test_the_global_balance_loss_and_its_gradient_are_those_of_the_whole_batch(data, micro, remat):
  loss, grads = balance(data, micro, remat)
  expected, true = balance(1, 1, "none")
  assert loss == pytest.approx(expected, rel=1e-6)
  norm = np.sqrt(sum(np.sum(np.square(leaf, dtype=np.float64)) for leaf in true.values()))
  assert norm > 0.01
  # Rounding of a leaf is that of what flows through it, whose size is the gradient's norm.
  for path, leaf in true.items():
    np.testing.assert_allclose(grads[path], leaf, rtol=0, atol=1e-6 * norm, err_msg=path)
