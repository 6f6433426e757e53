"""Windows in rows that fit them: none is lost, and little is computed that holds nothing."""

import numpy as np
import pytest

from jaxmoe.train import row_packing as module
from jaxmoe.train.row_packing import MOST, SHAPES, choose_shapes, fitted_batches, pack_rows

RNG = np.random.default_rng(0)
SIZES = {
  "one": [701],
  "one token": [1],
  "two far apart": [4096, 3],
  "just above half": [2049] * 40,
  "full and just above half": [4096] * 9 + [2100] * 31,
  "any": RNG.integers(1, 4097, 300).tolist(),
  "few": RNG.integers(1, 4097, 6).tolist(),
  "any above half": RNG.integers(2049, 4097, 200).tolist(),
  "a third to two": RNG.integers(1366, 2731, 77).tolist(),
  "short": RNG.integers(1, 30, 500).tolist(),
  "few short": RNG.integers(1, 30, 7).tolist(),
  "of every scale": (2 ** RNG.uniform(0, 12, 150)).astype(int).tolist(),
  "a prime number of rows": [4096] * 17,
}
sizes_of = pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES.keys())


def items_of(sizes, owners=1):
  windows = [np.full(size, index, np.int32) for index, size in enumerate(sizes)]
  return [(index % owners, (of, of + 1)) for index, of in enumerate(windows)]


def check(items, batches, apart=True):
  """Asserts that each window lies somewhere once and whole; returns the shapes of the batches."""
  found = []
  for batch, rows in batches:
    assert 0 < len(rows) <= len(batch["ids"])
    for at, row in enumerate(rows):
      assert not apart or len({owner for owner, _ in row}) == 1
      start = 0
      for segment, (owner, (inputs, labels)) in enumerate(row, start=1):
        here = slice(start, start + len(inputs))
        np.testing.assert_array_equal(batch["ids"][at, here], inputs)
        np.testing.assert_array_equal(batch["labels"][at, here], labels)
        np.testing.assert_array_equal(batch["position"][at, here], np.arange(len(inputs)))
        assert (batch["segment"][at, here] == segment).all()
        found.append((owner, int(inputs[0]), len(inputs)))
        start += len(inputs)
      assert not batch["segment"][at, start:].any() and (batch["labels"][at, start:] == -1).all()
  assert sorted(found) == sorted((owner, int(of[0]), len(of)) for owner, (of, _) in items)
  return [batch["ids"].shape for batch, _ in batches]


@sizes_of
@pytest.mark.parametrize("batch_size", [1, 3, 16])
@pytest.mark.parametrize("owners", [1, 2])
def test_at_most_four_shapes_compute_at_most_three_tenths_more_than_there_is(
  sizes, batch_size, owners
):
  items = items_of(sizes, owners)
  shapes = check(items, list(fitted_batches(items, (batch_size, 4096))))
  assert len(set(shapes)) <= SHAPES == 4
  assert sum(rows * length for rows, length in shapes) <= MOST * sum(sizes) and MOST == 1.3
  assert all(rows <= batch_size and length <= 4096 for rows, length in shapes)


def test_rows_that_fill_one_shape_have_one():
  assert choose_shapes([128] * 160, 16).lengths == (128,)
  assert choose_shapes([128] * 160, 16).together == (16,)
  assert choose_shapes([128] * 17, 16).together == (9,)


@sizes_of
def test_a_longer_text_is_packed_part_by_part_in_the_shapes_of_its_first(sizes, monkeypatch):
  monkeypatch.setattr(module, "BUFFER", 30_000)
  many = (sizes * 80)[: 200_000 // int(np.mean(sizes)) + 1]
  items = items_of(many)
  shapes = check(items, list(fitted_batches(items, (4, 4096))))
  assert len(set(shapes)) <= SHAPES
  # At the end a batch of each shape may be but partly filled.
  assert sum(rows * length for rows, length in shapes) <= MOST * sum(many) + SHAPES * 4 * 4096


def test_rows_are_no_shorter_than_asked():
  items = items_of([3, 30, 300])
  shapes = check(items, list(fitted_batches(items, (4, 4096), least=1000)))
  assert [length for _, length in shapes] == [1000]


def test_where_it_does_not_matter_whose_they_are_windows_share_rows():
  items = items_of([20] * 50, owners=50)
  shapes = check(items, list(fitted_batches(items, (4, 64), apart=False)), apart=False)
  assert sum(rows * length for rows, length in shapes) <= MOST * 1000


def test_a_window_goes_into_the_fullest_row_that_holds_it_the_largest_first():
  rows = pack_rows(items_of([3, 8, 5, 2, 6, 2]), 10, apart=True)
  assert [[len(inputs) for _, (inputs, _) in row] for row in rows] == [[8, 2], [6, 3], [5, 2]]


def test_nothing_makes_no_batch():
  assert list(fitted_batches([], (4, 64))) == []
