"""Laws of the held-out split."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxmoe.core.errors import InputError
from jaxmoe.data.held_out_split import hash_fraction, held_out_units

KEYS = st.lists(st.text(), min_size=2, max_size=30, unique=True)


def _split(keys, share=0.5):
  return held_out_units({"a": [(key, key) for key in keys]}, share)


@given(KEYS, st.randoms(use_true_random=False))
def test_order_does_not_matter_and_adding_a_file_moves_no_other(keys, random):
  held = {key for key in keys if hash_fraction(key) < 0.5}
  shuffled = random.sample(keys, len(keys))
  for some in (keys, shuffled, keys[:-1]):
    expected = held & set(some)
    if 0 < len(expected) < len(some):
      assert _split(some) == expected


@given(KEYS, st.floats(1e-6, 1 - 1e-6))
def test_a_refused_share_comes_with_one_that_works(keys, share):
  try:
    held = _split(keys, share)
  except InputError as error:
    (cure,) = re.findall(r"held_out=([0-9.e-]+)$", str(error))
    held = _split(keys, float(cure))
  assert 0 < len(held) < len(keys)


def test_a_single_document_cannot_be_split():
  with pytest.raises(InputError, match="cut the text into more files"):
    _split(["only"])


def test_about_the_share_is_held_out():
  keys = [f"folder/file{i}.py" for i in range(20_000)]
  # Five standard deviations of a binomial.
  assert abs(len(_split(keys, 0.05)) - 1000) < 5 * (20_000 * 0.05 * 0.95) ** 0.5


def test_a_unit_held_out_in_one_domain_is_held_out_in_all():
  low = min("abcdefgh", key=hash_fraction)
  high = [key for key in "abcdefgh" if hash_fraction(key) > 0.5]
  share = (hash_fraction(low) + min(hash_fraction(key) for key in "abcdefgh" if key != low)) / 2
  one = [(low, "shared"), ("zz" if hash_fraction("zz") > share else "yy", "other")]
  two = [(high[0], "shared"), (high[1], "second")]
  assert held_out_units({"one": one, "two": two}, share) == {"shared"}
