"""Every recipe: by name and path it is one, comes back from JSON, and builds without allocating."""

import dataclasses
import importlib
import json
import pathlib

import jax
import pytest

from jaxmoe.core.config_io import from_json, from_plain, to_json, to_plain
from jaxmoe.core.errors import InputError
from jaxmoe.recipes import RECIPES
from jaxmoe.runs.recipe_loading import file_of, kept_line, load_recipe, recipe_origin
from jaxmoe.train.experiment import Experiment, unsafe_changes

ROOT = pathlib.Path(__file__).parents[2]
CONFIGS_FOLDER, NAMED = ROOT / "configs", ROOT / "jaxmoe" / "recipes"
CONFIGS = sorted(CONFIGS_FOLDER.glob("*.py"))
PUBLISHED = {  # parameters of the released weights, and the active ones in billions as printed
  "olmoe_1b_7b": (6_919_161_856, 1.28),
  "mixtral_8x7b": (46_702_792_704, 12.9),
  "qwen3_30b_a3b": (30_532_122_624, 3.3),
}


@pytest.fixture(params=CONFIGS, ids=lambda path: path.stem)
def recipe(request):
  return request.param


def arrays_in_memory():
  return sum(array.nbytes for array in jax.live_arrays())


def active_params(experiment, decoder):
  """Counts what one token meets: all leaves, but of each layer's experts only the active ones."""
  total = 0
  for path, leaf in jax.tree_util.tree_leaves_with_path(decoder.shapes):
    keys = [str(entry.key) for entry in path]
    share = 1.0
    if "experts" in keys:
      layer = experiment.model.stack[int(keys[1])].pattern[int(keys[2])].ffn
      share = layer.num_active / layer.num_experts
    total += leaf.size * share
  return total


def test_a_recipe_comes_back_from_json_as_it_was(recipe):
  experiment = load_recipe(str(recipe), [])
  assert from_json(Experiment, to_json(experiment)) == experiment


def test_a_recipe_says_how_it_is_run(recipe):
  by_path, by_name = (path.read_text() for path in (recipe, NAMED / recipe.name))
  assert f"python -m launch.train --config=configs/{recipe.name} --workdir=" in by_path
  assert f"jaxmoe train --config={recipe.stem} --workdir=" in by_name
  assert all(len(line) <= 100 for text in (by_path, by_name) for line in text.splitlines())


def test_a_name_and_a_path_are_the_same_objects():
  named = {path.stem for path in NAMED.glob("*.py")} - {"__init__"}
  assert set(RECIPES) == named == {path.stem for path in CONFIGS}
  for name, get_config in RECIPES.items():
    assert importlib.import_module(f"configs.{name}").get_config is get_config
    assert get_config.__module__ == f"jaxmoe.recipes.{name}"


def test_a_name_loads_from_any_folder(tmp_path, monkeypatch):
  here = load_recipe(f"{CONFIGS_FOLDER / 'tiny.py'}:router=switch", ["--config.train.num_steps=7"])
  monkeypatch.chdir(tmp_path)
  assert load_recipe("tiny:router=switch", ["--config.train.num_steps=7"]) == here
  assert file_of("tiny:router=switch") == "tiny"
  origin = recipe_origin("tiny:router=switch", here)
  assert origin["name"] == "tiny:router=switch"
  assert origin["changes"]["train.num_steps"] == [30, 7]


def test_a_recipe_builds_its_decoder_without_allocating_its_parameters(recipe):
  before = arrays_in_memory()
  decoder = load_recipe(str(recipe), []).decoder()
  assert arrays_in_memory() - before < 1e6
  assert all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(decoder.shapes))
  assert decoder.num_params > 1e4


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_shape_has_the_published_numbers_of_parameters(name):
  experiment = load_recipe(str(CONFIGS_FOLDER / f"{name}.py"), [])
  decoder = experiment.decoder()
  total, active = PUBLISHED[name]
  assert decoder.num_params == total
  # Rounded or cut: Qwen3's 3.35 is printed as 3.3.
  assert abs(active_params(experiment, decoder) / 1e9 - active) < 0.06


def test_the_active_parameters_of_the_record_are_those_of_the_leaves(recipe):
  experiment = load_recipe(str(recipe), [])
  decoder = experiment.decoder()
  small = sum(
    leaf.size
    for path, leaf in jax.tree_util.tree_leaves_with_path(decoder.shapes)
    if {str(entry.key) for entry in path} & {"scale", "embed", "head"}
  )
  assert experiment.model.active_params() == active_params(experiment, decoder) - small


@pytest.mark.parametrize("keyword", ["dispatch=dense", "dispatch=capacity,optimizer=lion"])
def test_components_are_named_in_the_config_argument(keyword):
  experiment = load_recipe(f"{CONFIGS_FOLDER / 'tiny.py'}:{keyword}", [])
  plain = to_json(experiment)
  assert all(f'"kind": "{pair.split("=")[1]}"' in plain for pair in keyword.split(","))


def test_a_keyword_has_the_type_its_annotation_says():
  path = str(CONFIGS_FOLDER / "quickstart.py")
  experiment = load_recipe(f"{path}:num_experts=4,num_steps=500", ["--config.train.seed=7"])
  assert experiment.train.num_steps == 500
  assert experiment.train.seed == 7
  assert experiment.model.stack[0].pattern[0].ffn.num_experts == 4


def test_a_config_json_with_names_of_before_opens_and_nothing_differs():
  path = pathlib.Path(__file__).parents[1] / "launch" / "before" / "bfloat16" / "config.json"
  old = json.loads(path.read_text())
  experiment = load_recipe(str(path), [])
  plain = to_plain(experiment)
  expert = lambda tree: tree["model"]["stack"][0]["pattern"][0]["ffn"]["experts"]  # noqa: E731
  assert expert(old)["hidden"] == expert(plain)["mlp_dim"] == 16
  assert "hidden" not in expert(plain)
  assert unsafe_changes(experiment, from_plain(Experiment, plain)) == {}
  assert experiment == from_plain(Experiment, old)


def test_an_old_name_of_a_field_is_refused_with_the_new_one(tmp_path):
  tiny = str(CONFIGS_FOLDER / "tiny.py")
  where = "config.model.stack.0.pattern.0.ffn.experts"
  with pytest.raises(InputError, match=rf"{where}\.hidden: is called mlp_dim now; set {where}"):
    load_recipe(tiny, [f"--{where}.hidden=64"])
  path = tmp_path / "mine.py"
  path.write_text(
    "from jaxmoe.moe.experts.swiglu import SwiGLU\n\n\ndef get_config():\n  SwiGLU(hidden=4)\n"
  )
  with pytest.raises(InputError, match=r"mine.py:5: .*hidden is called mlp_dim now; mend") as told:
    load_recipe(str(path), [])
  assert "\n" not in str(told.value)


def as_before(record):
  """The record with every field that came later as it was before."""
  if isinstance(record, tuple):
    return tuple(as_before(item) for item in record)
  if not dataclasses.is_dataclass(record):
    return record
  fields = dataclasses.fields(record)
  values = {
    field.name: field.metadata["before"] if "before" in field.metadata
    else as_before(getattr(record, field.name)) for field in fields
  }  # fmt: skip
  return dataclasses.replace(record, **values)


def test_a_run_of_before_goes_on_by_the_command_that_began_it(recipe):
  asked = load_recipe(str(recipe), [])
  old = to_plain(as_before(asked), as_before=True)
  assert unsafe_changes(from_plain(Experiment, old), asked), "nothing came later"
  for overrides, changed in ([], set()), (["--config.optim.no_decay=x"], {"optim.no_decay.0"}):
    experiment = load_recipe(str(recipe), overrides, old)
    changes = unsafe_changes(from_plain(Experiment, old), experiment)
    assert {path for path in changes if path.endswith(".0")} == changed
    assert bool(changes) == bool(overrides)
  named = dataclasses.replace(asked, optim=dataclasses.replace(asked.optim, no_decay=("*bias",)))
  assert kept_line(asked, named).endswith("where new runs have other defaults: optim.no_decay")
