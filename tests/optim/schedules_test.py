import dataclasses

import numpy as np
import pytest

from jaxmoe.core.config_io import from_plain, override, to_plain
from jaxmoe.core.errors import InputError
from jaxmoe.optim import SCHEDULES, Constant, Cosine, Optim, Wsd

EVERY = pytest.mark.parametrize("name", SCHEDULES)


def values(schedule, peak, num_steps, steps):
  rate = schedule.schedule(peak, num_steps)
  return np.array([rate(step) for step in steps])


@EVERY
def test_warm_up_rises_in_equal_parts_from_above_zero_to_the_peak(name):
  cls, _ = SCHEDULES[name]
  got = values(cls(warmup_steps=4), 2.0, 40, range(5))
  np.testing.assert_allclose(got, 2.0 * np.arange(1, 6) / 5, rtol=1e-6)


@EVERY
def test_without_warm_up_the_first_update_is_at_the_peak(name):
  cls, _ = SCHEDULES[name]
  np.testing.assert_allclose(values(cls(warmup_steps=0), 2.0, 40, [0]), 2.0, rtol=1e-6)


def test_constant_stays_at_the_peak():
  got = values(Constant(warmup_steps=1), 3.0, 10, [1, 5, 9, 10])
  np.testing.assert_allclose(got, 3.0, rtol=1e-6)


def test_cosine_is_the_formula_and_ends_at_its_fraction():
  got = values(Cosine(warmup_steps=10, final_fraction=0.1), 2.0, 50, [10, 20, 30, 50])
  want = [2.0 * (0.1 + 0.9 * (1 + np.cos(np.pi * part)) / 2) for part in (0, 0.25, 0.5, 1)]
  np.testing.assert_allclose(got, want, rtol=1e-6)
  np.testing.assert_allclose(got[-1], 0.2, rtol=1e-6)


def test_wsd_is_flat_until_the_last_part_and_then_falls_in_a_line():
  schedule = Wsd(warmup_steps=10, decay_fraction=0.2, final_fraction=0.5)
  got = values(schedule, 2.0, 100, [10, 50, 80, 90, 99, 100])
  np.testing.assert_allclose(got, [2.0, 2.0, 2.0, 1.5, 1.05, 1.0], rtol=1e-6)


DECAYING = pytest.mark.parametrize("cls", [Cosine, Wsd])


@DECAYING
def test_a_run_made_longer_goes_on_from_where_the_rate_had_come_down_to(cls):
  short = cls(warmup_steps=4, final_fraction=0.1)
  assert short.kept_ends(40) == (40,)
  longer = dataclasses.replace(short, earlier_ends=short.kept_ends(40))
  got = values(longer, 2.0, 100, range(101))
  np.testing.assert_array_equal(got[:40], values(short, 2.0, 40, range(40)))
  without_warm_up = cls(warmup_steps=0, final_fraction=0.1)
  np.testing.assert_allclose(got[40:], values(without_warm_up, 0.2, 60, range(61)), rtol=1e-6)
  assert values(short, 2.0, 100, [40])[0] > 1.2, "drawn anew it would rise"


def test_a_cosine_that_ended_twice_is_three_half_cosines():
  twice = Cosine(warmup_steps=2, final_fraction=0.5, earlier_ends=(10, 30))
  assert twice.kept_ends(40) == (10, 30, 40)
  got = values(twice, 8.0, 40, [2, 6, 10, 20, 30, 35, 40])
  np.testing.assert_allclose(got, [8, 6, 4, 3, 2, 1.5, 1], rtol=1e-6)


def test_ends_that_are_of_no_use_are_not_kept_and_refused():
  assert Constant().kept_ends(40) == Wsd(final_fraction=0.0).kept_ends(40) == ()
  with pytest.raises(InputError, match="rate of zero"):
    Wsd(final_fraction=0.0, earlier_ends=(40,))
  for ends in ((0,), (5, 5), (9, 4)):
    with pytest.raises(InputError, match="must rise"):
      Cosine(earlier_ends=ends)
  for num_steps in (40, 30):
    with pytest.raises(InputError, match=rf"after earlier_ends=\(40,\): num_steps={num_steps}"):
      Cosine(warmup_steps=2, earlier_ends=(40,)).schedule(1.0, num_steps)


@DECAYING
def test_a_recipe_of_before_has_no_earlier_ends(cls):
  plain = {"kind": "cosine" if cls is Cosine else "wsd", "warmup_steps": 3, "final_fraction": 0.5}
  read = from_plain(Optim, {"schedule": plain})
  assert read.schedule == cls(warmup_steps=3, final_fraction=0.5)
  assert "earlier_ends" not in to_plain(read, as_before=True)["schedule"]
  changed = override(read, [("schedule.earlier_ends", "30,50")])
  assert changed.schedule.earlier_ends == (30, 50)


@EVERY
def test_a_warm_up_longer_than_the_run_is_refused(name):
  cls, _ = SCHEDULES[name]
  with pytest.raises(InputError, match=r"warmup_steps=30.*num_steps=20"):
    cls(warmup_steps=30).schedule(1.0, 20)


def test_phases_may_fill_the_run_exactly_but_not_overlap():
  Wsd(warmup_steps=80, decay_fraction=0.2).schedule(1.0, 100)
  with pytest.raises(InputError, match="fit into the run"):
    Wsd(warmup_steps=81, decay_fraction=0.2).schedule(1.0, 100)
  with pytest.raises(InputError, match="fit into the run"):
    Cosine(warmup_steps=100).schedule(1.0, 100)


@pytest.mark.parametrize(
  ("cls", "field"),
  [
    (Constant, {"warmup_steps": -1}),
    (Cosine, {"warmup_steps": -1}),
    (Cosine, {"final_fraction": 1.5}),
    (Wsd, {"final_fraction": -0.1}),
    (Wsd, {"decay_fraction": 0.0}),
    (Wsd, {"decay_fraction": 1.1}),
  ],
)
def test_a_field_out_of_range_is_refused_by_name(cls, field):
  with pytest.raises(InputError, match=next(iter(field))):
    cls(**field)
