import io
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxmoe.train import reverse_lines
from jaxmoe.train.reverse_lines import clock_of, lines_back, parse


class Counted(io.BytesIO):
  """A file that counts the bytes read from it."""

  total = 0

  def read(self, size=-1):
    self.total += size
    return super().read(size)


LINE = st.binary(max_size=40).map(lambda content: content.replace(b"\n", b"-"))


@given(st.lists(LINE), LINE)
def test_the_lines_of_a_file_come_back_last_first_without_what_is_torn(lines, torn):
  file = io.BytesIO(b"".join(line + b"\n" for line in lines) + torn)
  with pytest.MonkeyPatch.context() as patch:
    for block in (1, 2, 7, 64, 1 << 16):
      patch.setattr(reverse_lines, "_BLOCK", block)
      assert list(lines_back(file)) == lines[::-1]


def test_the_end_of_a_large_file_is_read_without_its_beginning():
  line = b'{"step": 1, "load": [' + b"0.25, " * 2000 + b"0]}\n"
  file = Counted(line * 2000)
  back = lines_back(file)
  for _ in range(20):
    assert next(back) == line[:-1]
  assert file.total <= 25 * len(line) + (1 << 17)
  assert len(file.getvalue()) > 20e6


def test_a_line_longer_than_many_blocks_is_not_read_over_and_over():
  file = Counted(b"x" * (1 << 24) + b"\n" + b"y\n")
  assert [len(line) for line in lines_back(file)] == [1, 1 << 24]
  assert file.total <= (1 << 24) + 3


def test_a_file_that_is_cut_off_meanwhile_ends_the_lines():
  file = io.BytesIO(b"".join(b"%06d\n" % n for n in range(20_000)))
  back = lines_back(file)
  assert next(back) == b"019999"
  file.truncate(70)
  assert all(int(line) < 19_999 for line in back)


def test_what_is_no_object_is_nothing():
  assert parse(b'{"a": 1}') == {"a": 1}
  assert [parse(line) for line in (b"", b"[1]", b'{"a"', b"\xff", b"1")] == [None] * 5


@pytest.mark.parametrize("separators", [(",", ":"), (", ", ": ")])
def test_the_clock_of_a_line_is_read_without_the_rest(separators):
  clock = {"unix_s": 1.5, "seconds": {"step": 2}}
  line = {"step": 3, "data": {"time": {"tokens": 1}}, "time": clock}
  assert clock_of(json.dumps(line, separators=separators).encode())["time"] == clock
  first = {"time": clock, "step": 3}
  assert clock_of(json.dumps(first, separators=separators).encode())["time"] == clock
  assert clock_of(b'{"step":3}') is None
  assert clock_of(b'{"step":3,"time":{"se') is None
