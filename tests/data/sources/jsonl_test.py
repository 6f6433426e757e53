"""JSON lines and .json files: what their bytes mean, and what is lost where they are broken."""

import codecs
import gzip
import io
import json
import zlib

import pytest

from jaxmoe.data.sources.json_record import WRONG_FIELDS
from jaxmoe.data.sources.jsonl import Jsonl, _lines

TEXTS = [f"text {i} \N{SNOWMAN}" for i in range(5)]
RECORDS = [{"text": text} for text in TEXTS]
LINES = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in RECORDS)
FORMS = {
  "plain": LINES.encode(),
  "marked": codecs.BOM_UTF8 + LINES.encode(),
  "utf-16-le": codecs.BOM_UTF16_LE + LINES.encode("utf-16-le"),
  "utf-16-be": codecs.BOM_UTF16_BE + LINES.encode("utf-16-be"),
}
JSON = {
  "array on a line": json.dumps(RECORDS),
  "array over lines": json.dumps(RECORDS, indent=2),
  "array of lines": "[\n" + ",\n".join(map(json.dumps, RECORDS)) + "\n]\n",
  "objects over lines": "\n".join(json.dumps(record, indent=2) for record in RECORDS),
  "lines": LINES,
  "lines after a blank one": "\n" + LINES,
}


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


def _found(source, limit=999):
  entries = list(source.scan(limit))
  assert [entry.error for entry in entries] == [""] * len(entries)
  assert [source.read(entry.locator) for entry in entries] == [entry.content for entry in entries]
  return [entry.content for entry in entries]


@pytest.mark.parametrize("suffix", ["jsonl", "jsonl.gz"])
@pytest.mark.parametrize("form", FORMS)
def test_the_first_line_is_a_record_whatever_mark_stands_before_it(write_texts, form, suffix):
  raw = FORMS[form]
  folder = write_texts({f"a.{suffix}": gzip.compress(raw) if "gz" in suffix else raw})
  assert _found(Jsonl(folder)) == TEXTS


@pytest.mark.parametrize("suffix", ["json", "json.gz"])
@pytest.mark.parametrize("form", JSON)
def test_a_json_file_is_read_whatever_lines_its_records_are_on(write_texts, form, suffix):
  raw = codecs.BOM_UTF8 + JSON[form].encode()
  folder = write_texts({f"a.{suffix}": gzip.compress(raw) if "gz" in suffix else raw})
  assert _found(Jsonl(folder)) == _found(Jsonl(f"{folder}/a.{suffix}")) == TEXTS


def test_one_record_over_several_lines_is_one_document(write_texts):
  folder = write_texts({"a.json": json.dumps({"text": "x\ny", "n": [1, {"text": "z"}]}, indent=2)})
  assert _found(Jsonl(folder)) == ["x\ny"]


def test_json_files_beside_json_lines_are_not_records(write_texts):
  folder = write_texts({"a.jsonl": LINES, "dataset_infos.json": "{}"})
  assert _found(Jsonl(folder)) == TEXTS


def test_bad_records_of_an_array_are_flawed_one_by_one(write_texts):
  plain = [{"text": "a"}, {"title": "b"}, "c", {"text": "x" * 99}]
  folder = write_texts({"a.json": json.dumps(plain, indent=1)})
  entries = list(Jsonl(folder).scan(50))
  wrong = WRONG_FIELDS
  assert [entry.error for entry in entries] == ["", wrong, wrong, "larger than 50 bytes"]
  assert [entry.name for entry in entries] == [f"a.json:{i}" for i in range(1, 5)]


@pytest.mark.parametrize(
  ("text", "flaw"),
  [
    ('{\n "text": "a",\n "more": \n}', "not JSON"),
    (" \n", "an empty document"),
    ("{'text': 'a'}", "not JSON"),
  ],
)
def test_a_json_file_that_is_one_record_is_one_bad_record(write_texts, text, flaw):
  (entry,) = Jsonl(write_texts({"a.json": text})).scan(99)
  assert (entry.error, entry.lost_bytes) == (flaw, None)


def test_a_bad_first_line_of_lines_called_json_is_one_bad_record(write_texts):
  entries = list(Jsonl(write_texts({"a.json": "{oh\n" + LINES})).scan(99))
  assert [entry.error for entry in entries] == ["not JSON"] + [""] * len(TEXTS)


def test_json_lines_over_several_lines_are_named_for_what_they_are(write_texts):
  entries = list(Jsonl(write_texts({"a.jsonl": json.dumps(RECORDS, indent=1)})).scan(99))
  assert "a value over several lines is read where the file is called .json" in entries[0].error


# Files that end early or cannot be opened.


def _broken(folder, **fields):
  *entries, last = Jsonl(folder, **fields).scan(999)
  assert last.content is None and last.lost_bytes is not None
  assert all(entry.lost_bytes is None for entry in entries)
  return [entry.content for entry in entries], last


@pytest.mark.parametrize("number", [0, 2, 3])
def test_what_an_array_lost_is_what_follows_its_last_whole_record(write_texts, number):
  whole = (json.dumps(record, ensure_ascii=False) + ",\n" for record in RECORDS[:number])
  kept = "[" + "".join(whole)
  raw = (kept + '{"text": "ab').encode()
  contents, last = _broken(write_texts({"a.json": raw}))
  assert contents == TEXTS[:number]
  end = len(kept.rstrip(",\n").encode()) if number else 0
  assert last.lost_bytes == len(raw) - end
  assert last.error.startswith("cannot be read (not JSON behind character")


@pytest.mark.parametrize(("text", "why"), [("[", "has no end"), ("[]]", "has ended")])
def test_an_array_that_does_not_end_or_goes_on_is_broken(write_texts, text, why):
  assert why in _broken(write_texts({"a.json": text}))[1].error


@pytest.mark.parametrize("members", [1, 3])
def test_what_a_gzip_file_lost_that_was_cut_is_what_gave_no_line(write_texts, members):
  lines = [json.dumps({"text": f"line {i} {i**9:x}"}) + "\n" for i in range(9_000)]
  share = len(lines) // members
  parts = ("".join(lines[i * share : (i + 1) * share]) for i in range(members))
  raw = b"".join(gzip.compress(part.encode(), 1) for part in parts)
  raw = raw[: len(raw) // 2]
  contents, last = _broken(write_texts({"a.jsonl.gz": raw}))
  assert 0.2 * len(lines) < len(contents) < 0.6 * len(lines)
  assert last.error == "cannot be read (ends early; how much is cut off is not known)"
  good = "".join(lines[: len(contents)]).encode()
  assert _inflate(raw[: len(raw) - last.lost_bytes]).startswith(good)
  assert not _inflate(raw[: len(raw) - last.lost_bytes - 2]).startswith(good)


def test_a_gzip_file_whose_content_is_not_what_was_written_is_broken(write_texts):
  raw = bytearray(gzip.compress(LINES.encode(), 0))
  raw[raw.index(b"text 3") + 5] += 1
  _, last = _broken(write_texts({"a.jsonl.gz": bytes(raw)}))
  assert "CRC check failed" in last.error and 0 < last.lost_bytes <= len(raw)


def _inflate(raw):
  found = b""
  while raw:
    member = zlib.decompressobj(31)
    found, raw = found + member.decompress(raw), member.unused_data
  return found


def test_an_empty_gzip_file_is_broken_and_one_of_nothing_is_not(write_texts):
  folder = write_texts({"a.jsonl.gz": b"", "b.jsonl.gz": gzip.compress(b"")})
  (entry,) = Jsonl(folder).scan(99)
  assert entry.name == "a.jsonl.gz" and entry.lost_bytes == 0
  assert entry.error == "cannot be read (is empty; how much is cut off is not known)"


@pytest.mark.parametrize(
  ("raw", "named"),
  [
    (gzip.compress(LINES.encode(), mtime=0), "gzip data"),
    (LINES.encode("utf-16-le"), "UTF-16 without a byte order mark"),
    (codecs.BOM_UTF16_LE + LINES.encode("utf-16-le")[:-1], "invalid UTF-16"),
    (b"PAR1....", "a parquet file"),
  ],
)
def test_what_is_no_json_is_named_for_what_it_is(write_texts, raw, named):
  contents, last = _broken(write_texts({"a.jsonl": raw}))
  assert (contents, last.error) == ([], f"cannot be read ({named})")
  assert last.lost_bytes == len(raw)


def test_a_file_of_lines_that_the_system_stops_reading_is_broken(write_texts, monkeypatch):
  class _Disk(io.BytesIO):
    def readline(self, size=-1):
      if self.tell() > len(LINES.encode()) // 2:
        raise OSError(5, "Input/output error")
      return super().readline(size)

  folder = write_texts({"a.jsonl": LINES})
  monkeypatch.setattr("builtins.open", lambda *_: _Disk(LINES.encode()))
  contents, last = _broken(folder)
  assert contents == TEXTS[:3] and last.error == "cannot be read (Input/output error)"
  assert last.lost_bytes == len("".join(LINES.splitlines(True)[3:]).encode())


def test_as_found_a_mark_is_a_part_of_the_first_line_and_json_files_are_lines(write_texts):
  folder = write_texts({"a.jsonl": FORMS["marked"], "b.json": JSON["array over lines"]})
  flaws = [entry.error for entry in Jsonl(folder, as_found=True).scan(99)]
  assert flaws == ["not JSON", *[""] * 4]
  assert all(entry.error for entry in Jsonl(f"{folder}/b.json", as_found=True).scan(99))
