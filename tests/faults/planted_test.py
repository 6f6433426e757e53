"""Every fault can be planted: the places are there, and what is done there reaches the program."""

import pathlib
import re

import jax
import pytest

from jaxmoe.core.layout import one_device
from jaxmoe.runs.recipe_loading import load_recipe
from jaxmoe.train.step import abstract_batch, abstract_state, lower_step
from jaxmoe.train.train_state import StateSpec
from tests.faults import numbers, plants, points, workers
from tests.planted_faults import FAULTS

FOLDER = pathlib.Path(__file__).parent
OPTIONS = {
  "nan_in_batch": {"place": 0, "token": 257},
  "nan_in_parameter": {"leaf": "embed"},
  "nan_in_router_score": {},
  "huge_parameters": {"factor": 30.0},
  "loss_spike": {"factor": 100.0},
}


@pytest.fixture(autouse=True)
def _restored():
  yield
  numbers.restore()


def targets():
  """Returns every place that a file of this folder names, its constants written out."""
  found = set()
  names = "|".join(name for name, value in vars(points).items() if isinstance(value, str))
  for path in FOLDER.glob("*.py"):
    text = path.read_text()
    text = re.sub(rf"\{{(?:points\.)?({names})\}}", lambda at: vars(points)[at[1]], text)
    found |= set(re.findall(r"\"((?:jaxmoe|jax)[.\w]*:[.\w]+)\"", text))
  return sorted(found)


def test_every_place_is_there():
  places = targets()
  drawn = {at.target for of in points.POINTS.values() for at in of if hasattr(at, "target")}
  assert drawn < set(places)
  for target in places:
    plants.find(target)


def test_every_fault_of_a_layout_has_its_place():
  for name, fault in FAULTS.items():
    assert hasattr(fault.owner, fault.name), name


def test_faults_of_batches_and_workers_take_their_places():
  numbers.nan_in_batch([1], 0, 257)
  workers.watch_worker(1.0)
  assert [name for _, name, _ in numbers.SWAPPED] == ["__next__", "_AHEAD", "__init__", "stall_s"]
  for owner, name, original in numbers.SWAPPED:
    assert getattr(owner, name) is not original


@pytest.fixture(scope="module")
def lowered():
  """Returns a function that returns the text of a step, lowered and not compiled."""
  root = FOLDER.parents[1]
  recipe = load_recipe(f"{root}/configs/tiny.py", ["--config.model.stack.0.repeats=1"])
  decoder, layout = recipe.decoder(), one_device()
  spec = StateSpec(decoder, recipe.transform(decoder), layout, 3)

  def text():
    arguments = abstract_state(spec), abstract_batch(recipe, layout)
    return lower_step(recipe, decoder, spec, layout, *arguments).as_text()

  return text


@pytest.fixture(scope="module")
def sound(lowered):
  return lowered()


def test_all_faults_are_tried():
  assert set(OPTIONS) == set(numbers.FAULTS)


@pytest.mark.parametrize("name", [n for n in OPTIONS if n not in numbers.IN_BATCHES])
def test_a_fault_of_numbers_is_in_the_program_of_a_step(lowered, sound, name):
  numbers.FAULTS[name]([4], **OPTIONS[name])
  assert str(numbers.MARK) in lowered()
  numbers.restore()
  assert str(numbers.MARK) not in sound
  jax.clear_caches()
