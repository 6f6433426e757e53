"""Experts of attention through whole steps: what their balance losses and buffers do."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmoe.core import param_names
from jaxmoe.core.rng import Keys
from jaxmoe.models.attention_experts import AttentionExperts
from jaxmoe.models.block import BlockConfig, MLPConfig
from jaxmoe.models.stack import LayerGroup
from jaxmoe.models.stick_breaking_attention import StickBreaking
from jaxmoe.models.transformer import Decoder, TransformerConfig
from jaxmoe.moe.balance import LoadBalance, RouterZ
from jaxmoe.moe.dispatch import Dense
from jaxmoe.moe.experts import SwiGLU
from jaxmoe.moe.layer import MoEConfig
from jaxmoe.moe.routers.bias import AuxFree
from jaxmoe.optim import AdamW, Constant, Optim, make_optimizer, make_schedule
from jaxmoe.train.gradients import make_gradients
from jaxmoe.train.step import TrainStep
from jaxmoe.train.train_state import State

VOCAB, LENGTH, RATE = 19, 6, 0.125
HEADS = StickBreaking(2, 1, 4)
ROWS = ((4,), (2, 3), (1,), ())
GATE = "stack/0/0/attention/router/gate/weight"


def decoder_of(attention, ffn, repeats):
  return Decoder(
    TransformerConfig(dim=8, stack=(LayerGroup((BlockConfig(attention, ffn),), repeats),)), VOCAB
  )


def written_out(x, gate, rows):
  """Loss and gradient by the gate: load balance of each row and z-loss, in float64.

  Switch, equation 4, with f held still, and the mean squared logsumexp.
  """
  logits = x @ gate
  log_z = np.log(np.exp(logits).sum(1))
  score = np.exp(logits - log_z[:, None])
  value, by_logits, num = 0.0, np.zeros(logits.shape), gate.shape[1]
  for row in np.unique(rows):
    mine = rows == row
    share = np.zeros(num)
    for expert in np.argsort(-score[mine], axis=1)[:, :2].reshape(-1):
      share[expert] += 1 / (2 * mine.sum())
    value += 3 * num * share @ score[mine].mean(0) / len(np.unique(rows))
    pull = score[mine] * (share - score[mine] @ share[:, None])
    by_logits[mine] += 3 * num * pull / mine.sum() / len(np.unique(rows))
  value += 0.5 * np.mean(log_z**2)
  by_logits += 0.5 * 2 * log_z[:, None] * score / len(x)
  return value, x.T @ by_logits


@pytest.mark.parametrize("num_micro", [1, 2])
def test_balance_losses_reach_the_gate_as_they_are_written(params_of, batch_of, num_micro):
  balance = (LoadBalance(3.0, "sequence"), RouterZ(0.5))
  decoder = decoder_of(AttentionExperts(4, 2, HEADS, balance=balance), MLPConfig(mlp_dim=4), 1)
  params, batch = params_of(decoder), batch_of(ROWS, LENGTH)
  batch["labels"] = np.full_like(batch["labels"], -1)  # nothing else has a gradient
  gradients = make_gradients(decoder, num_micro)
  grads, metrics, _ = jax.jit(lambda params: gradients(params, batch, Keys.from_seed(0)))(params)
  flat = {path: np.asarray(leaf, np.float64) for path, leaf in param_names.flatten(params).items()}
  x = flat["embed/table"][batch["ids"][batch["segment"] > 0]]
  scale = flat["stack/0/0/attention_norm/scale"][0]
  x = x / np.sqrt(np.mean(x * x, 1, keepdims=True) + 1e-6) * scale
  value, right = written_out(x, flat[GATE][0], np.nonzero(batch["segment"])[0])
  assert np.abs(right).max(0).min() > 0.01
  np.testing.assert_allclose(metrics["total_loss"], value, rtol=1e-5)
  np.testing.assert_allclose(param_names.flatten(grads)[GATE][0], right, rtol=1e-4, atol=1e-5)


def test_a_step_moves_the_bias_of_attention_and_feed_forward_experts_each_by_its_own_load(
  params_of, batch_of
):
  router = AuxFree(bias_rate=RATE)
  ffn = MoEConfig(4, 2, router, SwiGLU(mlp_dim=4), Dense())
  decoder = decoder_of(AttentionExperts(4, 2, HEADS, router), ffn, 2)
  optim = Optim(AdamW(weight_decay=0.5), Constant(), learning_rate=0.1)
  transform = make_optimizer(optim, 9, decoder.parameter_names, decoder.dims)
  step = TrainStep(
    make_gradients(decoder, 1), transform, make_schedule(optim, 9), 0,
    update_buffers=decoder.update_buffers,
  )  # fmt: skip
  params = params_of(decoder)
  state = State.create(params, transform.init(params))
  after, metrics = jax.device_get(jax.jit(step)(state, batch_of(ROWS, LENGTH)))
  signs = []
  for part, place in (("attention", "0.attention"), ("moe", "0")):
    counts = metrics["layers"]["0"][place].router.counts_E
    assert (counts.sum(axis=1) == 2 * sum(map(sum, ROWS))).all()
    signs.append(np.sign(counts.mean(axis=1, keepdims=True) - counts))
    before, moved = (
      tree["stack"]["0"]["0"][part]["router"]["buffers"]["bias"] for tree in (params, after.params)
    )
    # To the last bit: no optimizer has moved it.
    np.testing.assert_array_equal(moved, before + jnp.float32(RATE) * signs[-1])
  assert (signs[0] != signs[1]).any()
