"""launch.bench page: files of suites alone, and a place to write."""

import json

import pytest

ABOUT = {"suite": "step", "processor": "Deep Thought", "device": "cpu", "cores": 2, "jax": "0"}


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"about": {"suite": "step"}, "rows": [{}]}'])
def test_a_file_of_no_suite_is_refused_by_name(tmp_path, here, text):
  path, out = tmp_path / "other.json", tmp_path / "bench.html"
  path.write_text(text)
  result = here("bench", "page", f"--out={out}", path)
  assert result.code == 2 and "other.json: is not what a suite writes" in result.err
  assert not out.exists()


def test_a_page_needs_a_file_and_a_place(tmp_path, here):
  path = tmp_path / "step.json"
  record = {"about": ABOUT, "date": "2026-11-30T21:00:00", "finished": True, "rows": []}
  path.write_text(json.dumps(record))
  assert "--out is missing" in here("bench", "page", path).err
  assert "no file of a suite" in here("bench", "page", f"--out={tmp_path}/b.html").err
  assert "cannot be read" in here("bench", "page", f"--out={tmp_path}/b.html", "/no/file").err
  assert here("bench", "page", f"--out={tmp_path}/b.html", path).code == 0
  assert (tmp_path / "b.html").read_text().startswith("<!doctype html>")
