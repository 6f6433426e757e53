"""A line torn by a machine that went down is cut off, and the run goes on as if it were not."""

import json

import pytest

from tests.faults import runs


def cut_off(data, start, rng):
  """Ends the file inside its last line."""
  return data[: rng.randrange(start + 1, len(data))]


def garbage(data, start, rng):
  """Appends bytes of another file, with or without ends of lines."""
  return data + rng.randbytes(rng.randrange(1, 3000)) + rng.choice((b"", b"\n", b"{}\n"))


def zeros_inside(data, start, rng):
  """Ends the file with zeros, as a file system does that had made room and not written."""
  place = rng.randrange(start, len(data))
  return data[:place] + bytes(len(data) - place + rng.randrange(100))


def zeros_behind(data, start, rng):
  """Appends zeros."""
  return data + bytes(rng.randrange(1, 5000))


TEARS = (cut_off, garbage, zeros_inside, zeros_behind)


def tear(path, seed, rng):
  data = path.read_bytes()
  start = data[:-1].rindex(b"\n") + 1
  path.write_bytes(TEARS[seed % len(TEARS)](data, start, rng))


@pytest.mark.slow
def test_a_torn_line_of_metrics_is_cut_off(case, broken_off, seed):
  rng = case.begin("torn_metrics_line", seed)
  case.copy(broken_off)
  tear(case.workdir / "metrics.jsonl", seed, rng)
  case.recover()
  assert not runs.events(case.workdir, "metrics_missing")


@pytest.mark.slow
def test_a_torn_line_of_events_costs_no_other_line(case, broken_off, seed):
  rng = case.begin("torn_events_line", seed)
  case.copy(broken_off)
  path = case.workdir / "events.jsonl"
  before = list(map(json.loads, path.read_bytes().splitlines()))
  tear(path, seed, rng)
  case.recover(torn=True)
  after = runs.events(case.workdir, torn=True)
  assert after[: len(before) - 1] == before[:-1]
  kinds = [event["event"] for event in after[len(before) - 1 :]]
  assert [kind for kind in kinds if kind in ("process", "resume", "compiled", "done")] == [
    "process", "resume", "compiled", "done"
  ]  # fmt: skip
