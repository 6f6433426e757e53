"""MFU is a share of the best rate that was ever seen on hardware that counts once."""

import json
import os

import pytest

from jaxmoe.cost import peak
from jaxmoe.cost.peak import best_peak, peaks_of_machines


@pytest.fixture
def measured(monkeypatch):
  """Returns the rates that are measured next."""
  rates = []
  monkeypatch.setattr(peak, "matmul_peak", lambda dtype, spend_s, size: (rates.pop(0), 512))
  return rates


def test_the_best_ever_seen_is_kept_whatever_is_measured_later(measured, tmp_path):
  measured += [86e9, 40e9, 160e9, 90e9]
  found = [best_peak("float32", tmp_path / "peaks") for _ in range(4)]
  assert found == [86e9, 86e9, 160e9, 160e9]
  (path,) = (tmp_path / "peaks").iterdir()
  kept = json.loads(path.read_text())
  assert kept["flops_per_s"] == 160e9
  assert set(kept) == {"device", "processor", "cores", "dtype", "jax", "size", "flops_per_s"}


@pytest.mark.parametrize("part", ["device", "processor", "cores", "dtype", "jax"])
def test_what_may_have_another_peak_has_one_of_its_own(measured, tmp_path, monkeypatch, part):
  measured += [160e9, 50e9]
  key = peak._key("float32")
  assert best_peak("float32", tmp_path) == 160e9
  monkeypatch.setattr(peak, "_key", lambda dtype: {**key, part: "another"})
  assert best_peak("float32", tmp_path) == 50e9
  assert len(os.listdir(tmp_path)) == 2


DAMAGED = ("", "{", "[1]", "7", '{"flops_per_s": "x"}', '{"flops_per_s": 9e9}')


@pytest.mark.parametrize("text", DAMAGED)
def test_a_file_that_is_damaged_or_anothers_is_written_anew(measured, tmp_path, text):
  measured += [1e9, 2e9, 1e9]
  best_peak("float32", tmp_path)
  (path,) = tmp_path.iterdir()
  path.write_text(text)
  assert [best_peak("float32", tmp_path) for _ in range(2)] == [2e9, 2e9]


def test_a_folder_that_cannot_be_written_keeps_none_and_leaves_nothing(
  measured, tmp_path, monkeypatch
):
  measured += [3e9, 2e9]
  (tmp_path / "file").touch()
  assert best_peak("float32", tmp_path / "file" / "peaks") == 3e9

  def full(*paths):
    raise OSError(28, "No space left on device")

  monkeypatch.setattr(os, "replace", full)
  assert best_peak("float32", tmp_path / "full") == 2e9
  assert os.listdir(tmp_path / "full") == []


def test_a_rate_is_that_of_the_products_that_were_timed(monkeypatch):
  seconds = iter([0.004, 0.02, 0.001, 0.5, 0.004])
  clock = iter([0.0, 0.1, 0.2, 0.3])
  monkeypatch.setattr(peak, "_timed", lambda product, a: lambda: next(seconds))
  monkeypatch.setattr(peak.time, "perf_counter", lambda: next(clock))
  # 512 and 1024 at first, then both again; the third look at the clock ends it.
  assert peak.matmul_peak("float32", 0.15) == (2 * 512**3 / 0.001, 512)


def test_what_is_kept_is_looked_at_again_in_its_own_size_alone(tmp_path, monkeypatch):
  seconds, timed = iter([0.004, 0.02, 0.001]), []

  def once(product, a):
    timed.append(a.shape[0])
    return lambda: next(seconds)

  monkeypatch.setattr(peak, "_timed", once)
  monkeypatch.setattr(peak.time, "perf_counter", lambda: next(clock))
  clock = iter([0.0, 9.0])
  first = best_peak("float32", tmp_path)
  assert (first, timed) == (2 * 1024**3 / 0.02, [512, 1024])
  assert peak.kept_peak("float32", tmp_path) == first and len(timed) == 2
  clock = iter([0.0, 9.0])
  assert best_peak("float32", tmp_path) == 2 * 1024**3 / 0.001
  assert timed == [512, 1024, 1024]


@pytest.mark.parametrize(
  "places, times",
  [
    (["a 0,1,2,3"], 1),
    (["a 0,1", "a 0,1", "a 0,1", "a 0,1"], 1),  # processes that share their cores
    (["a 0", "a 1"], 2),  # and that each have their own
    (["a 0,1", "b 0,1"], 2),
    (["a 0,1", "a 0,1", "b 0,1", "b 0,1"], 2),
    (["a 0,1", "b 0,1,2,3"], 3),
  ],
)
def test_processes_of_one_machine_share_what_they_share(places, times):
  assert peaks_of_machines(places) == times
