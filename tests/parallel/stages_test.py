"""Stages cut by cost beside all cuts there are."""

import itertools

import numpy as np
import pytest

from jaxmoe.parallel.stages import cut_by_cost


@pytest.mark.parametrize("seed", range(12))
def test_no_cut_has_a_cheaper_costliest_stage(seed):
  rng = np.random.default_rng(seed)
  layers, stages = int(rng.integers(4, 9)), int(rng.integers(2, 5))
  costs = rng.integers(1, 9, size=layers).astype(float)
  costs[-1] += rng.integers(0, 20)
  counts = cut_by_cost(list(costs), stages)
  assert sum(counts) == layers and min(counts) >= 1 and len(counts) == stages

  def costliest(cuts):
    return max(costs[first:end].sum() for first, end in itertools.pairwise((0, *cuts, layers)))

  found = costliest(np.cumsum(counts)[:-1])
  assert found == min(
    costliest(cuts) for cuts in itertools.combinations(range(1, layers), stages - 1)
  )
