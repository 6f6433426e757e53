import dataclasses

import numpy as np
import pytest

from jaxmoe.core.errors import InputError
from jaxmoe.cost.links import LinkProfile, LinkRate
from jaxmoe.plan.context_times import AttentionWork, choice_text, context_times

RATE = LinkRate(0.0, 1e9)
MESH = LinkProfile("full_mesh", RATE, RATE)
ENDLESS = LinkProfile("full_mesh", LinkRate(0.0, 1e30), LinkRate(0.0, 1e30))
WORK = AttentionWork(
  query_heads=8, key_heads=8, query_bytes=1024, key_bytes=2048, found_bytes=1056,
  flops_per_pair=4096.0, flops_per_s=1e12,
)  # fmt: skip
ROW = np.ones(64, np.int32)


def by_name(times):
  return {(each.attend, each.order): each for each in times}


def test_without_cost_of_links_a_time_is_that_of_the_busiest_products():
  times = by_name(context_times([ROW], 4, WORK, ENDLESS))
  pairs = 64 * 65 / 2
  even = pairs / 4 * 4096 / 1e12 * 3.5
  for name in (("ulysses", "plain"), ("ring", "zigzag"), ("gather", "zigzag")):
    assert times[name].seconds == pytest.approx(even)
    assert times[name].waits_s == pytest.approx(0.0, abs=1e-15)
  # In plain order the last device sees all keys of others: 16 * 17 / 2, then three times 16 * 16.
  plain = (16 * 17 / 2 + 3 * 256) * 4096 / 1e12 * 3.5
  assert times["gather", "plain"].seconds == pytest.approx(plain)
  assert times["ring", "plain"].seconds == pytest.approx(plain)


def test_without_cost_of_products_a_time_is_that_of_the_messages():
  free = dataclasses.replace(WORK, flops_per_s=1e30)
  times = by_name(context_times([ROW], 4, free, MESH))
  keys, query, found = 16 * 2048 / 1e9, 16 * 1024 / 1e9, 16 * 1056 / 1e9
  # Forward 3 parts of keys; backward one to begin with, then both where both are sent.
  backward = keys + (keys + 0) + (keys + keys) + keys + keys
  assert times["ring", "zigzag"].seconds == pytest.approx(3 * keys + backward)
  forward = query + query + max(query, found) + found + found
  back = 2 * query + 2 * query + max(2 * query, query) + query + query
  assert times["token_ring", "zigzag"].seconds == pytest.approx(forward + back)
  assert times["gather", "plain"].seconds == pytest.approx(2 * keys)
  exchanged = 2 * (query + keys) / 4 + 2 * query / 4
  assert times["ulysses", "plain"].seconds == pytest.approx(exchanged)


def test_token_ring_loses_where_key_heads_are_fewer():
  free = dataclasses.replace(WORK, flops_per_s=1e30)
  grouped = dataclasses.replace(free, key_heads=2, key_bytes=512)
  for work, wins in ((free, True), (grouped, False)):
    times = by_name(context_times([ROW], 4, work, MESH))
    ratio = times["token_ring", "zigzag"].seconds / times["ring", "zigzag"].seconds
    assert (ratio < 1) == wins


def test_on_a_ring_of_links_what_returns_from_afar_goes_over_several():
  free = dataclasses.replace(WORK, flops_per_s=1e30)
  ring = LinkProfile("ring", RATE, RATE)
  near, far = (by_name(context_times([ROW], 4, free, one)) for one in (MESH, ring))
  assert far["token_ring", "zigzag"].seconds > near["token_ring", "zigzag"].seconds
  assert far["ring", "zigzag"].seconds == pytest.approx(near["ring", "zigzag"].seconds)


def test_heads_that_do_not_allow_ulysses_are_told_and_never_chosen():
  odd = dataclasses.replace(WORK, query_heads=6, key_heads=6)
  times = context_times([ROW], 4, odd, MESH)
  assert times[-1].attend == "ulysses" and times[-1].seconds == np.inf
  assert "6 query heads do not divide over 4" in times[-1].refused
  three = dataclasses.replace(WORK, query_heads=12, key_heads=3)
  assert "3 key heads neither" in context_times([ROW], 4, three, MESH)[-1].refused


def test_the_choice_takes_least_and_says_why():
  times = context_times([ROW], 4, WORK, MESH)
  assert [each.seconds for each in times] == sorted(each.seconds for each in times)
  text = choice_text(times)
  assert text.startswith(f"attend={times[0].attend} order={times[0].order} takes least")
  assert "times that, by" in text and "\n" not in text


def test_links_of_other_devices_and_rows_without_blocks_are_refused():
  with pytest.raises(InputError, match="give a shape of 4"):
    context_times([ROW], 4, WORK, LinkProfile("torus", RATE, RATE, (2, 4)))
  with pytest.raises(InputError, match="no multiple of 8"):
    context_times([ROW[:60]], 4, WORK, MESH)
