"""Domains treated alike by routers that are trees, through whole steps of training."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxmoe.core import param_names
from jaxmoe.core.config_io import override
from jaxmoe.core.errors import InputError
from jaxmoe.core.layout import one_device
from jaxmoe.core.rng import Keys
from jaxmoe.core.tokens import Compare, Tokens
from jaxmoe.moe.routers import TopK
from jaxmoe.moe.routers.tree import TreeGateConfig
from jaxmoe.optim import Constant, OnlineFairness, Optim, guarded, make_schedule
from jaxmoe.recipes import tiny
from jaxmoe.train.gradients import make_gradients
from jaxmoe.train.step import TrainStep
from jaxmoe.train.train_state import State, StateSpec

LENGTH, MICRO, S = 12, 4, 3
# Two rows a microbatch, full, half, of one token and of padding alone.
ROWS = ((9,), (4, 3), (1,), (), (12,), (7, 5), (), ())
GATE = "stack/0/0/moe/router/gate"
CONFIGS = {
  target: OnlineFairness(0.7, target, decay=0.9, delta=0.2) for target in ("parity", "load")
}
targets = pytest.mark.parametrize("target", ["parity", "load"])


@pytest.fixture(scope="module")
def decoder(decoder_of):
  return decoder_of(router=TopK(gate=TreeGateConfig()))


@pytest.fixture(scope="module")
def batch(batch_of):
  """Domains change within rows and microbatches, and padding has some, too."""
  made = batch_of(ROWS, LENGTH)
  domain = np.random.default_rng(3).integers(0, S, made["ids"].shape)
  return {**made, "domain": np.where(made["ids"] % 2, domain, 0).astype(np.int32)}


@pytest.fixture(scope="module")
def run(decoder, params_of):
  """Returns a function (fairness, batch, num_micro) -> the state after steps that add gradients."""

  @functools.cache
  def make(fairness, num_micro):
    transform = guarded(optax.identity())
    if fairness is not None:
      transform = optax.chain(fairness.transform(decoder.tree_paths, S), transform)
    compare = None if fairness is None else Compare(S, fairness.target)
    gradients = make_gradients(decoder, num_micro, compare=compare)
    schedule = make_schedule(Optim(schedule=Constant()), 9)
    params = params_of(decoder)
    state = State.create(params, transform.init(params))
    return state, jax.jit(TrainStep(gradients, transform, schedule, 0))

  def get(fairness, batch, num_micro=1, steps=1, change=lambda state: state):
    state, step = make(fairness, num_micro)
    state = change(state)
    for _ in range(steps):
      state, metrics = step(state, batch)
    assert all(sums.domain_sums is None for sums in metrics["layers"]["0"].values())
    return jax.device_get(state)

  return get


def objective(decoder, params, batch, layer, config):
  """The penalty of a layer, of the probabilities of leaves that it reports of the whole batch."""
  tokens = dataclasses.replace(Tokens.of_batch(batch), return_routing=True)
  _, _, sums = decoder.hidden(params, tokens)
  leaf_TE = sums["0"]["0"].routing.scores_TE[layer]
  if config.target == "load":
    values = leaf_TE
  else:
    left, right = leaf_TE[:, 0] + leaf_TE[:, 1], leaf_TE[:, 2] + leaf_TE[:, 3]
    values = jnp.stack([left, leaf_TE[:, 0] / left, leaf_TE[:, 2] / right], axis=1)
  domain, valid = batch["domain"].reshape(-1), batch["segment"].reshape(-1) > 0
  means = [jnp.mean(values[(domain == group) & valid], axis=0) for group in range(S)]
  total = 0.0
  for one, other in itertools.combinations(means, 2):
    gap = jnp.abs(one - other)
    huber = jnp.where(gap < config.delta, gap**2 / 2, config.delta * (gap - config.delta / 2))
    total += config.weight * jnp.sum(huber) / config.delta
  return total


@targets
def test_a_step_adds_the_gradient_of_the_whole_batch_s_objective_and_nothing_else(
  run, decoder, params_of, batch, target
):
  config = CONFIGS[target]
  params = [run(fairness, batch, MICRO).params for fairness in (config, None)]
  with_, without = map(param_names.flatten, params)
  added = jax.tree.map(jnp.subtract, with_, without)
  slope = jax.jit(jax.grad(lambda params, layer: objective(decoder, params, batch, layer, config)))
  for layer in range(2):
    right = param_names.flatten(slope(params_of(decoder), layer))
    for leaf in ("weight", "bias"):
      expected = right[f"{GATE}/{leaf}"][layer]
      assert np.abs(expected).max() > 0.01
      # After subtraction of parameters of order 1.
      np.testing.assert_allclose(added[f"{GATE}/{leaf}"][layer], expected, rtol=1e-4, atol=2e-6)
  moved = {path for path, leaf in added.items() if np.max(np.abs(leaf)) > 2e-6}
  assert moved == {f"{GATE}/weight", f"{GATE}/bias"}


@targets
def test_means_go_on_over_steps_and_are_alike_however_a_step_is_accumulated(run, batch, target):
  config = CONFIGS[target]
  whole, parts = (run(config, batch, num, steps=3).optimizer[0] for num in (1, MICRO))
  jax.tree.map(
    lambda one, other: np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5), whole, parts
  )
  valid = batch["segment"] > 0
  counts = [np.sum(valid & (batch["domain"] == group)) for group in range(S)]
  expected = (1 + 0.9 + 0.81) * np.array([counts, counts])
  np.testing.assert_allclose(whole[GATE].rows_S, expected, rtol=1e-6)


@targets
def test_padding_counts_in_no_domain(run, batch, target):
  config, padding = CONFIGS[target], batch["segment"] == 0
  changed = {
    **batch,
    "domain": np.where(padding, (batch["domain"] + 1) % S, batch["domain"]),
    "ids": np.where(padding, batch["ids"] + 1, batch["ids"]),
  }
  found = [run(config, given).optimizer for given in (batch, changed)]
  jax.tree.map(np.testing.assert_array_equal, *found)


def test_a_step_that_is_skipped_leaves_the_means_where_they_were(run, batch):
  before = run(CONFIGS["parity"], batch)
  params = jax.tree.map(jnp.array, before.params)
  params["embed"]["table"] = jnp.full_like(params["embed"]["table"], jnp.inf)
  bad = jax.device_put(dataclasses.replace(before, params=params))
  after = run(CONFIGS["parity"], batch, change=lambda _: bad)
  assert after.skipped == 1
  jax.tree.map(np.testing.assert_array_equal, after.optimizer, before.optimizer)


def recipe(router="tree", **fields):
  changes = {"optim.fairness.weight": "0.1", **fields}
  return override(tiny.get_config(router=router), changes.items())


def test_a_recipe_without_a_tree_or_without_domains_is_refused():
  with pytest.raises(InputError, match="no router has one; use the router tree"):
    recipe(router="topk")
  alone = recipe()
  data = dataclasses.replace(alone.data, parts=alone.data.parts[:1])
  with pytest.raises(InputError, match="there is one: parts=1; add a part"):
    dataclasses.replace(alone, data=data)


def test_means_are_saved_layer_by_layer_and_there_are_none_by_default():
  for weight, keeps in (("0", False), ("0.1", True)):
    experiment = recipe(**{"optim.fairness.weight": weight})
    decoder = experiment.decoder()
    transform = experiment.transform(decoder)
    spec = StateSpec(decoder, transform, one_device())
    state = spec.init(0)
    arrays = spec.to_arrays(state)
    found = {name: leaf.shape for name, leaf in arrays.items() if name.endswith("rows_S")}
    right = {f"optimizer/0/layers/{layer}/moe/router/gate/rows_S": (4,) for layer in range(2)}
    assert found == (right if keeps else {})
    assert spec.abstract().keys() == arrays.keys()
    jax.tree.map(np.testing.assert_array_equal, spec.from_arrays(arrays), state)


def test_a_gate_that_is_frozen_is_pulled_nowhere(batch):
  moved = []
  for frozen in ("", "layers/*/moe/router/gate/*"):
    experiment = recipe(**{"optim.frozen": frozen, "optim.schedule.warmup_steps": "0"})
    decoder = experiment.decoder()
    transform = experiment.transform(decoder)
    gradients = make_gradients(decoder, 1, compare=experiment.compare)
    step = TrainStep(gradients, transform, make_schedule(experiment.optim, 9), 0)
    params = decoder.init(Keys.from_seed(0))
    after, _ = jax.jit(step)(State.create(params, transform.init(params)), batch)
    weights = [param_names.flatten(tree)[f"{GATE}/weight"] for tree in (params, after.params)]
    moved.append(float(jnp.abs(weights[1] - weights[0]).max()))
  assert moved[0] > 1e-4 and moved[1] == 0
