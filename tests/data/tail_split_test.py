"""A domain of one document holds out the end of it."""

import json
import pathlib

import numpy as np
import pytest

from jaxmoe.core.errors import InputError
from jaxmoe.data.corpus import open_corpus
from jaxmoe.data.mixture import Data, MixturePart
from jaxmoe.data.sources import Jsonl, Synthetic, TextFiles

PARAGRAPHS = "".join(f"Line {i} \N{SNOWMAN} of three\n" + "\n" * (i % 3 == 2) for i in range(300))
BORDERS = {
  "paragraphs": (PARAGRAPHS, "\n\n"),
  "lines": (PARAGRAPHS.replace("\n\n", "\n"), "\n"),
  "Windows lines": (PARAGRAPHS.replace("\n\n", "\n").replace("\n", "\r\n"), "\n"),
  "words": (PARAGRAPHS.replace("\n", " "), " "),
  "letters": ("x" * 999, "x"),
}


def _corpus(folder, said=None, **fields):
  say = None if said is None else said.append
  return open_corpus(Data((MixturePart(TextFiles(folder)),), **fields), progress=say)


@pytest.mark.parametrize("kind", BORDERS)
def test_one_file_is_trained_on_up_to_a_border_and_held_out_from_there(write_texts, kind):
  text, border = BORDERS[kind]
  said = []
  corpus = _corpus(write_texts({"a.txt": text}), said)
  (start,), (end,) = corpus.train("text"), corpus.held_out("text")
  assert start.text + end.text == text and start.text.endswith(border)
  assert 0.05 <= len(end.text) / len(text) < 0.1
  assert corpus.tokenizer.decode(end.ids) == end.text and end.num_bytes == len(end.text.encode())
  assert (start.name, end.name) == ("a.txt", "a.txt (its end)")
  assert said[-1] == f"text is one document: its last {end.num_bytes:,} bytes are held out"


def test_batches_hold_nothing_of_the_end(write_texts):
  folder = write_texts({"a.txt": "a" * 800 + "\n" + "b" * 100})
  corpus = _corpus(folder, seq_len=16, held_out=0.1)
  stream = corpus.stream(2, 0)
  ids = np.concatenate([next(stream)["ids"] for _ in range(40)])
  stream.close()
  assert ord("a") in ids and ord("b") not in ids
  assert corpus.held_out("text")[0].text == "b" * 100


def test_a_document_that_changes_is_told_apart(write_texts):
  folder = write_texts({"a.txt": PARAGRAPHS})
  corpus = _corpus(folder, cache_bytes=0)
  write_texts({"a.txt": PARAGRAPHS.replace("Line 0", "line 0")})
  assert _corpus(folder).digest != corpus.digest
  assert corpus.held_out("text")[0].text in PARAGRAPHS
  with pytest.raises(InputError, match=r"'a\.txt' of 'text' changed"):
    corpus.train("text")[0].text  # noqa: B018


def test_beside_another_domain_only_the_single_one_is_cut(write_texts, some_texts):
  many = write_texts(some_texts(40), "many")
  one = write_texts({"a.jsonl": json.dumps({"text": PARAGRAPHS})}, "one")
  alone = open_corpus(Data((MixturePart(TextFiles(many)),), held_out=0.2))
  both = open_corpus(Data((MixturePart(TextFiles(many)), MixturePart(Jsonl(one))), held_out=0.2))
  names = [document.name for document in alone.held_out("text")]
  assert [document.name for document in both.held_out("text")] == names
  assert both.statistics["jsonl"]["held_out"]["documents"] == 1


REFUSED = {
  "a letter": '{"text": "x"}',
  "messages": '{"messages": [{"role": "assistant", "content": "one two three"}]}',
  "ids": '{"tokens": [1, 2, 3]}',
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_cannot_be_cut_is_refused_as_before(write_texts, kind):
  source = Jsonl(write_texts({"a.jsonl": REFUSED[kind]}))
  with pytest.raises(InputError, match=r"of 1 documents none falls.*cut the text into more files"):
    open_corpus(Data((MixturePart(source),)))


def test_a_task_with_one_answer_is_not_cut():
  with pytest.raises(InputError, match="of 1 documents none falls"):
    open_corpus(Data((MixturePart(Synthetic(num_documents=1)),)))


def test_a_file_in_two_domains_is_not_trained_on_in_one_of_them(write_texts, some_texts):
  folder = pathlib.Path(write_texts({**some_texts(40), "sub/z.txt": PARAGRAPHS}))
  parts = (
    MixturePart(TextFiles(str(folder), "all")),
    MixturePart(TextFiles(str(folder / "sub"), "one")),
  )
  with pytest.raises(InputError, match="domain 'one': of 1 documents"):
    open_corpus(Data(parts, held_out=0.1))
