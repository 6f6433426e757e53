"""What is printed is read, or dropped: nothing raises and nothing waits for long."""

import os
import sys

import pytest

from jaxmoe.commands.process.patient_output import Patient, outlive_readers, patient


@pytest.fixture
def pipe():
  """Returns the two ends of a pipe, read and write; either may be closed by the test."""
  ends = os.pipe()
  yield ends
  for end in ends:
    try:
      os.close(end)
    except OSError:
      continue


def test_what_is_read_is_written_whole_and_in_order(pipe):
  stream = patient(pipe[1])
  text = "".join(f"line {i} é\n" for i in range(900))  # more than a pipe takes at once
  stream.write(text)
  stream.flush()
  assert os.read(pipe[0], 1 << 16).decode() == text
  assert stream.buffer.raw.lost == ""


def test_a_reader_that_is_gone_ends_nothing(pipe):
  os.close(pipe[0])
  stream = patient(pipe[1])
  for _ in range(3):
    print("nobody hears this", file=stream)
  assert stream.buffer.raw.lost == "Broken pipe"


def test_a_full_disk_ends_nothing():
  descriptor = os.open("/dev/full", os.O_WRONLY)
  stream = patient(descriptor)
  print("it has no room", file=stream)
  assert stream.buffer.raw.lost == "No space left on device"
  os.close(descriptor)


def test_a_reader_that_does_not_read_is_waited_for_once_and_heard_again_when_he_does(pipe):
  raw = Patient(pipe[1], wait_s=0.01)
  size = 0
  while not raw.lost:  # until the pipe is full, and then once more
    size += raw.write(bytes(4096))
  assert raw.write(b"dropped") == 7
  rest = size - 4096
  while rest:
    rest -= len(os.read(pipe[0], rest))
  assert raw.write(b"heard") == 5
  assert os.read(pipe[0], 99) == b"heard"


def test_streams_that_are_none_of_the_system_s_stay_what_they_are(monkeypatch, capsys):
  before = sys.stdout, sys.stderr
  outlive_readers()
  assert (sys.stdout, sys.stderr) == before
