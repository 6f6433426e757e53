"""Any files: records as records, text as text whatever it is called, the rest left out by name."""

import codecs
import json

import pytest

from jaxmoe.core.errors import InputError
from jaxmoe.data.corpus import open_corpus, read_documents
from jaxmoe.data.mixture import Data, MixturePart
from jaxmoe.data.sources import Jsonl, Synthetic, TextFiles
from jaxmoe.data.sources.auto import source_at
from jaxmoe.data.sources.mixed_files import holds_text, sources_of

FILES = {
  "a.txt": "text a",
  "b.md": "text b",
  "c/d.py": "text d",
  "c/b.md": "another b",
  "LICENSE": "words",
  "package.json": '{"text": 1}',
  "utf16.csv": codecs.BOM_UTF16_LE + "wide".encode("utf-16-le"),
  "c/x.jsonl": '{"text": "one"}\n{"text": "two"}\n',
  "y.jsonl": '{"text": "three"}\n',
}
WITHOUT = {
  "logo.png": b"\x89PNG\r\n\x1a\n\0",
  "m.pyc": b"\0\0",
  "nul.dat": b"a\0b",
  "latin.md": b"gr\xfc\xdfe",
  "c/__init__.py": b"",
  "blank.md": b" \n",
  "z.gz": b"\x1f\x8b\x08\0",
  "late.bin": b"a" * 2**21 + b"\xff",
  "cut.md": b"\xe2\x98",
}


@pytest.fixture(scope="module")
def tokenizer():
  return open_corpus(Data((MixturePart(Synthetic()),))).tokenizer


def _read(path, tokenizer, **fields):
  sources, without = sources_of(path)
  data = Data((MixturePart(Synthetic()),), **fields)
  said = []
  documents, skipped = read_documents(sources, data, tokenizer, said.append)
  texts = {domain: {d.name: d.text for d in of} for domain, of in documents.items()}
  return texts, without, skipped, said


def test_every_file_that_holds_text_is_read_and_the_rest_is_named(write_texts, tokenizer):
  folder = write_texts({**FILES, **WITHOUT, ".git/config": "hidden"})
  texts, without, skipped, _ = _read(folder, tokenizer)
  plain = {name: of for name, of in FILES.items() if ".jsonl" not in name}
  assert texts["text"] == {**plain, "utf16.csv": "wide"}
  assert texts["jsonl"] == {"c/x.jsonl:1": "one", "c/x.jsonl:2": "two", "y.jsonl:1": "three"}
  assert sorted(without) == sorted(WITHOUT)
  assert skipped == {"counts": {}, "broken": {}, "places": []}


@pytest.mark.parametrize("name", FILES)
def test_a_file_named_outright_is_read_as_the_source_of_its_name(write_texts, tokenizer, name):
  path = f"{write_texts(FILES)}/{name}"
  if name == "package.json":
    with pytest.raises(InputError, match="source 'jsonl': 1 of 1 records cannot be used"):
      _read(path, tokenizer)
    return
  (texts,) = _read(path, tokenizer)[0].values()
  source = source_at(path)
  assert list(texts.values()) == [entry.content for entry in source.scan(99)]


def test_json_files_alone_are_records(write_texts, tokenizer):
  folder = write_texts({"a.json": json.dumps([{"text": "x"}, {"text": "y"}])})
  assert _read(folder, tokenizer)[0] == {"jsonl": {"a.json:1": "x", "a.json:2": "y"}}


def test_files_of_one_name_in_two_folders_are_two_documents(write_texts, tokenizer):
  folder = write_texts({"a/x.py": "first", "b/x.py": "second"})
  assert _read(folder, tokenizer)[0]["text"] == {"a/x.py": "first", "b/x.py": "second"}
  assert _read(f"{folder}/*/x.py", tokenizer)[0]["text"] == {"a/x.py": "first", "b/x.py": "second"}


def test_where_no_file_holds_text_that_is_said(write_texts):
  folder = write_texts(WITHOUT)
  for path in (folder, f"{folder}/logo.png"):
    with pytest.raises(InputError, match=r"no file at .* holds text"):
      sources_of(path)


def test_what_is_skipped_of_records_is_told(write_texts, tokenizer):
  folder = write_texts({"a.jsonl": '{"text": "x"}\n{bad\n'})
  _, _, skipped, said = _read(folder, tokenizer, max_bad_share=0.5)
  assert skipped["counts"] == {"jsonl": {"not JSON": 1}}
  place = f"{folder}/a.jsonl:2: not JSON"
  assert said == [f"skipped of jsonl: 1 bad record: not JSON (1); such as {place}"]


def test_a_file_that_cannot_be_read_is_a_bad_record_and_not_left_out(write_texts):
  assert holds_text(f"{write_texts({})}/absent.txt")


def test_a_txt_file_that_holds_no_text_is_a_bad_record(write_texts, tokenizer):
  folder = write_texts({"a.txt": b"gr\xfc\xdfe", "b.txt": "text"})
  with pytest.raises(InputError, match=r"1 of 2 records cannot be used: invalid UTF-8"):
    _read(folder, tokenizer)


def test_kinds_are_domains_of_their_own_names(write_texts):
  sources, _ = sources_of(write_texts(FILES))
  assert {source.domain: source.kind for source in sources} == {"text": TextFiles, "jsonl": Jsonl}
