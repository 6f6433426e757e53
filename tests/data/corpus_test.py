"""Opening a corpus: checks, splits, digests, the tokenizer."""

import codecs
import dataclasses
import gzip
import json
import os
import shutil
import types

import numpy as np
import pytest

from jaxmoe.core.config_io import from_json, from_plain, override, to_json
from jaxmoe.core.errors import InputError
from jaxmoe.data.corpus import open_corpus
from jaxmoe.data.held_out_split import hash_fraction
from jaxmoe.data.mixture import Data, MixturePart
from jaxmoe.data.skip_report import SkipReport
from jaxmoe.data.sources.json_record import WRONG_FIELDS
from jaxmoe.data.sources.jsonl import _SEVERAL, Jsonl
from jaxmoe.data.sources.stdlib import Stdlib
from jaxmoe.data.sources.synthetic import Synthetic
from jaxmoe.data.sources.text_files import TextFiles
from jaxmoe.data.tokenizers.bpe import Bpe
from jaxmoe.data.tokenizers.byte import Bytes

LINES = "\n".join(json.dumps({"text": f"document {i}"}) for i in range(40))


def _text_data(folder, **fields):
  return Data((MixturePart(TextFiles(folder)),), **{"held_out": 0.3, **fields})


def test_bad_records_are_skipped_counted_and_listed(write_texts, some_texts):
  bad = {
    "utf8.txt": b"abc\xff",
    "empty.txt": b"",
    "blank.txt": b" \n\t\n",
    "large.txt": b"x" * 101,
    "fits.txt": b"x" * 100,
  }
  folder = write_texts({**some_texts(30), **bad})
  data = _text_data(folder, max_bad_share=0.2, max_record_bytes=100)
  corpus = open_corpus(data)
  flaws = {"an empty document": 2, "invalid UTF-8": 1, "larger than 100 bytes": 1}
  assert corpus.skipped["counts"] == {"text": flaws}
  assert sorted(corpus.skipped["places"]) == sorted(
    f"{os.path.join(folder, name)}: {flaw}"
    for name, flaw in {
      "utf8.txt": "invalid UTF-8",
      "empty.txt": "an empty document",
      "blank.txt": "an empty document",
      "large.txt": "larger than 100 bytes",
    }.items()
  )
  assert json.loads(json.dumps(corpus.skipped)) == corpus.skipped
  sides = corpus.statistics["text"]
  assert sides["train"]["documents"] + sides["held_out"]["documents"] == 31
  with pytest.raises(InputError, match=r"4 of 35 records cannot be used.*max_bad_share=0.1$"):
    open_corpus(dataclasses.replace(data, max_bad_share=0.1))


def test_the_share_of_bad_records_is_the_decimal_it_is_written_as():
  skipped = SkipReport()
  for number in range(29):
    skipped.add("a", str(number), "no text")
  source = types.SimpleNamespace(domain="a")
  skipped.check(source, 71, 0.29)
  with pytest.raises(InputError, match="29 of 99 records"):
    skipped.check(source, 70, 0.29)


def test_bad_lines_are_named_by_their_number(write_texts):
  lines = [
    *LINES.encode().split(b"\n"),
    b"{not json",
    b'{"text": 3}',
    b'{"text": "a", "tokens": [1]}',
    b'["text"]',
    b'{"text": ""}',
    b'{"text": "\xff"}',
    b'{"text": "\\ud800"}',
    b'{"tokens": [1, 2.0]}',
    b'{"tokens": [1, 257]}',
    b'{"tokens": [-1]}',
    b'{"tokens": [99999999999]}',
    b'{"tokens": [256, 1]}',
    b'{"tokens": []}',
    b'{"text": "%s"}' % (b"x" * 300),
    b"",
    b'{"tokens": [104, 105]}',
    b'{"text": "the last one"}',
  ]
  folder = write_texts({"a.jsonl": b"\n".join(lines)})
  data = Data((MixturePart(Jsonl(folder)),), held_out=0.3, max_bad_share=0.5, max_record_bytes=200)
  corpus = open_corpus(data)
  path = os.path.join(folder, "a.jsonl")
  fields = WRONG_FIELDS
  reasons = [
    "not JSON", fields, fields, fields, "an empty document", "invalid UTF-8", "invalid UTF-8",
    fields, *["an id out of the vocabulary"] * 3, "the end-of-document id inside a document",
    "an empty document", "larger than 200 bytes",
  ]  # fmt: skip
  assert corpus.skipped["places"] == [f"{path}:{41 + i}: {r}" for i, r in enumerate(reasons)]
  texts = {d.text for side in (corpus.train, corpus.held_out) for d in side("jsonl")}
  assert texts == {f"document {i}" for i in range(40)} | {"hi", "the last one"}


def test_ids_are_refused_for_a_tokenizer_that_is_trained(write_texts):
  folder = write_texts({"a.jsonl": LINES + '\n{"tokens": [1]}'})
  data = Data((MixturePart(Jsonl(folder)),), Bpe(260), held_out=0.3, max_bad_share=0.5)
  (flaws,) = open_corpus(data).skipped["counts"].values()
  assert flaws == {"ids given for a tokenizer that is trained on text": 1}


@pytest.mark.parametrize("suffix", ["jsonl", "jsonl.gz"])
def test_documents_of_json_lines_are_read_again_exactly(write_texts, suffix):
  texts = [f"line {i}\r\n\u2028 \N{SNOWMAN} {'x' * i}" for i in range(30)]
  lines = "\n".join(json.dumps({"text": t, "more": 1}, ensure_ascii=i % 2) for i, t in
                    enumerate(texts)).encode()  # fmt: skip
  folder = write_texts({f"a.{suffix}": gzip.compress(lines) if "gz" in suffix else lines})
  corpus = open_corpus(Data((MixturePart(Jsonl(folder)),), held_out=0.3))
  documents = [*corpus.train("jsonl"), *corpus.held_out("jsonl")]
  assert sorted(d.text for d in documents) == sorted(texts)
  assert all(d.num_bytes == len(d.text.encode()) for d in documents)


def test_a_broken_file_of_records_ends_the_run_whatever_its_share(write_texts):
  damaged = gzip.compress(LINES.encode())[:-20]
  whole = f"{LINES}\n" * 9 + "{"
  folder = write_texts({"a.jsonl": whole, "b.jsonl.gz": damaged, "c.jsonl.gz": b""})
  data = Data((MixturePart(Jsonl(folder)),), held_out=0.3, max_bad_share=1.0)
  with pytest.raises(InputError, match=r"/b\.jsonl\.gz: cannot be read .*data\.allow_broken"):
    open_corpus(data)
  said = []
  allowed = dataclasses.replace(data, allow_broken_files=True)
  corpus = open_corpus(allowed, progress=said.append)
  of = corpus.skipped["broken"]["jsonl"]
  assert of["files"] == 2 and 0 < of["bytes"] < len(damaged)
  assert corpus.skipped["counts"] == {"jsonl": {_SEVERAL: 1}}
  assert [place.split(": ")[0] for place in corpus.skipped["places"]] == [
    f"{folder}/a.jsonl:361", f"{folder}/b.jsonl.gz", f"{folder}/c.jsonl.gz"
  ]  # fmt: skip
  (line,) = [line for line in said if "lost" in line]
  assert line.startswith("lost of jsonl: at least ") and f"such as {folder}/b.jsonl.gz:" in line
  assert corpus.fingerprint(4, 0) == open_corpus(allowed).fingerprint(4, 0)


def test_a_file_that_is_one_document_stays_one_bad_record(write_texts, some_texts):
  folder = write_texts(some_texts(200))
  os.symlink("not-mounted", os.path.join(folder, "gone.txt"))
  said = []
  corpus = open_corpus(_text_data(folder), progress=said.append)
  flaw = "cannot be read (No such file or directory)"
  assert corpus.skipped["counts"] == {"text": {flaw: 1}} and corpus.skipped["broken"] == {}
  assert said[-1] == (
    f"skipped of text: 1 bad record: {flaw} (1); such as {folder}/gone.txt: {flaw}"
  )


def test_where_everything_is_broken_the_files_are_named(write_texts):
  data = Data((MixturePart(Jsonl(write_texts({"a.jsonl.gz": b""}))),), allow_broken_files=True)
  with pytest.raises(InputError, match=r"0 of 0 records.*such as .*a\.jsonl\.gz: cannot be read"):
    open_corpus(data)


BEFORE = {
  "text": {"kind": "text", "path": "texts", "domain": "text"},
  "jsonl": {"kind": "jsonl", "path": "lines", "domain": "jsonl"},
  "code": {"kind": "stdlib", "domain": "code", "root": "library", "max_documents": None},
}
OTHERS_BEFORE = {
  "tokenizer": {"kind": "bytes"}, "seq_len": 128, "held_out": 0.3, "max_bad_share": 0.1,
  "max_record_bytes": 50_000_000, "shuffle_tokens": 2**19, "cache_bytes": 2**28,
  "chat": {"before": "<|{role}|>\n", "after": "\n", "answers": ["assistant"]}, "worker": "thread",
}  # fmt: skip
"""Sources and the other fields of the data as config.json had them when these were all."""
PRINTS = {"text": "ba2a8d6b1669c88d", "jsonl": "d266a14da94f1317", "code": "a9838973034411d0"}
"""How `open_corpus(from_plain(Data, plain)).fingerprint(4, 0)` began with the code of that time."""


@pytest.mark.parametrize("domain", BEFORE)
def test_a_recipe_from_before_gives_the_batches_it_gave(write_texts, monkeypatch, domain):
  marked = codecs.BOM_UTF8
  write_texts({f"{i}.txt": marked * (i % 2) + f"text {i}\r\n".encode() for i in range(12)})
  write_texts({"a.jsonl": marked + LINES.encode(), "b.jsonl.gz": b"", "c.json": "[]"}, "lines")
  modules = [f"email/m{i}.py" for i in range(9)]
  folder = write_texts({n: f"# {n}\n" for n in ("os.py", "json/tool.py", *modules)}, "library")
  monkeypatch.chdir(os.path.dirname(folder))
  os.symlink("0.txt", "texts/again.txt")
  os.symlink("os.py", "library/path.py")
  plain = {"parts": [{"source": BEFORE[domain], "weight": 1.0}], **OTHERS_BEFORE}
  assert open_corpus(from_plain(Data, plain)).fingerprint(4, 0)[:16] == PRINTS[domain]


def test_the_place_of_a_folder_changes_nothing_but_its_content_does(write_texts, some_texts):
  texts = some_texts(12)
  here = write_texts(texts, "here")
  there = write_texts(dict(reversed(texts.items())), "there/deep")
  a, b = open_corpus(_text_data(here)), open_corpus(_text_data(there))
  assert a.digest == b.digest and a.statistics == b.statistics
  assert [d.name for d in a.held_out("text")] == [d.name for d in b.held_out("text")]
  write_texts({next(iter(texts)): "another text"}, "there/deep")
  assert open_corpus(_text_data(there)).digest != a.digest


def test_adding_a_file_moves_no_other(write_texts, some_texts):
  folder = write_texts(some_texts(12))
  before = {d.name for d in open_corpus(_text_data(folder)).held_out("text")}
  write_texts({f"0new{i}.txt": f"new text {i}" for i in range(9)})
  after = {d.name for d in open_corpus(_text_data(folder)).held_out("text")}
  assert {name for name in after if "new" not in name} == before


def test_a_file_in_two_domains_is_held_out_in_both_or_in_neither(write_texts, some_texts):
  outer = write_texts({f"inner/{name}": text for name, text in some_texts(40).items()})
  inner = os.path.join(outer, "inner")
  parts = (MixturePart(TextFiles(outer, "outer")), MixturePart(TextFiles(inner, "inner")))
  corpus = open_corpus(Data(parts, held_out=0.2))
  held = [{d.name.split("/")[-1] for d in corpus.held_out(name)} for name in ("outer", "inner")]
  assert held[0] == held[1]
  # The two paths of a file hash apart, so by paths alone the domains would disagree.
  names = {f"{letter}{i:03d}.txt" for letter in "a" for i in range(40)}
  assert any(
    (hash_fraction(f"inner/{name}") < 0.2) != (hash_fraction(name) < 0.2) for name in names
  )


def test_held_out_documents_have_ids_and_bytes_of_their_text(write_texts):
  texts = {f"{i}.txt": f"\N{SNOWMAN} text number {i}\r\n" for i in range(20)}
  folder = write_texts(texts)
  corpus = open_corpus(_text_data(folder))
  held = corpus.held_out("text")
  for document in held:
    assert document.ids.dtype == np.int32
    assert document.text == texts[document.name]
    assert document.num_bytes == len(document.text.encode()) == len(document.ids)
    assert corpus.tokenizer.decode(document.ids) == document.text
    assert corpus.tokenizer.eod_id not in document.ids
  stream = b"".join(texts[document.name].encode() for document in held)
  assert b"".join(document.raw for document in held) == stream
  assert corpus.statistics["text"]["held_out"] == {"documents": len(held), "bytes": len(stream)}
  assert not {d.name for d in held} & {d.name for d in corpus.train("text")}


def test_documents_of_ids_count_the_bytes_they_decode_to(write_texts):
  ids = [list(f"\N{SNOWMAN}{i}".encode()) for i in range(20)]
  folder = write_texts({"a.jsonl": "\n".join(json.dumps({"tokens": i}) for i in ids)})
  corpus = open_corpus(Data((MixturePart(Jsonl(folder)),), held_out=0.3))
  for document in corpus.held_out("jsonl"):
    assert document.ids.tolist() in ids and document.num_bytes == len(document.ids)
    assert document.raw == bytes(document.ids.tolist())


def test_the_tokenizer_sees_the_training_split_only(write_texts, some_texts):
  folder = write_texts(some_texts(30))
  data = _text_data(folder, tokenizer=Bpe(280))
  corpus = open_corpus(data)
  assert corpus.tokenizer.vocab_size == 280
  held = corpus.held_out("text")[0].name
  write_texts({held: "zq" * 500})
  assert open_corpus(data).tokenizer.digest == corpus.tokenizer.digest
  assert len(open_corpus(data).tokenizer.encode("zqzq")) == 4
  write_texts({corpus.train("text")[0].name: "zq" * 500})
  assert open_corpus(data).tokenizer.digest != corpus.tokenizer.digest
  assert len(open_corpus(data).tokenizer.encode("zqzq")) < 4


def test_a_kept_tokenizer_is_found_by_corpus_and_settings(write_texts, some_texts, tmp_path):
  data = _text_data(write_texts(some_texts(30)), tokenizer=Bpe(280))
  lines = []
  for _ in range(2):
    open_corpus(data, tmp_path / "kept", lines.append)
  assert sum("training a tokenizer" in line for line in lines) == 1
  open_corpus(dataclasses.replace(data, tokenizer=Bpe(281)), tmp_path / "kept", lines.append)
  assert sum("training a tokenizer" in line for line in lines) == 2
  assert len(os.listdir(tmp_path / "kept")) == 2


def test_nothing_at_a_path_is_said_with_the_path(tmp_path, write_texts):
  empty = tmp_path / "empty"
  empty.mkdir()
  for path in (str(empty), str(tmp_path / "absent"), str(empty / "*.txt")):
    with pytest.raises(InputError, match=r"no \.txt file at"):
      open_corpus(_text_data(path))
  with pytest.raises(InputError, match="path is empty"):
    TextFiles(path="")
  with pytest.raises(InputError, match="0 of 0 records cannot be used: it is empty"):
    open_corpus(Data((MixturePart(Jsonl(write_texts({"a.jsonl": "\n\n"}))),)))


def test_recipes_with_values_that_make_no_sense_are_refused():
  part = MixturePart(Synthetic())
  for fields in (
    {"parts": ()}, {"parts": (part, part)}, {"held_out": 0.0}, {"held_out": 1.0}, {"seq_len": 0},
    {"max_bad_share": -0.1}, {"shuffle_tokens": 0}, {"cache_bytes": -1}, {"max_record_bytes": 0},
  ):  # fmt: skip
    with pytest.raises(InputError):
      Data(**{"parts": (part,), **fields})
  for weight in (0.0, -1.0, float("nan"), float("inf")):
    with pytest.raises(InputError, match="weight"):
      MixturePart(Synthetic(), weight)


def test_a_recipe_survives_json_and_takes_overrides():
  parts = (
    MixturePart(Stdlib("prose"), 2.0),
    MixturePart(Synthetic("add")),
    MixturePart(TextFiles("x")),
    MixturePart(Jsonl("y")),
  )
  for tokenizer in (Bytes(), Bpe(512)):
    data = Data(parts, tokenizer)
    assert from_json(Data, to_json(data)) == data
  changed = override(data, [("parts.1.source.size", "6"), ("tokenizer.vocab_size", "300")])
  assert changed.parts[1].source.size == 6 and changed.tokenizer == Bpe(300)


def test_the_three_domains_of_the_standard_library_do_not_overlap():
  parts = tuple(MixturePart(Stdlib(domain)) for domain in ("code", "prose", "names"))
  corpus = open_corpus(Data(parts))
  digests = [
    {d.digest for side in (corpus.train, corpus.held_out) for d in side(domain)}
    for domain in corpus.domains
  ]
  assert len(set.union(*digests)) == sum(map(len, digests))
  names = {d.name for side in (corpus.train, corpus.held_out) for d in side("code")}
  assert "pydoc_data/topics.py" not in names and "json/decoder.py" in names
  assert not any("test" in name.split("/")[:-1] or "site-packages" in name for name in names)
  assert corpus.skipped["counts"] == {}


def test_reading_one_folder_twice_gives_equal_fingerprints(write_texts, some_texts):
  folder = write_texts(some_texts(12))
  prints = {open_corpus(_text_data(folder)).fingerprint(4, 0) for _ in range(2)}
  assert len(prints) == 1
  shutil.rmtree(folder)
  write_texts(some_texts(12, seed=1))
  prints.add(open_corpus(_text_data(folder)).fingerprint(4, 0))
  assert len(prints) == 2
