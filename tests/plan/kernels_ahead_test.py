"""What is kept of kernels that were compiled for chips that are not there, and when it is old."""

import dataclasses
import json
import math

import jax.numpy as jnp
import pytest

from jaxmoe.core.backends import Choice
from jaxmoe.core.errors import InputError
from jaxmoe.plan import kernels_ahead
from jaxmoe.plan.ahead_cases import BACKEND, ahead_cases
from jaxmoe.plan.kernels_ahead import (
  CHIPS,
  DTYPES,
  AheadRow,
  kernel_digest,
  kernel_notes,
  read_ahead,
)
from jaxmoe.train.kernels import OPERATIONS

ROW = AheadRow("cross_entropy", "OLMoE", "bfloat16", "v5e", "0.10.2", "0" * 16, True)
CHOSEN = (Choice("cross_entropy", BACKEND, "asked for"), Choice("attention", "xla", "the first"))


def test_the_file_has_every_kernel_for_every_chip():
  kernels = {name for name, backends in OPERATIONS.items() if BACKEND in backends}
  assert {case.operation for case in ahead_cases()} == kernels
  rows, text = read_ahead(), kernels_ahead.PATH.read_text()
  every = {(name, chip, dtype) for name in kernels for chip in CHIPS for dtype in DTYPES}
  for series in {row.jax for row in rows} | {"0.10.2"}:
    assert {(row.operation, row.chip, row.dtype) for row in rows if row.jax == series} == every
  assert "nobody has measured these" in text and "\n" in text
  for row in rows:
    assert row.compiled and not row.note
    # A chip's memory of a core, and a kernel that makes nothing again makes nothing twice.
    assert 0 < row.vmem_bytes < 2**26 and 1 <= row.work < 4
  assert all(row.work < 1.06 for row in rows if row.operation == "grouped_matmul")


def test_a_digest_is_of_all_that_a_kernel_imports(tmp_path):
  first = kernel_digest("stick_breaking")
  assert first != kernel_digest("attention") and len(first) == 16
  for path in (kernels_ahead._ROOT / "jaxmoe/ops").rglob("*.py"):
    copy = tmp_path / path.relative_to(kernels_ahead._ROOT)
    copy.parent.mkdir(parents=True, exist_ok=True)
    copy.write_bytes(path.read_bytes())
  assert kernel_digest("stick_breaking", tmp_path) == first
  for name, changes in (("norm", False), ("tpu_kernel", True), ("attention/tpu_walk", True)):
    path = tmp_path / f"jaxmoe/ops/{name}.py"
    path.write_text(path.read_text() + "\n# changed\n")
    now = kernel_digest("stick_breaking", tmp_path)
    assert (now != first) == changes
    first = now


def test_whoever_takes_a_kernel_is_told_what_is_known_of_it():
  assert kernel_notes(CHOSEN, []) == [
    "cross_entropy: mosaic_tpu was never compiled ahead; make look-ahead does"
  ]
  assert "has changed since it was compiled" in kernel_notes(CHOSEN, [ROW])[0]
  now = dataclasses.replace(ROW, sources=kernel_digest("cross_entropy"))
  (line,) = kernel_notes(CHOSEN, [now])
  assert line == "cross_entropy: mosaic_tpu is compiled ahead, not measured"
  bad = dataclasses.replace(now, compiled=False, note="no room")
  assert kernel_notes(CHOSEN, [now, bad])[0].endswith("does not compile: no room")
  assert not kernel_notes(CHOSEN[1:])


def test_rows_replace_those_of_their_key_and_leave_others(tmp_path):
  path = tmp_path / "ahead.json"
  assert read_ahead(path) == []
  newer = dataclasses.replace(ROW, jax="0.11.2")
  kernels_ahead.write_ahead([newer, ROW], path)
  patched = dataclasses.replace(newer, jax="0.11.3", work=1.5)
  kernels_ahead.write_ahead([patched], path)
  assert read_ahead(path) == [ROW, patched]
  path.write_text(json.dumps({"rows": [{"operation": 1}]}))
  with pytest.raises(InputError, match="has no rows of kernels"):
    read_ahead(path)


def test_work_counts_the_products_of_steps_that_make_some():
  case = next(case for case in ahead_cases() if case.operation == "cross_entropy")
  # Logits, and each of the gradients, which makes them again: 5 products for 3, in whole tiles.
  tiles = math.ceil(50304 / 256) * 256 / 50304
  assert case.work("bfloat16") == pytest.approx(5 / 3 * tiles)

  def twice(hidden, head, labels):
    return case.call(hidden, head, labels) + case.call(jnp.sin(hidden), head, labels)

  again = dataclasses.replace(case, call=twice)
  assert again.work("bfloat16") == pytest.approx(2 * case.work("bfloat16"))
