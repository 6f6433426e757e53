"""`auto` goes by races on devices of the same kind, and by nothing else."""

import dataclasses
import json

import jax
import pytest

from jaxmoe.core import measured
from jaxmoe.core.backends import Backend, Choice, Devices, Need, _fastest, unmeasured
from jaxmoe.core.errors import InputError
from jaxmoe.core.measured import (
  SHIPPED,
  Measured,
  MeasuredRow,
  file_digest,
  read_measured,
  source_digest,
  write_measured,
)
from jaxmoe.ops import grouped_matmul

GPU = Devices("gpu", "NVIDIA H200")
SIZES = {"R": 4096, "S": 8, "D": 512, "F": 512}
BACKENDS = grouped_matmul.BACKENDS
ROW = MeasuredRow(
  "grouped_matmul", "blocks", GPU.kind, jax.__version__, "bfloat16", SIZES, right=True, ratio=1.0,
  sources=source_digest(BACKENDS["blocks"].call),
)  # fmt: skip
RAGGED = dataclasses.replace(
  ROW, backend="ragged", ratio=0.5, sources=source_digest(BACKENDS["ragged"].call)
)


def fastest(rows, fitting=("blocks", "ragged", "loop"), devices=GPU, dtype="bfloat16", **sizes):
  need = Need(devices, dtype, {**SIZES, **sizes})
  return _fastest("grouped_matmul", BACKENDS, need, list(fitting), Measured(rows))


def test_the_fastest_that_was_right_and_fits_is_taken():
  choice = fastest([ROW, RAGGED])
  assert choice == Choice(
    "grouped_matmul", "ragged", "the fastest of 2 measured on NVIDIA H200 in bfloat16 at D 512, "
    "F 512, R 4096, S 8", raced=True,
  )  # fmt: skip
  assert fastest([ROW, RAGGED], ["blocks"]).backend == "blocks"
  assert fastest([ROW, dataclasses.replace(RAGGED, right=False, ratio=0.0)]).backend == "blocks"
  assert fastest([ROW, RAGGED], ["loop"]) is None


@pytest.mark.parametrize(
  "why, asked",
  [
    ("another kind of device", {"devices": Devices("gpu", "NVIDIA H100 80GB HBM3")}),
    ("another dtype", {"dtype": "float32"}),
    ("a size too large", {"R": 4096 * 5}),
    ("a size too small", {"D": 100}),
    ("the CPU, whatever a file says", {"devices": Devices("cpu", GPU.kind)}),
  ],
)
def test_no_race_is_near(why, asked):
  assert fastest([ROW, RAGGED], **asked) is None, why


def test_another_jax_is_another_race_and_the_nearest_sizes_count():
  old = dataclasses.replace(RAGGED, jax="0.4.30")
  assert fastest([ROW, old]).backend == "blocks"
  large = [
    dataclasses.replace(row, sizes={**SIZES, "R": 16384}, ratio=1.5 - row.ratio)
    for row in (ROW, RAGGED)
  ]
  rows = [ROW, RAGGED, *large]
  assert fastest(rows, R=5000).backend == "ragged"
  assert fastest(rows, R=12000).backend == "blocks"


def test_changed_sources_are_told_and_a_later_row_counts():
  stale = dataclasses.replace(RAGGED, sources="0" * 16)
  assert fastest([ROW, stale]).why.endswith("its sources have changed since")
  assert fastest([ROW, RAGGED, dataclasses.replace(RAGGED, ratio=2.0)]).backend == "blocks"
  assert Measured([ROW]).digest != Measured([ROW, RAGGED]).digest


def test_a_kernel_that_nobody_raced_is_not_meant():
  assert "jaxmoe bench kernels" in unmeasured(Need(GPU))
  assert isinstance(BACKENDS["mosaic_tpu"], Backend)


def test_a_file_is_rows_merged_by_race_and_back_end(tmp_path):
  path = tmp_path / "own" / "measured.json"
  assert read_measured(path) == []
  write_measured([ROW, RAGGED], path)
  write_measured([dataclasses.replace(ROW, ratio=3.0)], path)
  assert sorted(row.ratio for row in read_measured(path)) == [0.5, 3.0]
  for text in ("{", json.dumps({"rows": [{"operation": "attention"}]}), "[]"):
    path.write_text(text)
    with pytest.raises(InputError, match="remove it"):
      read_measured(path)


def test_the_machine_s_own_rows_count_before_those_for_everybody(tmp_path, monkeypatch):
  monkeypatch.setattr(measured, "_FILES", measured._Files())
  assert measured.known().rows == tuple(read_measured(SHIPPED))
  write_measured([ROW], tmp_path / "own.json")
  measured.also_read(tmp_path / "own.json")
  assert measured.known().rows[-1] == ROW


def test_a_digest_follows_imports_of_a_package_alone(tmp_path):
  package = tmp_path / "house/ops"
  package.mkdir(parents=True)
  (package / "one.py").write_text("from house.ops.two import x\nfrom house.core import y\n")
  (package / "two.py").write_text("x = 1\n")
  (tmp_path / "house/core.py").write_text("y = 1\n")
  first = file_digest(package / "one.py", tmp_path)
  (tmp_path / "house/core.py").write_text("y = 2\n")
  assert file_digest(package / "one.py", tmp_path) == first
  (package / "two.py").write_text("x = 2\n")
  assert file_digest(package / "one.py", tmp_path) != first
