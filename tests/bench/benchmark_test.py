"""Contestants equal the oracle before they are timed, and times are medians over rounds."""

import dataclasses
import io
import json

import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

from jaxmoe.bench.benchmark import as_table, largest_error, run_benchmark, summary
from jaxmoe.bench.expert_latency import family_of, latencies
from jaxmoe.bench.expert_layers import Shape, layer_benchmark, matmul_benchmark

TINY = Shape(tokens=12, dim=4, mlp_dim=3, num_experts=3, num_active=2, skew=0.5)


def run(benchmark, repeats=1):
  out = io.StringIO()
  rows = run_benchmark(benchmark, "float32", repeats, Console(file=out, width=80))
  return {row["name"]: row for row in rows}


@pytest.mark.parametrize("make", [matmul_benchmark, layer_benchmark])
def test_every_contestant_equals_the_oracle_and_is_timed(make):
  rows = run(make(TINY, "float32"))
  assert len(rows) >= 3
  for row in rows.values():
    assert not row["wrong"] and row["error"] < 1e-5
    assert row["forward_backward"]["median_s"] > 0
  assert rows["dense"]["forward"]["ratio_to_dense"] == 1.0
  json.dumps(rows)


def test_a_wrong_contestant_is_not_timed():
  benchmark = matmul_benchmark(TINY, "float32")
  right = benchmark.contestants["blocks"]
  wrong = {
    "one row is off": lambda rows, weight: right(rows, weight).at[3].multiply(1.1),
    "not a number": lambda rows, weight: right(rows, weight) * jnp.nan,
  }
  rows = run(dataclasses.replace(benchmark, contestants=wrong))
  for name in wrong:
    assert rows[name]["wrong"] and "forward" not in rows[name]
  table = as_table("title", list(rows.values()))
  out = io.StringIO()
  Console(file=out, width=80).print(table)
  assert "not timed" in out.getvalue()


def test_a_wrong_gradient_is_wrong():
  ones = np.ones((2, 3))
  assert largest_error([ones, ones], [ones, ones]) == 0
  assert largest_error([ones, 2 * ones], [ones, ones]) == pytest.approx(1)


def test_ratios_are_medians_over_rounds():
  dense = np.array([[1.0, 2, 4, 8, 16]] * 2)
  seconds = summary(3 * dense, dense)
  assert seconds["forward"]["ratio_to_dense"] == 3
  assert seconds["forward"]["median_s"] == 12 and seconds["forward"]["q1_s"] == 6


def test_the_widest_table_fits_80_columns():
  numbers = {"median_s": 12.3456, "q1_s": 12.3456, "q3_s": 12.3456, "ratio_to_dense": 123.45}
  row = {"name": "one-hot einsum", "wrong": False, "forward": numbers, "forward_backward": numbers}
  out = io.StringIO()
  Console(file=out, width=80).print(as_table("title", [row]))
  assert "12346 (12346-12346)" in out.getvalue() and "123.45" in out.getvalue()
  assert max(map(len, out.getvalue().splitlines())) <= 80


def test_a_latency_is_the_median_time_of_a_kind_over_its_rows():
  family = family_of("dense,shift,shift,identity", 3, 4)
  # Round -1 does not count; one round of a busy machine is neither the least nor in a mean.
  order = iter([9, 9, 9] + [1, 2, 3] + [30, 60, 90] + [2, 4, 6])
  costs = latencies(family, 24, 4, 4, 1, 3, lambda run: next(order) * 1e-6)
  # Six rows an expert; the medians are 2, 4 and 6 microseconds.
  assert costs == (0.333, 0.333, 0.333, 1.0)
