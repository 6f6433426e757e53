"""What routers keep from step to step, through whole steps of training."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmoe.core import param_names
from jaxmoe.core.rng import Keys
from jaxmoe.core.tokens import Tokens
from jaxmoe.models.stack import LayerGroup
from jaxmoe.moe.balance import Sparsity
from jaxmoe.moe.dispatch import Capacity, Dropless
from jaxmoe.moe.layer import MoESums
from jaxmoe.moe.routers.adaptive_coefficient import ReLU
from jaxmoe.moe.routers.bias import AuxFree, Quantile
from jaxmoe.moe.routers.expert_choice import CausalExpertChoice
from jaxmoe.moe.routing import RouterSums
from jaxmoe.optim import AdamW, Constant, Optim, make_optimizer, make_schedule
from jaxmoe.train.gradients import make_gradients
from jaxmoe.train.step import TrainStep
from jaxmoe.train.step_summary import summarize
from jaxmoe.train.train_state import State

LENGTH, MICRO = 12, 4
# Two rows a microbatch, full, half, of one token and of padding alone.
ROWS = ((9,), (4, 3), (1,), (), (12,), (7, 5), (), ())
RATE = 0.125
OPTIM = Optim(AdamW(weight_decay=0.5), Constant(), learning_rate=0.1, clip_norm=1e-3)
ROUTERS = {
  "bias": AuxFree(bias_rate=RATE), "beta": Quantile(), "threshold": CausalExpertChoice(rate=RATE),
}  # fmt: skip


@pytest.fixture(scope="module")
def run(decoder_of, params_of, batch_of):
  """Returns a function (buffer, num_micro, drops, bad, labels) -> states around a step, metrics.

  Buffers are random at first, for they are parameters to `params_of`.
  """
  made = {}

  def get(name, num_micro=1, drops=False, bad=False, labels=None):
    decoder = decoder_of(
      stack=lambda block: (LayerGroup((block,), repeats=2),), router=ROUTERS[name],
      dispatch=Capacity(0.5) if drops else Dropless(),
    )
    if (name, num_micro, drops) not in made:
      transform = make_optimizer(OPTIM, 9, decoder.parameter_names, decoder.dims)
      step = TrainStep(
        make_gradients(decoder, num_micro), transform, make_schedule(OPTIM, 9), 0,
        update_buffers=decoder.update_buffers,
      )
      params = params_of(decoder)
      made[name, num_micro, drops] = State.create(params, transform.init(params)), jax.jit(step)
    state, step = made[name, num_micro, drops]
    batch = batch_of(ROWS, LENGTH)
    batch["labels"] = batch["labels"] if labels is None else labels
    if bad:
      params = jax.tree.map(lambda leaf: leaf, state.params)
      params["embed"]["table"] = jnp.full_like(params["embed"]["table"], jnp.inf)
      state = dataclasses.replace(state, params=params)
    return jax.device_get((state, *step(state, batch)))

  return get


def buffer_of(params, name):
  return params["stack"]["0"]["0"]["moe"]["router"]["buffers"][name]


@pytest.mark.parametrize("num_micro, drops", [(1, True), (MICRO, False)])
def test_the_bias_moves_by_its_rate_against_the_load_of_the_step_before_drops(
  run, num_micro, drops
):
  before, after, metrics = run("bias", num_micro, drops)
  sums = metrics["layers"]["0"]["0"]
  counts = sums.router.counts_E
  assert (sums.dropped["capacity"].min() > 0) if drops else not sums.dropped
  assert (counts.sum(axis=1) == 2 * sum(map(sum, ROWS))).all()
  sign = np.sign(counts.mean(axis=1, keepdims=True) - counts)
  assert {-1, 1} <= set(sign.reshape(-1).tolist())
  # To the last bit: neither decayed, clipped nor moved by AdamW.
  right = buffer_of(before.params, "bias") + np.float32(RATE) * sign
  np.testing.assert_array_equal(buffer_of(after.params, "bias"), right)


def test_buffers_have_no_gradient_and_no_part_in_the_norm(run, decoder_of, params_of, batch_of):
  decoder = decoder_of(router=ROUTERS["bias"])
  gradients = make_gradients(decoder, 1)
  grads = jax.jit(lambda params: gradients(params, batch_of(ROWS, LENGTH), Keys.from_seed(0))[0])
  flat = param_names.flatten(grads(params_of(decoder)))
  zero = {path for path, leaf in flat.items() if not np.any(leaf)}
  assert zero == {"stack/0/0/moe/router/buffers/bias"}


@pytest.mark.parametrize("name", ROUTERS)
def test_accumulation_gives_the_same_buffers(run, name):
  (_, whole, _), (_, parts, _) = run(name, 1), run(name, MICRO)
  np.testing.assert_allclose(
    buffer_of(whole.params, name), buffer_of(parts.params, name), rtol=1e-5, atol=1e-6
  )


@pytest.mark.parametrize("name", ROUTERS)
def test_accumulation_gives_the_same_balance_losses_whatever_the_scores(run, name):
  whole, parts = (run(name, num_micro)[2]["balance"] for num_micro in (1, MICRO))
  assert whole["load_balance_global"] > 0.5
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), whole, parts)


@pytest.mark.parametrize("name", ROUTERS)
def test_a_step_that_is_skipped_leaves_buffers_where_they_were(run, name):
  before, after, _ = run(name, 1, bad=True)
  assert after.skipped == 1
  np.testing.assert_array_equal(buffer_of(after.params, name), buffer_of(before.params, name))


@pytest.mark.parametrize("name", ROUTERS)
def test_a_step_without_labels_leaves_buffers_where_they_were(run, name):
  before, after, _ = run(name, 1, labels=np.full((len(ROWS), LENGTH), -1, np.int32))
  assert (after.step, after.skipped, after.unlabelled) == (1, 0, 1)
  np.testing.assert_array_equal(buffer_of(after.params, name), buffer_of(before.params, name))


def test_one_label_in_any_microbatch_makes_a_step(run):
  for row, moved in ((None, False), (0, True), (5, True)):
    labels = np.full((len(ROWS), LENGTH), -1, np.int32)
    if row is not None:
      labels[row, 2] = 4
    before, after, metrics = run("bias", MICRO, labels=labels)
    assert (after.unlabelled, metrics["loss"].weight) == (not moved, moved)
    assert np.any(buffer_of(after.params, "bias") != buffer_of(before.params, "bias")) == moved


def test_beta_has_no_mean_and_differs_from_layer_to_layer(run):
  before, after, metrics = run("beta", MICRO)
  beta = buffer_of(after.params, "beta")
  np.testing.assert_allclose(beta.mean(axis=1), 0, atol=1e-6)
  assert np.abs(beta[0] - beta[1]).max() > 0.1
  assert np.abs(beta - buffer_of(before.params, "beta")).max() > 0.1
  assert metrics["layers"]["0"]["0"].statistics is None


def test_the_threshold_goes_a_part_of_the_way_to_the_score_that_its_share_of_tokens_lies_above(
  run, decoder_of, batch_of
):
  before, after, metrics = run("threshold", MICRO)
  decoder, batch = decoder_of(router=ROUTERS["threshold"]), batch_of(ROWS, LENGTH)
  tokens = dataclasses.replace(Tokens.of_batch(batch), return_routing=True)
  _, _, sums = jax.jit(decoder.hidden)(before.params, tokens)
  scores = np.asarray(sums["0"]["0"].routing.scores_TE)[:, batch["segment"].reshape(-1) > 0]
  places = round(2 * scores.shape[1] / 4)  # two experts a token in the mean, of four
  left_out = -np.sort(-scores, axis=1)[:, places]
  old, new = (buffer_of(state.params, "threshold") for state in (before, after))
  np.testing.assert_allclose(new, old + RATE * (left_out - old), rtol=1e-5, atol=1e-6)
  assert np.abs(new - old).max(axis=1).min() > 0.02, "thresholds of both layers move"
  assert metrics["layers"]["0"]["0"].statistics is None


def test_an_adaptive_loss_is_multiplied_by_the_factor_of_each_layer(
  decoder_of, params_of, batch_of
):
  term = Sparsity(weight=3.0)
  decoder = decoder_of(router=ReLU(), balance=(term,))
  params, factors = params_of(decoder), np.float32([[0.5], [2.0]])
  params["stack"]["0"]["0"]["moe"]["router"]["buffers"]["pressure"] = jnp.asarray(factors)
  gradients = make_gradients(decoder, MICRO)
  run = jax.jit(lambda params: gradients(params, batch_of(ROWS, LENGTH), Keys.from_seed(0))[1])
  metrics = run(params)
  layer, sums = decoder.moe_layers()["0"]["0"], metrics["layers"]["0"]["0"].router
  each = jax.vmap(lambda sums: term.loss(sums, layer))(sums)
  np.testing.assert_allclose(metrics["balance"][term.name], jnp.sum(each), rtol=1e-5)
  extra = metrics["total_loss"] - metrics["loss"].value
  np.testing.assert_allclose(extra, 3 * jnp.sum(each * factors[:, 0]), rtol=1e-4)
  rest = {"finite": 1, "in_a_row": 0, "unlabelled": 0}
  told = summarize({**metrics, **rest}, decoder.layer_groups)["layers"]
  np.testing.assert_allclose([told[depth]["pressure"] for depth in "01"], factors[:, 0], rtol=1e-6)


def test_the_factor_of_each_layer_follows_its_own_number_of_experts_a_token(decoder_of, params_of):
  router = ReLU(target=1.5, rate=2.0)
  decoder = decoder_of(router=router, balance=(Sparsity(),))
  params = params_of(decoder)
  counts, ten, none = np.float32([[9, 3, 5, 1], [2, 3, 4, 1]]), np.float32([10, 10]), np.zeros(2)
  sums = MoESums(RouterSums(counts, counts, ten, none, none, counts, ten), {})
  zeros, none = jax.tree.map(jnp.zeros_like, params), {"0": {"0": None}}
  after = decoder.update_buffers(params, zeros, {"0": {"0": sums}}, none)
  right = buffer_of(params, "pressure") * np.float32([[2.0], [0.5]])
  np.testing.assert_allclose(buffer_of(after, "pressure"), right, rtol=1e-6)
