"""Lines over the size limit are passed over without being held."""

import io

import pytest

from jaxmoe.data.sources.jsonl import Jsonl, _lines


@pytest.mark.parametrize("end", [b"", b"\n"])
@pytest.mark.parametrize("limit", [1, 3, 5, 6, 100])
def test_lines_come_with_their_numbers_and_offsets(limit, end):
  data = b"one\n\n" + b"longer\n" + b"  \n" + b"four" + end
  expected, offset = [], 0
  for number, line in enumerate(data.splitlines(keepends=True), 1):
    text = line.rstrip(b"\n")
    if len(text) > limit:
      expected.append((number, offset, None))
    elif line.strip():
      expected.append((number, offset, line))
    offset += len(line)
  assert list(_lines(io.BytesIO(data), limit)) == expected


def test_a_long_line_is_read_in_pieces(write_texts):
  asked = []

  class _Spy(io.BytesIO):
    def readline(self, size=-1):
      asked.append(size)
      return super().readline(size)

  data = b"x" * 5_000_000 + b"\n" + b"end"
  assert list(_lines(_Spy(data), 10)) == [(1, 0, None), (2, 5_000_001, b"end")]
  assert all(0 < size <= 2**20 for size in asked)


def test_equal_documents_share_their_side_of_the_split(write_texts):
  folder = write_texts({"a.jsonl": '{"text": "x"}\n{"text": "y"}', "b.jsonl": '{"text":"x","n":1}'})
  keys = {entry.name: entry.split_key for entry in Jsonl(folder).scan(99)}
  assert keys["a.jsonl:1"] == keys["b.jsonl:1"] != keys["a.jsonl:2"]
