"""Back ends in the recipe: names, old files, and which devices a choice is for."""

import dataclasses
import json
import types

import jax
import numpy as np
import pytest

from jaxmoe.core.backends import AUTO, ChoiceLog, Chooser, Devices
from jaxmoe.core.config_io import from_json, override, to_json
from jaxmoe.core.errors import InputError
from jaxmoe.runs.recipe_loading import load_recipe
from jaxmoe.train.experiment import Experiment, unsafe_changes
from jaxmoe.train.kernels import OPERATIONS, Kernels, references


@pytest.fixture(scope="module")
def recipe():
  return load_recipe("tiny", [])


def changed(recipe, *changes):
  return override(recipe, [tuple(change.split("=")) for change in changes])


def before(recipe, **fields):
  """Returns the recipe in JSON as files of before had it, with these fields of every layer."""
  plain = json.loads(to_json(recipe))
  del plain["kernels"]
  for group in plain["model"]["stack"]:
    for block in group["pattern"]:
      block["ffn"]["dispatch"]["backend"] = fields.get("backend", "auto")
      block["ffn"]["exchange"]["ragged"] = fields.get("ragged", "no")
  return from_json(Experiment, json.dumps(plain))


def test_every_operation_is_a_field_and_has_back_ends_that_serve_a_cpu():
  assert [field.name for field in dataclasses.fields(Kernels)] == list(OPERATIONS)
  assert Kernels() == Kernels(**dict.fromkeys(OPERATIONS, AUTO)) and Kernels().asked == ()
  for name, backends in OPERATIONS.items():
    assert len(backends) >= 1, name


def test_a_recipe_names_a_back_end_and_an_unknown_one_is_refused(recipe):
  asked = changed(recipe, "kernels.grouped_matmul=loop")
  assert asked.kernels.asked == (("grouped_matmul", "loop"),)
  assert from_json(Experiment, to_json(asked)) == asked
  with pytest.raises(InputError, match="unknown back end 'lop'; did you mean 'loop'"):
    changed(recipe, "kernels.grouped_matmul=lop")
  with pytest.raises(InputError, match="unknown field of Kernels 'matmul'"):
    changed(recipe, "kernels.matmul=loop")


def test_files_of_before_open_as_what_they_named(recipe):
  assert before(recipe) == recipe
  assert before(recipe, ragged="auto") == recipe
  assert before(recipe, backend="fused").kernels == Kernels(expert_mlp="fused")
  loop = before(recipe, backend="loop", ragged="always").kernels
  assert loop == Kernels(expert_mlp="rows", grouped_matmul="loop", exchange="ragged")


def test_old_paths_are_refused_with_the_new_ones(recipe):
  place = "model.stack.0.pattern.0.ffn"
  with pytest.raises(InputError, match=r"backend: is kernels\.expert_mlp and kernels\.gr"):
    changed(recipe, f"{place}.dispatch.backend=blocks")
  with pytest.raises(InputError, match=r"ragged: is kernels\.exchange now; set --con"):
    changed(recipe, f"{place}.exchange.ragged=always")


def test_a_run_may_go_on_by_other_back_ends(recipe):
  assert unsafe_changes(recipe, changed(recipe, "kernels.expert_mlp=rows")) == {}


def test_a_decoder_chooses_for_the_devices_of_its_layout(recipe):
  assert recipe.decoder().parallel.chooser == Chooser()
  device = types.SimpleNamespace(platform="tpu", device_kind="TPU v5 lite")
  layout = types.SimpleNamespace(mesh=types.SimpleNamespace(devices=np.array([device])))
  chooser = changed(recipe, "kernels.exchange=ragged").decoder(layout).parallel.chooser
  assert chooser == Chooser(Devices("tpu", "TPU v5 lite"), (("exchange", "ragged"),))
  # `auto` of what TPUs have kernels for, and of what they are slow at.
  sizes = dict(zip("TASDGF", (8, 2, 4, 8, 2, 8), strict=True))
  for operation, name in (("expert_mlp", "rows"), ("grouped_matmul", "ragged")):
    backends = OPERATIONS[operation]
    chosen = chooser.choose(operation, backends, "float32", sizes | {"R": 16})
    assert chosen is backends[name]


@pytest.mark.parametrize("shape, name", [((4, 64), "fused"), ((1, 1), "few"), ((2, 1), "few")])
def test_experts_of_a_batch_and_of_a_token_are_chosen_by_their_shapes(recipe, shape, name):
  log = ChoiceLog()
  decoder = recipe.decoder(log=log)
  jax.eval_shape(decoder, decoder.shapes, jax.ShapeDtypeStruct(shape, "int32"))
  chosen = {choice.operation: choice.backend for choice in log.take()}
  assert chosen["expert_mlp"] == name and "top_k" in chosen


def test_attention_experts_choose_by_the_recipe_too():
  log = ChoiceLog()
  asked = load_recipe("tiny:attention=experts", ["--config.kernels.move=reference"])
  decoder = asked.decoder(log=log)
  jax.eval_shape(decoder, decoder.shapes, jax.ShapeDtypeStruct((1, 8), "int32"))
  moves = [choice.backend for choice in log.take() if choice.operation == "move"]
  assert moves == ["reference"]


def test_references_are_taken_where_there_is_one():
  sizes = dict(zip("TASDGFR", (8, 2, 4, 8, 2, 8, 16), strict=True))
  for operation, name in (("expert_mlp", "reference"), ("grouped_matmul", "loop")):
    backends = OPERATIONS[operation]
    assert references().choose(operation, backends, "float32", sizes) is backends[name]


def test_stick_breaking_of_before_names_its_back_end_and_long_rows_go_in_blocks(recipe):
  plain = json.loads(to_json(recipe))
  del plain["kernels"]
  stick = {"kind": "stick_breaking", "num_heads": 2, "num_kv_heads": 1, "head_dim": 16,
           "mask": {"kind": "document"}}  # fmt: skip
  for at, (backend, asked) in enumerate({"reference": "reference", "blocks": AUTO}.items()):
    inside = {"kind": "experts", "heads": {**stick, "backend": backend}}
    attention = [{**stick, "backend": backend}, inside][at]
    plain["model"]["stack"][0]["pattern"][0]["attention"] = attention
    old = from_json(Experiment, json.dumps(plain))
    assert old.kernels == Kernels(stick_breaking=asked)
  with pytest.raises(InputError, match=r"backend: is kernels\.stick_breaking now"):
    changed(old, "model.stack.0.pattern.0.attention.heads.backend=blocks")


@pytest.mark.parametrize(
  "platform, slots, length, name",
  [
    ("cpu", 64, 64, "reference"), ("cpu", 127, 127, "reference"), ("cpu", 128, 128, "blocks"),
    ("cpu", 4096, 1, "reference"), ("tpu", 4096, 4096, "reference"), ("tpu", 8192, 8192, "blocks"),
  ],
)  # fmt: skip
def test_attention_goes_in_blocks_where_rows_are_long(platform, slots, length, name):
  sizes = {"B": 1, "L": length, "S": slots, "N": 4, "K": 2, "H": 8, "P": 8}
  backends, devices = OPERATIONS["attention"], Devices(platform)
  choose = lambda chooser, *features: chooser.choose(  # noqa: E731
    "attention", backends, "float32", sizes, features
  )
  assert choose(Chooser(devices)) is backends[name]
  # Asked for, it is taken at any length; a mask that is no span has the reference, and it is said.
  asked = (("attention", "blocks"),)
  assert choose(Chooser(devices, asked)) is backends["blocks"]
  log = ChoiceLog()
  assert choose(Chooser(devices, log=log), "masks that are no span") is backends["reference"]
  assert "blocks has no masks that are no span" in str(log.take()[0])
  with pytest.raises(InputError, match="has no masks that are no span; what fits: auto, ref"):
    choose(Chooser(devices, asked), "masks that are no span")
