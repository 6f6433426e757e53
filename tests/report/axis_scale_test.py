"""Ticks are round and inside, and numbers read as people write them."""

import math

import pytest

from jaxmoe.report.axis_scale import Scale, span
from jaxmoe.report.number_format import counted, finite, percent, seconds, short
from jaxmoe.report.sample_texts import parse_samples, start_half_end


@pytest.mark.parametrize("log", [False, True])
@pytest.mark.parametrize("low, high", [(0.001, 0.9), (3, 4.1), (1e-6, 2e-6), (7, 1e9), (1, 8.5)])
def test_ticks_are_few_round_numbers_inside(low, high, log):
  ticks = Scale(low, high, 0, 100, log).ticks(6)
  assert 2 <= len(ticks) <= 7
  for tick in ticks:
    assert low * 0.99 <= tick <= high * 1.01 or tick == 0
    assert float(f"{tick:.3g}") == pytest.approx(tick, rel=1e-9)


def test_a_scale_is_linear_or_logarithmic_and_ends_at_its_edges():
  assert [Scale(0, 10, 100, 0)(value) for value in (-5, 0, 5, 10, 99)] == [100, 100, 50, 0, 0]
  assert Scale(1, 100, 0, 10, log=True)(10) == pytest.approx(5)


def test_a_span_of_equal_or_no_values_still_has_a_width():
  assert span([]) == (0.0, 1.0)
  for values in ([0.0], [2.0, 2.0], [math.nan, -3.0]):
    low, high = span(values)
    assert low < high
  low, high = span([0.0, -1.0, 5.0], log=True)
  assert 0 < low < 5 < high


@pytest.mark.parametrize("text, expected", [
  (counted(428_000), "428k"), (counted(1_440_000), "1.44M"), (counted(999_999), "1M"),
  (counted(12), "12"), (short(0.0005), "5e-4"), (short(1.5), "1.5"), (short(math.nan), "-"),
  (percent(0.1234), "12.3%"), (percent(1e-5), "<0.1%"), (percent(0.0), "0.0%"),
  (seconds(3.14), "3.1 s"), (seconds(125), "2 min 5 s"), (seconds(90_000), "1 d 1 h"),
])  # fmt: skip
def test_numbers_are_short_and_have_units(text, expected):
  assert text == expected


def test_what_is_not_a_finite_number_is_nan():
  for value in (None, True, "1", [], 10**400, math.inf):
    assert math.isnan(finite(value))


def test_samples_are_read_through_longer_fences_and_headings_in_texts():
  text = "## step 0\n\n```text\na\n```\n\n## step 9\n\n````text\n## step 5\n```\n````\n\n```text\nb"
  samples = parse_samples(text)
  assert [(one.step, one.texts) for one in samples] == [(0, ("a",)), (9, ("## step 5\n```", "b"))]


def test_the_half_is_the_sample_nearest_to_half_of_the_last_step():
  samples = parse_samples("".join(f"## step {n}\n" for n in (0, 10, 40, 60, 100)))
  chosen = [(when, one.step) for when, one in start_half_end(samples)]
  assert chosen == [("start", 0), ("half", 40), ("end", 100)]
