"""Every back end has a case, is checked before it is timed, and the suites time no wrong one."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from jaxmoe.bench.ideal_work import Work
from jaxmoe.bench.kernel_cases import CASES, SIZES, Case, operations
from jaxmoe.bench.results import RowFile
from jaxmoe.bench.suite import Asked
from jaxmoe.bench.suites import kernels
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
    assert case(SIZES["small8"]).base in backends[name], name
  assert BASE in operations()["attention"]


def test_what_is_wrong_is_not_timed_and_what_does_not_fit_says_why(backends):
  rows = {row["name"]: row for row in rows_of(TWICE, backends, rounds=2)}
  assert rows["plain"]["ratio"] == 1 and rows["other"]["cpu_seconds"] > 0
  assert "error" in rows["value"]["wrong"] and "seconds" not in rows["value"]
  assert "error" in rows["gradient"]["wrong"]
  assert "is for tpu" in rows["elsewhere"]["unfit"]


def test_counts_are_of_a_pass_forward_and_backward():
  case = CASES["grouped_matmul"](SIZES["small8"])
  (row,) = rows_of(case, {"loop": operations()["grouped_matmul"]["loop"]}, None)
  # Every expert multiplies all rows: three products, eight times what is needed.
  assert row["flops"] == 8 * row["ideal_flops"]
  assert dataclasses.asdict(case.work)["flops"] == 3 * 2 * 2048 * 512 * 512


def test_the_least_of_attention_grows_with_pairs_and_its_arrays_with_tokens():
  assert work(2048).flops / work(1024).flops == pytest.approx(4, rel=1e-3)
  assert work(2048).bytes == 2 * work(1024).bytes


def test_a_race_on_a_device_says_which_back_ends_were_right_and_how_fast(backends, monkeypatch):
  kept = []
  asked = Asked(
    ("small8",), (), count=False, rounds=1, pythons=("", ""), env={}, peaks=lambda: (1.0, 1.0),
    say=print, keep=kept.extend,
  )  # fmt: skip
  monkeypatch.setattr(kernels, "operations", lambda: {"toy": backends})
  monkeypatch.setattr(kernels, "CASES", {"toy": lambda sizes: TWICE})
  results = RowFile(None, {}, print)
  kernels.run(asked, results)
  assert {row["race"] for row in results.rows} == {"toy, small8, float32"}
  right = {row.backend: row.right for row in kept}
  assert right == {"plain": True, "other": True, "value": False, "gradient": False}
  assert all(row.ratio > 0 for row in kept if row.right) and kept[0].sizes == {"T": 3}
  assert {row.dtype for row in kept} == {"float32"} and len(kept[0].sources) == 16


def test_public_sizes_are_those_of_their_configs():
  assert SIZES["mixtral"].layer.mlp_dim == 14336 and SIZES["qwen3"].key_heads == 4
  assert SIZES["olmoe"].layer.tokens * SIZES["olmoe"].layer.num_active == 262144


def test_what_fails_is_a_row_and_the_race_goes_on(backends):
  def no_memory(x):
    raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory\nmore")

  rows = {
    row["name"]: row for row in rows_of(TWICE, {**backends, "large": Backend(no_memory)}, rounds=1)
  }
  assert rows["large"]["failed"].endswith("out of memory") and "seconds" in rows["other"]
