"""What looking at a step costs, by the compiler's own count: no more than a trace of the step."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from jaxmoe.core.layout import one_device
from jaxmoe.optim import make_optimizer, make_schedule
from jaxmoe.runs.recipe_loading import load_recipe
from jaxmoe.train.gradients import make_gradients
from jaxmoe.train.step import TrainStep
from jaxmoe.train.train_state import StateSpec

FLOPS, BYTES = 0.005, 0.02  # shares of the step's


def unbalanced(experiment):
  """Returns a recipe without balance losses, whose routers count for the metrics alone."""
  (group,) = experiment.model.stack
  (block,) = group.pattern
  moe = dataclasses.replace(block.ffn, balance=())
  group = dataclasses.replace(group, pattern=(dataclasses.replace(block, ffn=moe),))
  model = dataclasses.replace(experiment.model, stack=(group,))
  return dataclasses.replace(experiment, model=model)


def costs(experiment):
  """Returns FLOPs and bytes of the step as it is, and of one that returns the loss alone."""
  decoder, optim = experiment.decoder(), experiment.optim
  transform = make_optimizer(optim, 30, decoder.parameter_names, decoder.dims)
  shapes = StateSpec(decoder, transform, one_device(), 16).shapes
  gradients = make_gradients(decoder, experiment.train.num_micro)
  step = TrainStep(gradients, transform, make_schedule(optim, 30), 0)
  shape = (experiment.train.batch_size, experiment.data.seq_len)
  names = ("ids", "labels", "position", "segment")
  batch = {name: jax.ShapeDtypeStruct(shape, jnp.int32) for name in names}

  def bare(state, batch):
    state, metrics = step(state, batch)
    return state, metrics["loss"]

  found = []
  for function in (step, bare):
    compiled = jax.jit(function, donate_argnums=0).lower(shapes, batch).compile()
    analysis = compiled.cost_analysis()
    found.append((analysis["flops"], analysis["bytes accessed"]))
  return found


SLOW = [
  pytest.param(names, balance, marks=pytest.mark.slow)
  for names in ("", ":dispatch=capacity", ":dispatch=dense") for balance in (True, False)
  if names or not balance
]  # fmt: skip


@pytest.mark.parametrize("names, balance", [("", True), *SLOW])
def test_metrics_cost_next_to_nothing(names, balance):
  # Unrolled, since the compiler counts the body of a loop once.
  experiment = load_recipe(f"configs/tiny.py{names}", ["--config.model.scan=false"])
  (flops, size), (bare_flops, bare_size) = costs(experiment if balance else unbalanced(experiment))
  assert 0 < flops - bare_flops <= FLOPS * bare_flops
  assert 0 < size - bare_size <= BYTES * bare_size
