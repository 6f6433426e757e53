import numpy as np
import pytest

from jaxmoe.core.errors import InputError
from jaxmoe.optim import SCHEDULES, Constant, Cosine, Wsd

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
