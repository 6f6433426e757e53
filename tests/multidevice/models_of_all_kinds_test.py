"""Every recipe at toy size and every public family trains with rows, layers and both cut."""

import dataclasses
import functools
import json
import pathlib

import numpy as np
import pytest

import jaxmoe
from configs.tiny import get_config
from jaxmoe.models.attention import SoftmaxAttention
from jaxmoe.models.block import MLPConfig
from jaxmoe.models.pretrained import FAMILIES
from jaxmoe.models.pretrained.config_reader import ConfigReader
from jaxmoe.models.transformer import TransformerConfig
from jaxmoe.moe.layer import MoEConfig
from jaxmoe.parallel import Parallel
from jaxmoe.recipes import RECIPES
from jaxmoe.train.experiment import Experiment

GOLDEN = pathlib.Path(__file__).parents[1] / "models" / "pretrained" / "golden"
STEPS, MICRO = 20, 4
LAYOUTS = (
  Parallel(context=2, attend="ring"),
  Parallel(pipe=2),
  Parallel(context=2, pipe=2, attend="ring"),
)


def shrunk(model: TransformerConfig) -> TransformerConfig:
  """Returns a model of the same kinds of layers, small."""

  def block(of):
    attention, ffn = of.attention, of.ffn
    if isinstance(attention, SoftmaxAttention):
      kv = 1 if attention.num_kv_heads < attention.num_heads else 2
      attention = dataclasses.replace(attention, num_heads=2, num_kv_heads=kv, head_dim=8)
    if isinstance(ffn, MoEConfig):
      experts = dataclasses.replace(ffn.experts, mlp_dim=16)
      sizes = {"num_experts": 4, "num_active": min(ffn.num_active, 2)}
      ffn = dataclasses.replace(ffn, experts=experts, **sizes)
    elif isinstance(ffn, MLPConfig):
      ffn = dataclasses.replace(ffn, mlp_dim=16)
    return dataclasses.replace(of, attention=attention, ffn=ffn)

  groups = tuple(
    dataclasses.replace(group, pattern=tuple(map(block, group.pattern)), repeats=2)
    for group in model.stack
  )
  return dataclasses.replace(model, dim=16, stack=groups, dtype="float32")


def small(base: Experiment, model: TransformerConfig) -> Experiment:
  """Returns a run of some steps of a model, on the text of `tiny`."""
  data = dataclasses.replace(get_config().data, seq_len=32)
  schedule = get_config().optim.schedule
  return dataclasses.replace(
    base, data=data, model=model, optim=dataclasses.replace(base.optim, schedule=schedule),
    train=dataclasses.replace(base.train, num_steps=STEPS, batch_size=4, num_micro=MICRO),
    evaluation=dataclasses.replace(base.evaluation, every=0),
  )  # fmt: skip


def recipe(name):
  found = RECIPES[name]()
  return small(found, shrunk(found.model))


def family(name):
  config = json.loads((GOLDEN / name / "config.json").read_text())
  model = FAMILIES[name].read(ConfigReader(config, "config.json"))
  return small(get_config(), getattr(model, "model", model))


MODELS = {
  **{name: functools.partial(recipe, name) for name in RECIPES},
  **{name: functools.partial(family, name) for name in FAMILIES},
}


def losses(experiment, folder):
  jaxmoe.fit(experiment, folder, allow_unproven=True)
  lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
  return np.array([line["loss"] for line in lines])


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_twenty_steps_are_those_of_one_device(name, tmp_path):
  experiment = MODELS[name]()
  true = losses(experiment, tmp_path / "one")
  assert len(true) == STEPS and np.isfinite(true).all()
  for number, parallel in enumerate(LAYOUTS):
    found = losses(dataclasses.replace(experiment, parallel=parallel), tmp_path / str(number))
    np.testing.assert_allclose(found[:5], true[:5], rtol=1e-5, err_msg=str(parallel))
    np.testing.assert_allclose(found, true, rtol=1e-3, err_msg=str(parallel))
