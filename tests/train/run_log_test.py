import json
import types

import pytest

from jaxmoe.train.append_file import AppendFile
from jaxmoe.train.run_log import CutLines, RunLog, read_lines


@pytest.fixture
def log(tmp_path):
  return RunLog(tmp_path / "metrics.jsonl", tmp_path / "events.jsonl")


def line(step, **fields):
  return {"step": step, "loss": 1 / step, **fields}


def lines(path):
  return [json.loads(text) for text in path.read_text().splitlines()]


def test_every_line_is_one_object_as_it_was_given(log, tmp_path):
  given = [line(1, text='two\nlines and "quotes"'), line(2, layers={"0": {"load": [0.5, 0.5]}})]
  for each in given:
    log.step(each)
  assert lines(tmp_path / "metrics.jsonl") == given
  assert (tmp_path / "metrics.jsonl").read_text().count("\n") == 2


def test_a_number_that_json_cannot_say_is_refused_and_nothing_is_written(log, tmp_path):
  log.step(line(1))
  before = (tmp_path / "metrics.jsonl").read_bytes()
  with pytest.raises(ValueError, match="JSON"):
    log.step({"step": 2, "loss": float("nan")})
  assert (tmp_path / "metrics.jsonl").read_bytes() == before


@pytest.mark.parametrize("step", [0, 1, 3, 5])
def test_going_on_keeps_the_lines_up_to_the_step_byte_for_byte(log, tmp_path, step):
  path = tmp_path / "metrics.jsonl"
  for n in range(1, 6):
    log.step(line(n))
  kept = b"".join(path.read_bytes().splitlines(keepends=True)[:step])
  log.resume(step)
  assert path.read_bytes() == kept
  for n in range(step + 1, 8):
    log.step(line(n))
  assert lines(path) == [line(n) for n in range(1, 8)]


TORN = [b'{"step":4,"lo', b'{"step":4,"loss":0.25}', b'{"step":4,"loss":0.25}{"step"', b"\x00\n"]


@pytest.mark.parametrize("tail", TORN)
def test_a_torn_last_line_is_cut_and_the_file_goes_on_cleanly(log, tmp_path, tail):
  path = tmp_path / "metrics.jsonl"
  for n in range(1, 4):
    log.step(line(n))
  whole = path.read_bytes()
  path.write_bytes(whole + tail)
  log.resume(3)
  assert path.read_bytes() == whole
  log.step(line(4))
  assert lines(path) == [line(n) for n in range(1, 5)]


BAD = (b'{"step":2', b'{"step":2}', b"[]\n", b"3\n", b'{"step":7}\n', b"\n", b"\xff\n")


@pytest.mark.parametrize("bad", BAD)
def test_lines_that_should_be_there_and_are_not_are_reported(log, tmp_path, bad):
  path = tmp_path / "metrics.jsonl"
  log.step(line(1))
  whole = path.read_bytes()
  path.write_bytes(whole + bad)
  log.resume(4)
  assert path.read_bytes() == whole
  (event,) = lines(tmp_path / "events.jsonl")
  assert (event["event"], event["first"], event["last"]) == ("metrics_missing", 2, 4)


def test_a_missing_file_is_made_by_going_on_from_nothing(log, tmp_path):
  log.resume(0)
  assert (tmp_path / "metrics.jsonl").read_bytes() == b""
  assert not (tmp_path / "events.jsonl").exists()


def test_events_only_grow_and_their_clock_stands_under_time(log, tmp_path):
  log.event("start", params=3)
  log.resume(0)
  log.event("resume", step=0)
  log.sync()
  events = lines(tmp_path / "events.jsonl")
  assert [event["event"] for event in events] == ["start", "resume"]
  assert events[0]["params"] == 3
  assert all(list(event["time"]) == ["unix_s"] for event in events)


def timed(step, seconds):
  return line(step, time={"unix_s": 100.0 + step, "seconds": seconds})


def test_what_is_cut_is_measured(log):
  for n in range(1, 5):
    log.step(timed(n, {"step": 2.0, "data": 0.5}))
  assert log.resume(4) == CutLines()
  assert log.resume(1) == CutLines(steps=3, seconds=7.5, last_unix_s=104.0)


def test_torn_lines_count_for_nothing_when_they_are_cut(log, tmp_path):
  log.step(timed(1, {"step": 2.0}))
  log.step(timed(2, {"step": 3.0}))
  with open(tmp_path / "metrics.jsonl", "a") as file:
    file.write('{"step":3,"lo')
  assert log.resume(1) == CutLines(steps=1, seconds=3.0, last_unix_s=102.0)
  assert lines(tmp_path / "metrics.jsonl") == [timed(1, {"step": 2.0})]


@pytest.fixture
def disk(monkeypatch):
  """Returns a switch: while `full` is true, no file can be written."""
  real, switch = AppendFile._write, types.SimpleNamespace(full=False)

  def write(self, data):
    if switch.full:
      raise OSError(28, "No space left on device")
    real(self, data)

  monkeypatch.setattr(AppendFile, "_write", write)
  return switch


def test_lines_wait_for_a_full_disk_which_is_told_once_and_no_sync_succeeds(tmp_path, disk):
  said = []
  log = RunLog(tmp_path / "metrics.jsonl", tmp_path / "events.jsonl", said.append)
  log.step(line(1))
  disk.full = True
  for n in (2, 3):
    log.step(line(n))
    log.event("skipped", step=n)
  assert len(said) == 1 and "No space left on device" in said[0]
  with pytest.raises(OSError, match="No space left"):
    log.sync()
  assert lines(tmp_path / "metrics.jsonl") == [line(1)]
  disk.full = False
  log.step(line(4))
  assert lines(tmp_path / "metrics.jsonl") == [line(n) for n in (1, 2, 3, 4)]
  kinds = [event["event"] for event in lines(tmp_path / "events.jsonl")]
  assert kinds == ["skipped", "skipped", "journal_late"]
  assert len(said) == 2
  log.sync()


def test_lines_that_wait_are_cut_like_those_that_do_not(tmp_path, disk):
  log = RunLog(tmp_path / "metrics.jsonl", tmp_path / "events.jsonl")
  log.step(timed(1, {"step": 1.0}))
  disk.full = True
  for n in (2, 3, 4):
    log.step(timed(n, {"step": 1.0}))
  assert log.resume(2) == CutLines(steps=2, seconds=2.0, last_unix_s=104.0)
  disk.full = False
  log.step(line(3))
  assert [each["step"] for each in lines(tmp_path / "metrics.jsonl")] == [1, 2, 3]


def test_reading_leaves_out_what_is_no_object(tmp_path):
  path = tmp_path / "lines"
  path.write_bytes(b'{"a":1}\n[2]\nnot json\n\xff\n\x00\x00\n{"a":2}\n{"a":3')
  assert list(read_lines(path)) == [{"a": 1}, {"a": 2}]
  assert list(read_lines(tmp_path / "none")) == []
