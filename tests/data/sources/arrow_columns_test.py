"""Parquet and Arrow files: bad rows, damaged files, random access, agreement with JSON lines."""

import builtins
import dataclasses
import json
import os
import pathlib
import random

import numpy as np
import pytest

from jaxmoe.core.errors import InputError
from jaxmoe.data.corpus import open_corpus
from jaxmoe.data.mixture import Data, MixturePart
from jaxmoe.data.sources import arrow_columns
from jaxmoe.data.sources.arrow import Arrow
from jaxmoe.data.sources.arrow_columns import GroupCache
from jaxmoe.data.sources.json_record import WRONG_FIELDS
from jaxmoe.data.sources.jsonl import Jsonl
from jaxmoe.data.sources.parquet import Parquet, ParquetReader

NAMES = ("a.parquet", "a.arrow", "a.stream.arrow")
TEXTS = [f"document {i} {'x' * (i * 37 % 101)}" for i in range(60)]


def _source(name, path):
  return (Parquet if name.endswith("parquet") else Arrow)(str(path), "rows")


@pytest.fixture(params=NAMES)
def name(request):
  return request.param


def _flaws(source, limit=10**6):
  return [entry.error for entry in source.scan(limit)]


def test_bad_rows_are_flawed_one_by_one(write_rows, bytes_as_strings, name):
  values = [b"good", None, b"\xff", "\N{SNOWMAN}".encode(), b"x" * 101, b"x" * 100, b""]
  source = _source(name, write_rows(name, bytes_as_strings(values)))
  flaws = ["", WRONG_FIELDS, "invalid UTF-8", "", "larger than 100 bytes", "", ""]
  entries = list(source.scan(100))
  assert [entry.error for entry in entries] == flaws
  assert [entry.name for entry in entries] == [f"{name}:{i + 1}" for i in range(7)]
  assert [entry.place for entry in entries] == [f"{source.path}/{e.name}" for e in entries]
  assert [e.content for e in entries if not e.error] == ["good", "\N{SNOWMAN}", "x" * 100, ""]


def test_bad_ids_and_bad_messages_are_flawed_one_by_one(write_rows, name):
  ids = [[1, 2], None, [], [3, None], [-1], [2**31], [2**31 - 1]]
  vocabulary = "an id out of the vocabulary"
  expected = ["", WRONG_FIELDS, "", WRONG_FIELDS, vocabulary, vocabulary, ""]
  assert _flaws(_source(name, write_rows(name, ids, "tokens"))) == expected
  talks = [
    [{"role": "user", "content": "a"}],
    None,
    [],
    [None],
    [{"role": None, "content": "a"}],
    [{"role": "two words", "content": "a"}],
  ]
  flaws = _flaws(_source(name, write_rows(name, talks, "messages", folder="talks")))
  wrong = WRONG_FIELDS
  word = "a role that is not a word"
  assert flaws == ["", wrong, "an empty document", wrong, wrong, word]
  big = [[{"role": "user", "content": "a" * 60}] * 2]
  source = _source(name, write_rows(name, big, "messages", folder="big"))
  assert _flaws(source, 100) == ["larger than 100 bytes"]


@pytest.mark.parametrize(
  "column", [[1, 2], [1.5, 2.5], [["a"], ["b"]], [{"a": 1}, {"a": 2}]], ids=str
)
@pytest.mark.parametrize("field", ["text", "tokens", "messages"])
def test_a_column_of_another_type_has_no_good_row(write_rows, name, field, column):
  assert _flaws(_source(name, write_rows(name, column, field))) == [WRONG_FIELDS] * 2


def test_a_file_without_one_column_of_documents_is_one_flaw_that_lists_its_columns(
  write_rows, name
):
  source = _source(name, write_rows(name, [1], "title", body=["a"]))
  (entry,) = source.scan(100)
  assert entry.error == (
    "cannot be read (needs one column of text, tokens, messages; it has 'title', 'body')"
  )
  assert entry.place == f"{source.path}/{name}"
  both = _source(name, write_rows(name, ["a"], "text", folder="both", tokens=[[1]]))
  assert len(_flaws(both)) == 1


def test_other_columns_and_kinds_of_strings_do_not_matter(write_rows, name):
  import pyarrow as pa

  kinds = [pa.large_string(), pa.binary()]
  if ".stream." not in name:
    kinds.append(pa.dictionary(pa.int32(), pa.string()))
  for i, kind in enumerate(kinds):
    column = pa.array(["b", "a", "b", None], kind)
    source = _source(name, write_rows(name, column, folder=f"kind{i}", other=[[1.0]] * 4))
    entries = list(source.scan(100))
    assert [entry.content for entry in entries] == ["b", "a", "b", None]
    assert [source.read(entry.locator) for entry in entries[:3]] == ["b", "a", "b"]


def test_a_stream_with_dictionaries_is_one_flaw_with_the_cure(write_rows):
  import pyarrow as pa

  column = pa.array(["a"], pa.dictionary(pa.int32(), pa.string()))
  (flaw,) = _flaws(Arrow(write_rows("a.stream.arrow", column)))
  assert "write it as a file" in flaw


def test_the_same_documents_are_split_alike_in_every_format(write_rows, write_texts, name):
  lines = "\n".join(json.dumps({"text": text}) for text in TEXTS)
  ours = _source(name, write_rows(name, TEXTS))
  theirs = Jsonl(write_texts({"a.jsonl": lines}), "rows")
  sides = []
  for source in (ours, theirs):
    corpus = open_corpus(Data((MixturePart(source),), held_out=0.3))
    sides.append({document.text for document in corpus.held_out("rows")})
  assert sides[0] == sides[1] != set()


def test_equal_documents_share_their_side_of_the_split(write_rows, name):
  entries = list(_source(name, write_rows(name, ["x", "y", "x"])).scan(99))
  assert entries[0].split_key == entries[2].split_key != entries[1].split_key
  assert entries[0].unit == entries[2].unit


def test_rows_in_any_order_are_read_as_they_were_found(write_rows, name):
  source = _source(name, write_rows(name, TEXTS, group=7))
  entries = list(source.scan(10**6))
  random.Random(0).shuffle(entries)
  for entry in entries:
    assert source.read(entry.locator) == entry.content == TEXTS[int(entry.name.split(":")[1]) - 1]


def test_a_stream_of_batches_from_rows_equals_that_from_lines(write_rows, write_texts, name):
  lines = "\n".join(json.dumps({"text": text}) for text in TEXTS)
  # Names order the documents, so lines and rows must be named alike.
  ours = _source(name, write_rows(name, TEXTS, folder="ours"))
  theirs = Jsonl(write_texts({name: lines}, "theirs") + f"/{name}", "rows")
  streams = [
    open_corpus(Data((MixturePart(source),), held_out=0.3, seq_len=16, cache_bytes=0)).stream(2, 0)
    for source in (ours, theirs)
  ]
  for _ in range(40):
    a, b = map(next, streams)
    for field in a:
      np.testing.assert_array_equal(a[field], b[field])
  for stream in streams:
    stream.close()


def test_a_group_is_loaded_once_while_it_is_kept_and_kept_while_it_fits(write_rows):
  path = write_rows("a.parquet", TEXTS, group=10) + "/a.parquet"
  loads = []

  class _Counting(ParquetReader):
    def load(self, group):
      loads.append(group)
      return super().load(group)

  rows = _Counting(path)
  everything, one = GroupCache(10**6), GroupCache(0)
  for _ in range(3):
    for group in range(6):
      assert len(everything.column(rows, group)) == 10
  assert loads == list(range(6))
  loads.clear()
  for group in (0, 0, 0, 1, 1, 0):
    one.column(rows, group)
  assert loads == [0, 1, 0]


def test_a_large_row_group_is_scanned_in_pieces(write_rows):
  texts = [f"{i:05d}" * 2000 for i in range(2000)]
  path = write_rows("a.parquet", texts, group=2000) + "/a.parquet"
  pieces = [(first, len(column)) for _, first, column in ParquetReader(path).pieces()]
  assert len(pieces) > 1 and max(size for _, size in pieces) < 2000
  assert [first for first, _ in pieces] == list(np.cumsum([0] + [size for _, size in pieces[:-1]]))


@pytest.mark.parametrize("keep", [0, 3, 7, 100, 0.5, 0.9, -9])
def test_a_file_that_is_cut_short_is_a_flaw_that_names_it(write_rows, name, keep):
  folder = write_rows(name, TEXTS)
  path = pathlib.Path(folder) / name
  whole = path.read_bytes()
  path.write_bytes(whole[: int(keep * len(whole)) if isinstance(keep, float) else keep])
  *rows, last = _source(name, folder).scan(10**6)
  assert last.error.startswith("cannot be read (") and "\n" not in last.error
  assert last.place == str(path) and last.name == name
  # A stream is good up to where it was cut; a file cannot be found its way in without its end.
  assert not rows or ".stream." in name
  assert [entry.content for entry in rows] == TEXTS[: len(rows)]
  size = path.stat().st_size
  assert last.lost_bytes == size if not rows else 0 < last.lost_bytes < size


def test_what_a_damaged_file_lost_is_the_share_of_its_rows_that_gave_none(
  write_rows, name, monkeypatch
):
  folder = write_rows(name, TEXTS, group=6)
  whole, seen = arrow_columns._checked, []

  def checked(column):
    seen.append(column)
    if len(seen) == 6:
      raise ValueError("damaged")
    return whole(column)

  monkeypatch.setattr(arrow_columns, "_checked", checked)
  *rows, last = _source(name, folder).scan(10**6)
  assert [entry.content for entry in rows] == TEXTS[:30]
  assert last.error == "cannot be read (damaged)"
  size = (pathlib.Path(folder) / name).stat().st_size
  if ".stream." in name:
    assert last.lost_bytes == pytest.approx(size / 2, rel=0.1)
  else:
    assert last.lost_bytes == round(size / 2)


def test_flipped_bytes_give_entries_or_one_flaw_and_never_a_traceback(write_rows, name):
  folder = write_rows(name, TEXTS)
  path = pathlib.Path(folder) / name
  whole, draw = path.read_bytes(), random.Random(name)
  found = set()
  for _ in range(150):
    damaged = bytearray(whole)
    for _ in range(draw.choice([1, 1, 8])):
      damaged[draw.randrange(len(whole))] ^= 1 << draw.randrange(8)
    path.write_bytes(damaged)
    source = _source(name, folder)
    for entry in source.scan(10**6):
      found.add(entry.error[:14])
      if not entry.error:
        assert source.read(entry.locator) == entry.content
  assert "cannot be read" in found


def test_a_damaged_file_stops_a_run_with_one_line_that_names_it(write_rows, name):
  folder = write_rows(name, TEXTS)
  (pathlib.Path(folder) / f"b{name}").write_bytes(b"PAR1 not really")
  source = _source(name, folder)
  with pytest.raises(InputError) as caught:
    open_corpus(Data((MixturePart(source),), held_out=0.3))
  assert f"b{name}: cannot be read" in str(caught.value) and "\n" not in str(caught.value)
  assert "--config.data.allow_broken_files=true" in str(caught.value)
  corpus = open_corpus(Data((MixturePart(source),), held_out=0.3, allow_broken_files=True))
  assert corpus.statistics["rows"]["train"]["documents"] > 30
  assert corpus.skipped["broken"] == {"rows": {"files": 1, "bytes": 15}}


def test_a_file_that_changes_or_vanishes_while_in_use_is_named(write_rows, name):
  folder = write_rows(name, TEXTS)
  data = Data((MixturePart(_source(name, folder)),), held_out=0.3, cache_bytes=0)
  corpus = open_corpus(data)
  write_rows(name, [text.replace("document", "someone") for text in TEXTS])
  document = corpus.train("rows")[0]
  with pytest.raises(InputError, match=rf"document '{document.name}' of 'rows' changed"):
    document.content  # noqa: B018
  corpus = open_corpus(data)
  write_rows(name, TEXTS[:1])
  with pytest.raises(InputError, match=r"of 'rows' changed"):
    corpus.train("rows")[-1].content  # noqa: B018
  with pytest.raises(InputError, match=r"no \.\w+.* file at"):
    list(dataclasses.replace(data.parts[0].source, path=os.path.join(folder, "no")).scan(9))


def test_without_pyarrow_the_extra_is_named(write_rows, name, monkeypatch):
  folder = write_rows(name, TEXTS)
  real = builtins.__import__

  def without(module, *rest):
    if module.split(".")[0] == "pyarrow":
      raise ImportError(module)
    return real(module, *rest)

  monkeypatch.setattr(builtins, "__import__", without)
  with pytest.raises(InputError, match=r"^source 'rows'.*pip install 'jaxmoe\[data\]'$"):
    open_corpus(Data((MixturePart(_source(name, folder)),)))


def test_columns_beside_the_messages_say_what_fields_beside_them_would(
  write_rows, write_texts, name
):
  call = {"function": {"name": "f", "arguments": {"n": 1}}}
  records = [
    {"messages": [{"role": "user", "content": f"q{i}"},
                  {"role": "assistant", "content": "a", **more}], **beside}
    for i, (more, beside) in enumerate([
      ({}, {}), ({"weight": 0.0}, {}), ({}, {"tools": [{"name": "f", "strict": True}]}),
      ({"tool_calls": [call], "name": "Ann"}, {}), ({"weight": 0.5}, {}),
    ])
  ]  # fmt: skip
  keys = ("role", "content", "weight", "tool_calls", "name")
  messages = [[{key: turn.get(key) for key in keys} for turn in r["messages"]] for r in records]
  tools = [record.get("tools") for record in records]
  source = _source(name, write_rows(name, messages, "messages", tools=tools, other=[1] * 5))
  lines = Jsonl(write_texts({"a.jsonl": "\n".join(map(json.dumps, records))}))
  rows, wanted = list(source.scan(10**6)), list(lines.scan(10**6))
  assert [row.error for row in rows] == [line.error for line in wanted]
  assert [row.content for row in rows] == [line.content for line in wanted]
  assert [row.split_key for row in rows[:4]] == [line.split_key for line in wanted[:4]]
  assert [source.read(row.locator) for row in rows[:4]] == [row.content for row in rows[:4]]
  assert rows[2].content.tools == [{"name": "f", "strict": True}]


def test_other_forms_of_columns_are_read(write_rows, name):
  source = _source(name, write_rows(name, ["2 + 2 = ", "a"], "prompt", completion=["4", None]))
  rows = list(source.scan(10**6))
  assert (rows[0].content.prompt, rows[0].content.completion) == ("2 + 2 = ", "4")
  assert source.read(rows[0].locator) == rows[0].content
  assert rows[1].error
  talks = [[{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]]
  source = _source(name, write_rows(name, talks, "conversations", folder="sharegpt", system=["S"]))
  (row,) = source.scan(10**6)
  assert [message[:2] for message in row.content] == [
    ("system", "S"), ("user", "q"), ("assistant", "a")
  ]  # fmt: skip


def test_a_column_of_words_that_repeat_says_more_of_messages_too(write_rows):
  import pyarrow as pa

  tools = pa.array(['[{"name": "f"}]', None], pa.string()).dictionary_encode()
  talks = [[{"role": "assistant", "content": "a"}]] * 2
  for name in ("a.parquet", "a.arrow"):
    source = _source(name, write_rows(name, talks, "messages", folder=name[2:], tools=tools))
    assert [row.content.tools for row in source.scan(10**6)] == [[{"name": "f"}], None]
