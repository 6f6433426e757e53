"""The page has every race, roof, exponent and source, and refuses files that are of no suite."""

import json

import pytest

from jaxmoe.bench.exponents import fit
from jaxmoe.bench.page.page_file import bench_page
from jaxmoe.bench.page.published import PUBLISHED
from jaxmoe.bench.page.result_files import read_files
from jaxmoe.bench.rows_text import counted
from jaxmoe.bench.suites.scaling import fitted

ABOUT = {"processor": "Deep Thought", "device": "cpu", "cores": 2.0, "jax": "0.10.2"}
NOTED = {"versions": {"torch": "2.13"}, "peak_flops_per_s": 1e11, "peak_bytes_per_s": 1e10}
TIMED = {"seconds": 0.5, "rounds": 9, "load": 1.5, "cpu_quartiles": [0.2, 0.4], "wall_ratio": 1.0}
COUNTED = {
  "flops": 2e9, "ideal_flops": 1e9, "bytes": 3e8, "ideal_bytes": 1e8, "temp_bytes": 1e6,
  "fusions": 42,
}  # fmt: skip


def write(path, suite, rows, finished=True):
  about = {**ABOUT, "suite": suite}
  record = {"about": about, **NOTED, "date": "2026-11-30T21:00:00", "finished": finished}
  path.write_text(json.dumps({**record, "rows": rows}))
  return str(path)


def swept(exponent):
  points = [{"name": f"n {n}", "size": n, "flops": 5.0 * n**exponent} for n in (8, 16, 64)]
  return [*points, fitted(points, "because it is so")]


def test_a_power_law_is_found_and_a_bend_is_seen_at_its_end():
  found = fit([1, 2, 4, 8], [3 * n**1.5 for n in (1, 2, 4, 8)])
  assert [found.exponent, found.first, found.last, found.worst] == pytest.approx([1.5, 1.5, 1.5, 1])
  bent = fit([1, 2, 4, 8], [n + n**2 / 4 for n in (1, 2, 4, 8)])
  assert bent.first < bent.exponent < bent.last < 2 and bent.worst > 1.01


def test_the_page_shows_races_roofs_growth_and_what_others_published(tmp_path):
  raced = [
    {"race": "small8", "name": "jaxmoe", "ratio": 1.0, "cpu_seconds": 0.3, **TIMED, **COUNTED},
    {"race": "small8", "name": "torch", "ratio": 1.25, "cpu_seconds": 0.375, **TIMED},
    {"race": "small8", "name": "<llama>", "missing": "xllamacpp: pip install it"},
  ]
  grown = [{"race": "tokens", **row} for row in swept(1.25)]
  paths = [
    write(tmp_path / "step.json", "step", raced, finished=False),
    write(tmp_path / "scaling.json", "scaling", grown),
  ]
  text = bench_page(read_files(paths))
  assert "300 ms (200 to 400), 1.00x" in text and "375 ms (200 to 400), 1.25x" in text
  assert "missing: xllamacpp: pip install it" in text and "&lt;llama&gt;" in text
  assert "width:80.0%" in text and "width:100.0%" in text
  assert "Roofline: step" in text and "10 GB/s and 100 GFLOP/s" in text
  assert "Cost against tokens" in text and "FLOPs ^1.25," in text and "because it is so" in text
  assert "step (unfinished)" in text and "torch 2.13" in text and "Deep Thought, 2 cores" in text
  assert "Published by others" in text and all(source in text for _, _, source in PUBLISHED)
  assert "<script src" not in text and "http" not in text.replace("http-equiv", "")


def test_what_loops_of_unknown_length_hide_is_told_and_no_roof_stands_on_it(tmp_path):
  hidden = {**COUNTED, "flops": 1e7, "unknown_flops": 1e7}
  shown = {"blocks": hidden, "a token": {**hidden, "one_pass": True}, "none": {**COUNTED}}
  rows = [{"race": "a", "name": name, **row} for name, row in shown.items()]
  assert [counted(row)[:2] for row in rows] == [
    ["≥10.0", "≥0.01"], ["10.0", "0.01"], ["2000", "2.00"],
  ]  # fmt: skip
  times = {"ratio": 1.0, "cpu_seconds": 0.5, **TIMED}
  moves = {**times, **COUNTED, "race": "b", "name": "gather", "flops": 0, "ideal_flops": 0}
  path = write(tmp_path / "kernels.json", "kernels", [{**rows[0], **times}, moves])
  text = bench_page(read_files([path]))
  assert "by the least work: blocks" in text and "≥10.0" in text
  assert "Roofline: a" in text and "Roofline: b" not in text  # of no FLOPs there is none
