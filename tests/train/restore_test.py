"""What is said where the learning rate of a run that goes on is another than was due."""

import dataclasses

import pytest

from jaxmoe.core.config_io import override
from jaxmoe.optim import SCHEDULES
from jaxmoe.runs.recipe_loading import load_recipe
from jaxmoe.train.restore import redrawn


@pytest.fixture(scope="module")
def recipe():
  """Returns a function (schedule, num_steps, earlier_ends) -> an experiment with a peak of 1."""
  tiny = override(load_recipe("configs/tiny.py", []), [("optim.learning_rate", "1.0")])

  def make(schedule, num_steps, *earlier_ends):
    fields = {"warmup_steps": 2} | ({"earlier_ends": earlier_ends} if earlier_ends else {})
    optim = dataclasses.replace(tiny.optim, schedule=SCHEDULES[schedule][0](**fields))
    train = dataclasses.replace(tiny.train, num_steps=num_steps)
    return dataclasses.replace(tiny, optim=optim, train=train)

  return make


def test_a_cosine_that_is_drawn_anew_is_told_with_both_rates_and_what_keeps_the_old_end(recipe):
  due, new, text = redrawn(recipe("cosine", 100), recipe("cosine", 200), 100)
  assert due == pytest.approx(0.1) and new == pytest.approx(0.557, abs=1e-3)
  assert "goes from 0.1 to 0.557 here" in text and "over 200 steps" in text
  assert text.endswith("with --config.optim.schedule.earlier_ends=100 it goes on from 0.1")


def test_one_that_keeps_its_end_is_not_told(recipe):
  longer = recipe("cosine", 200, 100)
  for update in (0, 60, 100):
    assert redrawn(recipe("cosine", 100), longer, update) is None
  assert redrawn(longer, recipe("cosine", 300, 100, 200), 200) is None
  _, _, text = redrawn(longer, recipe("cosine", 300, 100), 200)
  assert "earlier_ends=100,200 it goes on from 0.01" in text


def test_a_run_cut_short_is_told_without_advice(recipe):
  due, new, text = redrawn(recipe("cosine", 200), recipe("cosine", 100), 60)
  assert new < due and "earlier_ends" not in text


def test_a_decay_that_ended_at_zero_has_no_end_to_go_on_from(recipe):
  due, new, text = redrawn(recipe("wsd", 100), recipe("wsd", 200), 100)
  assert (due, new) == (0.0, 1.0) and "earlier_ends" not in text


@pytest.mark.parametrize("schedule, update", [("constant", 100), ("wsd", 50)])
def test_a_rate_that_stays_is_not_told(recipe, schedule, update):
  assert redrawn(recipe(schedule, 100), recipe(schedule, 200), update) is None
