"""Bytes that are told of slots are those that a step makes."""

import dataclasses
import math

import jax
import pytest

from configs.tiny import get_config
from jaxmoe.parallel import Parallel, make_layout, tick_scan
from jaxmoe.plan.pipeline_slots import slot_bytes
from jaxmoe.train import pipeline_gradients
from jaxmoe.train.step import abstract_batch, abstract_state, lower_step
from jaxmoe.train.train_state import StateSpec


def recipe(**degrees):
  """Returns a recipe without a loss that is counted by passes, and slots, of its own."""
  found = get_config()
  model = found.model.map_ffns(lambda ffn: dataclasses.replace(ffn, balance=()))
  data = dataclasses.replace(found.data, seq_len=16)
  train = dataclasses.replace(found.train, batch_size=8, num_micro=4)
  parts = {"parallel": Parallel(**degrees), "train": train, "data": data, "model": model}
  return dataclasses.replace(found, **parts)


def made(experiment, layout, monkeypatch):
  """Returns bytes of all slots that a lowered step makes."""
  seen = []
  empty_slots = tick_scan.empty_slots

  def counted(count, leaf):
    seen.append(count * math.prod(leaf.shape) * leaf.dtype.itemsize)
    return empty_slots(count, leaf)

  for module in (tick_scan, pipeline_gradients):
    monkeypatch.setattr(module, "empty_slots", counted)
  decoder = experiment.decoder(layout)
  transform, masters = experiment.transform(decoder), experiment.masters(decoder)
  spec = StateSpec(decoder, transform, layout, 2, masters)
  train = dataclasses.replace(
    experiment.train, recovery=dataclasses.replace(experiment.train.recovery, spike_window=2)
  )
  given = abstract_state(spec), abstract_batch(experiment, layout)
  lower_step(dataclasses.replace(experiment, train=train), decoder, spec, layout, *given)
  monkeypatch.undo()
  return sum(seen)


@pytest.mark.parametrize("pipeline", ["1f1b", pytest.param("zb_h1", marks=pytest.mark.slow)])
def test_bytes_of_slots_are_those_that_a_step_makes(pipeline, monkeypatch):
  experiment = recipe(pipe=2, fsdp=2, pipeline=pipeline)
  layout = make_layout(experiment.parallel, jax.devices()[:4])
  told = slot_bytes(experiment, experiment.decoder(layout), layout)
  assert bool(told["input"]["deferred"]) == (pipeline == "zb_h1")
  assert told["input"]["kept"] == 0 < told["residuals"]["kept"]
  for keep, pools in told.items():
    parallel = dataclasses.replace(experiment.parallel, keep=keep)
    chosen = dataclasses.replace(experiment, parallel=parallel)
    assert made(chosen, layout, monkeypatch) == sum(pools.values())


def test_there_are_none_without_a_pipeline():
  experiment = recipe()
  assert slot_bytes(experiment, experiment.decoder(), make_layout(experiment.parallel)) == {}
