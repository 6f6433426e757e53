"""Every back end has a case, is checked before it is timed, and the suites time no wrong one."""

import dataclasses

import jax.numpy as jnp
import pytest

from jaxmoe.bench.ideal_work import Work
from jaxmoe.bench.kernel_cases import CASES, Case, operations
from jaxmoe.bench.suites.attention import BASE, work
from jaxmoe.bench.suites.kernels import rows_of
from jaxmoe.core.backends import Backend, limited

ROWS = jnp.arange(6.0).reshape(3, 2)
TWICE = Case((ROWS,), lambda backend: backend, {"T": 3}, Work(6, 48), base="plain")


def twice(x):
  return 2 * x


@pytest.fixture
def backends():
  return {
    "plain": Backend(twice),
    "other": Backend(lambda x: x + x),
    "value": Backend(lambda x: twice(x).at[1].add(0.1)),
    # Whole numbers round to themselves, so that values are right; rounding has no gradient.
    "gradient": Backend(lambda x: twice(jnp.round(x))),
    "elsewhere": Backend(twice, limited(("tpu",))),
  }


def test_cases_are_of_operations_and_their_bases_are_back_ends():
  backends = operations()
  assert set(CASES) == set(backends)
  for name, case in CASES.items():
    assert case().base in backends[name], name
  assert BASE in operations()["attention"]


def test_what_is_wrong_is_not_timed_and_what_does_not_fit_says_why(backends):
  rows = {row["name"]: row for row in rows_of(TWICE, backends, rounds=2)}
  assert rows["plain"]["ratio"] == 1 and rows["other"]["cpu_seconds"] > 0
  assert "error" in rows["value"]["wrong"] and "seconds" not in rows["value"]
  assert "error" in rows["gradient"]["wrong"]
  assert "is for tpu" in rows["elsewhere"]["unfit"]


def test_counts_are_of_a_pass_forward_and_backward():
  case = CASES["grouped_matmul"]()
  (row,) = rows_of(case, {"loop": operations()["grouped_matmul"]["loop"]}, None)
  # Every expert multiplies all rows: three products, eight times what is needed.
  assert row["flops"] == 8 * row["ideal_flops"]
  assert dataclasses.asdict(case.work)["flops"] == 3 * 2 * 2048 * 512 * 512


def test_the_least_of_attention_grows_with_pairs_and_its_arrays_with_tokens():
  assert work(2048).flops / work(1024).flops == pytest.approx(4, rel=1e-3)
  assert work(2048).bytes == 2 * work(1024).bytes
