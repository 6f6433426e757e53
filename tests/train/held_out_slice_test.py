import math

import pytest

from jaxmoe.train.held_out_slice import HeldOutSlice, slice_of

PART = HeldOutSlice({"a": 10, "b": 10}, {"a": 30, "b": 90})


def test_domains_weigh_by_all_their_held_out_bytes_and_not_by_those_that_are_scored():
  assert PART.overall({"a": 1.0, "b": 2.0}, 1.5) == (30 * 1 + 90 * 2) / 120
  assert PART.overall({"a": 1.0}, 1.5) == 1
  assert PART.overall({"a": 1.0, "other": 2.0}, 1.5) == 1.5, "what the run says"
  assert math.isnan(PART.overall({"a": 1.0, "b": None}, 1.5))
  assert HeldOutSlice({"a": 0, "b": 5}, {"a": 9, "b": 9}).overall({"a": None, "b": 2.0}, 2.0) == 2
  assert HeldOutSlice({"a": 0}, {"a": 0}).overall({"a": None}, None) is None


def test_a_slice_is_named_by_its_size_and_all_of_it_is_no_slice():
  assert (PART.title, PART.name) == ("Held-out slice", "a slice of held-out text (20 of 120 bytes)")
  large = HeldOutSlice({"code": 29_600}, {"code": 429_123})
  assert large.name == "a slice of held-out text (30 of 429 kB)"
  whole = HeldOutSlice({"a": 30}, {"a": 30})
  assert (whole.title, whole.name) == ("Held out", "all held-out text")


def test_a_start_says_what_is_scored_and_an_older_one_what_is_held_out():
  assert slice_of({"data": {"slice": PART.plain()}}, None) == PART
  sizes = {"a": {"held_out": {"bytes": 9}}, "b": {"held_out": {"bytes": 5}}}
  old = {"data": {"domains": sizes}}
  assert slice_of(old, {"evaluation": {"max_bytes": 9}}).is_whole
  part = slice_of(old, {"evaluation": {"max_bytes": 8}})
  assert (part.name, part.overall({"a": 1.0, "b": 2.0}, 0.0)) == (
    "a slice of held-out text", (9 * 1 + 5 * 2) / 14
  )  # fmt: skip


@pytest.mark.parametrize("start", [
  {}, {"data": 3}, {"data": {"slice": []}}, {"data": {"domains": {"a": 1}}},
  {"data": {"slice": {"a": {"bytes": True, "of": 10**400}}}},
])  # fmt: skip
def test_where_no_sizes_are_known_it_is_a_slice_and_its_score_what_the_run_says(start):
  found = slice_of(start, {"evaluation": None})
  assert found.name == "a slice of held-out text"
  assert found.overall({"a": 1.0}, 1.25) == 1.25
