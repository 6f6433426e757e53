import itertools
import pathlib

import pytest

from jaxmoe.core.config_io import from_json, override, to_json
from jaxmoe.core.errors import InputError
from jaxmoe.models.block import ATTENTION
from jaxmoe.moe.balance import BALANCE
from jaxmoe.moe.dispatch import DISPATCHERS
from jaxmoe.moe.experts import EXPERTS
from jaxmoe.moe.routers import ROUTERS
from jaxmoe.optim import OPTIMIZERS
from jaxmoe.runs.recipe_loading import load_recipe
from jaxmoe.train.experiment import Evaluation, Experiment, Samples, Train, unsafe_changes

CONFIGS = sorted(str(path) for path in pathlib.Path("configs").glob("*.py"))
FAMILIES = {
  "attention": ATTENTION, "router": ROUTERS, "experts": EXPERTS, "dispatch": DISPATCHERS,
  "optimizer": OPTIMIZERS,
}  # fmt: skip
VARIANTS = [
  f"configs/tiny.py:{keyword}={name}" for keyword, family in FAMILIES.items() for name in family
]
recipes = pytest.mark.parametrize("spec", [*CONFIGS, *VARIANTS])


def test_there_are_recipes():
  assert len(CONFIGS) >= 5


@recipes
def test_a_recipe_survives_json_and_text_survives_the_recipe(spec):
  recipe = load_recipe(spec, [])
  text = to_json(recipe)
  assert from_json(Experiment, text) == recipe
  assert to_json(from_json(Experiment, text)) == text


@recipes
def test_a_recipe_does_not_depend_on_how_often_it_is_loaded(spec):
  assert load_recipe(spec, []) == load_recipe(spec, [])


@pytest.mark.parametrize("spec", VARIANTS)
def test_a_named_component_is_the_one_in_the_recipe(spec):
  keyword, name = spec.split(":")[1].split("=")
  recipe = load_recipe(spec, [])
  block = recipe.model.stack[0].pattern[0]
  places = {"optimizer": recipe.optim, "attention": block}
  found = getattr(places.get(keyword, block.ffn), keyword)
  assert found == FAMILIES[keyword][name][1]


@pytest.mark.parametrize("balance", BALANCE)
def test_a_balance_loss_brings_the_experts_that_it_is_about(balance):
  moe = load_recipe(f"configs/tiny.py:balance={balance}", []).model.stack[0].pattern[0].ffn
  right = {"null_averaged": "null", "heterogeneous": "zero_copy_constant"}.get(balance, "swiglu")
  assert moe.experts == EXPERTS[right][1]
  assert BALANCE[balance][1] in moe.balance


@pytest.mark.parametrize("spec", CONFIGS)
def test_every_recipe_has_what_every_recipe_has(spec):
  recipe = load_recipe(
    spec, [f"--config.train.{name}=48" for name in ("num_steps", "batch_size", "seed", "num_micro")]
  )
  assert (recipe.train.num_steps, recipe.train.batch_size, recipe.train.seed) == (48, 48, 48)


def test_overrides_in_any_order_agree_also_where_an_order_passes_through_nonsense():
  """16 of 8 experts are active after the first of these, until there are 32."""
  where = "--config.model.stack.0.pattern.0.ffn"
  overrides = [
    f"{where}.num_active=16", f"{where}.num_experts=32", "--config.train.num_micro=6",
    "--config.train.batch_size=12",
  ]  # fmt: skip
  made = [load_recipe("configs/tiny.py", order) for order in itertools.permutations(overrides)]
  assert made.count(made[0]) == 24
  assert made[0].model.stack[0].pattern[0].ffn.num_active == 16
  assert made[0].train.num_micro == 6


WRONG = (
  (Train, {"num_steps": 0}), (Train, {"batch_size": -1}), (Train, {"max_skips": -1}),
  (Train, {"batch_size": 6, "num_micro": 4}), (Train, {"seed": 2**32}), (Train, {"seed": -1}),
  (Train, {"keep": 0}), (Train, {"checkpoint_every": 0}), (Train, {"log_every": 0}),
  (Evaluation, {"every": -1}), (Evaluation, {"max_bytes": 0}), (Evaluation, {"batch_size": 0}),
  (Samples, {"every": -1}), (Samples, {"max_tokens": 0}), (Samples, {"temperature": -0.5}),
  (Samples, {"top_p": 0.0}), (Samples, {"top_p": 1.5}), (Samples, {"prompts": ("a", "")}),
)  # fmt: skip


@pytest.mark.parametrize("cls, values", WRONG, ids=str)
def test_values_that_make_no_sense_are_refused_with_the_name_of_the_field(cls, values):
  with pytest.raises(InputError, match=next(iter(values)).rstrip("s")):
    cls(**values)


def test_only_safe_changes_go_unreported():
  tiny = load_recipe("configs/tiny.py", [])
  changes = {
    "train.num_steps": "7", "samples.prompts": "x,y",
    "data.worker": "process", "data.cache_bytes": "9", "optim.schedule.earlier_ends": "3,5",
  }  # fmt: skip
  safe = override(tiny, list(changes.items()))
  assert unsafe_changes(tiny, safe) == {}
  both = override(safe, [("optim.learning_rate", "0.5")])
  assert unsafe_changes(tiny, both) == {"optim.learning_rate": (tiny.optim.learning_rate, 0.5)}
  shorter = load_recipe("configs/tiny.py:dispatch=capacity", [])
  assert any("dispatch" in path for path in unsafe_changes(tiny, shorter))


def test_the_vocabulary_of_the_model_is_the_tokenizers():
  decoder = load_recipe("configs/tiny.py", []).decoder()
  assert decoder.shapes["embed"]["table"].shape[0] == 257
