"""What every tokenizer keeps to, for each member of TOKENIZERS."""

import importlib
import json
import os
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from jaxmoe.core.errors import InputError
from jaxmoe.data.tokenizers import TOKENIZERS, load_tokenizer
from jaxmoe.data.tokenizers.bpe import Bpe
from jaxmoe.data.tokenizers.tokenizer_file import TokenizerFile

TEXTS = [f"the cat {i} sat on the mat, don't you think? <|endoftext|> caf\u00e9" for i in range(50)]


def _quiet(line):
  pass


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
  """Returns {kind: tokenizer}; the file is the one that training wrote."""
  bpe = Bpe(vocab_size=300).build(TEXTS, "", None, _quiet)
  saved = tmp_path_factory.mktemp("tokenizers") / "saved.json"
  bpe.save(saved)
  path = saved.with_name("tokenizer.json")
  path.write_text(json.loads(saved.read_text())["tokenizer"])
  file = TokenizerFile(path=str(path), vocab_size=512).build((), "", None, _quiet)
  return {"bytes": TOKENIZERS["bytes"][1].build((), "", None, _quiet), "bpe": bpe, "file": file}


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_every_text_comes_back(tokenizers, kind):
  tokenizer = tokenizers[kind]

  @given(st.text())
  @example("<|endoftext|>")
  @example("a<|endoftext|>b \u0120 \u010a\r\n\x00 \N{SNOWMAN}")
  @example(TEXTS[0])
  def check(text):
    ids = tokenizer.encode(text)
    assert ids.dtype == np.int32 and ids.ndim == 1
    assert tokenizer.eod_id not in ids
    assert not len(ids) or (ids.min() >= 0 and ids.max() < tokenizer.vocab_size)
    assert tokenizer.decode(ids) == text
    assert tokenizer.decode_bytes(ids) == text.encode()
    assert tokenizer.decode([*ids, tokenizer.eod_id]) == text

  check()


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_any_ids_decode(tokenizers, kind):
  tokenizer = tokenizers[kind]
  everything = range(tokenizer.vocab_size)
  joined = b"".join(tokenizer.decode_bytes([i]) for i in everything)
  assert tokenizer.decode_bytes(everything) == joined
  assert tokenizer.decode(everything) == joined.decode(errors="replace")
  assert set(joined) == set(range(256))


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_a_saved_tokenizer_is_read_back(tokenizers, kind, tmp_path):
  tokenizer = tokenizers[kind]
  tokenizer.save(tmp_path / "t.json")
  again = load_tokenizer(tmp_path / "t.json")
  for name in ("vocab_size", "eod_id", "digest"):
    assert getattr(again, name) == getattr(tokenizer, name)
  for text in (TEXTS[0], "<|endoftext|>"):
    assert again.encode(text).tolist() == tokenizer.encode(text).tolist()


@pytest.mark.parametrize("kind", ["bytes", "bpe"])
def test_a_prompt_of_ours_stands_behind_the_end_of_a_document(tokenizers, kind):
  tokenizer = tokenizers[kind]
  wanted = [tokenizer.eod_id, *tokenizer.encode("the cat")]
  found = tokenizer.encode_prompt("the cat")
  assert (found.tolist(), found.dtype) == (wanted, np.int32)


def elsewhere(tmp_path, template=None, level="ByteLevel", **fields):
  """Returns the tokenizer of a file with three special tokens and one that is not special."""
  library = importlib.import_module("tokenizers")
  if level == "ByteLevel":
    made = library.Tokenizer.from_str(Bpe(300).build(TEXTS, "", None, _quiet)._plain["tokenizer"])
  else:
    vocab = {"<|endoftext|>": 0, "<unk>": 1, "\u2581the": 2, "\u2581cat": 3}
    made = library.Tokenizer(library.models.WordLevel(vocab, unk_token="<unk>"))
    made.pre_tokenizer = library.pre_tokenizers.Metaspace()
    made.decoder = library.decoders.Metaspace()
  made.add_special_tokens(["<|endoftext|>", "<s>", "</s>", "<|call|>"])
  made.add_tokens(["<think>"])
  if template is not None:
    pairs = [(token, made.token_to_id(token)) for token in ("<s>", "</s>")]
    made.post_processor = library.processors.TemplateProcessing(template, None, pairs)
  made.enable_padding(length=16, pad_id=0, pad_token="<|endoftext|>")
  made.enable_truncation(8)
  path = tmp_path / "tokenizer.json"
  made.save(str(path))
  return TokenizerFile(str(path), 400, **fields).build((), "", None, _quiet)


def test_a_prompt_gets_what_a_tokenizer_made_elsewhere_adds_and_else_nothing(tmp_path):
  bare = elsewhere(tmp_path)
  text = "the cat sat on the mat, <s> don't you think?"
  plain = bare.encode(text).tolist()
  assert bare.encode_prompt(text).tolist() == plain and len(plain) > 8
  assert elsewhere(tmp_path, start="<s>").encode_prompt(text).tolist() == plain
  around = elsewhere(tmp_path, "<s> <s> $A </s>")
  start, end = (around._tokenizer.token_to_id(token) for token in ("<s>", "</s>"))
  assert around.encode_prompt(text).tolist() == [start, start, *plain, end]
  # It is kept with the tokenizer; files from before it was kept are told.
  for tokenizer in (bare, around):
    tokenizer.save(tmp_path / "t.json")
    saved = json.loads((tmp_path / "t.json").read_text())
    wanted = tokenizer.encode_prompt(text).tolist()
    assert load_tokenizer(tmp_path / "t.json").encode_prompt(text).tolist() == wanted
    assert saved.pop("made_elsewhere")
    (tmp_path / "t.json").write_text(json.dumps(saved))
    assert load_tokenizer(tmp_path / "t.json", True).encode_prompt(text).tolist() == wanted
    older = load_tokenizer(tmp_path / "t.json")
    assert older.encode_prompt(text).tolist() == [0, *plain]
    assert older.digest == tokenizer.digest


@pytest.mark.parametrize("level", ["ByteLevel", "Metaspace"])
def test_special_tokens_are_shown_to_those_who_ask(tmp_path, level):
  tokenizer = elsewhere(tmp_path, level=level)
  the, cat = (tokenizer.encode(word).tolist() for word in ("the", " cat"))
  call, think = (tokenizer._tokenizer.token_to_id(token) for token in ("<|call|>", "<think>"))
  ids = [*the, call, think, *cat, tokenizer.eod_id]
  shown = tokenizer.decode(ids).replace(" ", "")
  assert shown == "the<think>cat"
  shown = tokenizer.decode(ids, special=True).replace(" ", "")
  assert shown == "the<|call|><think>cat<|endoftext|>"


def test_the_end_of_a_document_of_bytes_is_shown_to_those_who_ask(tokenizers):
  ids = [*b"ab", 256, *b"c"]
  assert tokenizers["bytes"].decode(ids) == "abc"
  assert tokenizers["bytes"].decode(ids, special=True) == "ab<|endoftext|>c"


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_half_a_surrogate_pair_is_refused(tokenizers, kind):
  with pytest.raises(InputError, match="UTF-8"):
    tokenizers[kind].encode("ab\ud800")


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_the_record_knows_the_vocabulary_size(tokenizers, kind):
  sizes = {"bytes": 257, "bpe": 300, "file": 512}
  cls, tiny = TOKENIZERS[kind]
  assert type(tiny) is cls and tiny.vocab_size > 0
  assert tokenizers[kind].vocab_size == sizes[kind]


def test_another_process_trains_the_same_tokenizer(tokenizers):
  code = (
    "import sys, json; from jaxmoe.data.tokenizers.bpe import Bpe\n"
    "print(Bpe(300).build(json.load(sys.stdin), '', None, lambda line: None).digest)"
  )
  done = subprocess.run(
    [sys.executable, "-c", code],
    input=json.dumps(TEXTS),
    capture_output=True,
    text=True,
    check=True,
    timeout=120,
    env={**os.environ, "PYTHONHASHSEED": "1"},
  )
  assert done.stdout.strip() == tokenizers["bpe"].digest


def test_training_stops_at_the_stated_number_of_bytes():
  read = []

  def texts():
    for text in TEXTS:
      read.append(text)
      yield text

  Bpe(258, max_train_bytes=100).build(texts(), "", None, _quiet)
  assert sum(len(text.encode()) for text in read[:-1]) < 100 <= sum(map(len, read)) + 100
  assert len(read) < len(TEXTS)


def test_too_little_text_comes_with_the_size_that_works():
  with pytest.raises(InputError, match="vocab_size=") as caught:
    Bpe(5000).build(["abab abab"], "", None, _quiet)
  size = int(str(caught.value).split("vocab_size=")[1].split()[0])
  assert Bpe(size).build(["abab abab"], "", None, _quiet).vocab_size == size
  with pytest.raises(InputError, match="at least 257"):
    Bpe(256)


def test_a_damaged_kept_tokenizer_is_trained_again(tmp_path):
  lines = []
  first = Bpe(270).build(TEXTS, "digest", tmp_path, lines.append)
  (path,) = tmp_path.iterdir()
  kept = path.read_text()
  for damaged in (kept[:-50], kept.replace("ByteLevel", "ByteLeve1"), "[]", ""):
    path.write_text(damaged)
    again = Bpe(270).build(TEXTS, "digest", tmp_path, lines.append)
    assert again.digest == first.digest and path.read_text() == kept
  assert sum("damaged" in line for line in lines) == 4
  assert Bpe(270).build(iter(()), "digest", tmp_path, lines.append).digest == first.digest


def test_a_tokenizer_that_cannot_be_kept_is_used_all_the_same_and_that_is_said(tmp_path):
  (tmp_path / "file").touch()
  lines = []
  built = Bpe(270).build(TEXTS, "digest", tmp_path / "file" / "below", lines.append)
  assert built.digest == Bpe(270).build(TEXTS, "digest", None, lines.append).digest
  assert any("cannot keep the tokenizer" in line for line in lines)


def test_a_file_that_does_not_fit_is_refused(tokenizers, tmp_path):
  path = tmp_path / "tokenizer.json"
  for text in ("", "{}", "[1]"):
    path.write_text(text)
    with pytest.raises(InputError, match=r"not a tokenizer\.json"):
      TokenizerFile(str(path), 300).build((), "", None, _quiet)
  tokenizers["bpe"].save(tmp_path / "saved.json")
  path.write_text(json.loads((tmp_path / "saved.json").read_text())["tokenizer"])
  with pytest.raises(InputError, match="set it to 300 or more"):
    TokenizerFile(str(path), 299).build((), "", None, _quiet)
  with pytest.raises(InputError, match="has no token '</s>'"):
    TokenizerFile(str(path), 300, "</s>").build((), "", None, _quiet)
  with pytest.raises(InputError, match="cannot read"):
    TokenizerFile(str(tmp_path / "absent.json"), 300).build((), "", None, _quiet)


def test_a_file_that_is_no_saved_tokenizer_is_refused(tmp_path):
  path = tmp_path / "t.json"
  for text in ("", "[]", "{}", '{"kind": "subword"}', '{"kind": "words"}'):
    path.write_text(text)
    with pytest.raises(InputError, match=r"not a saved tokenizer|unknown tokenizer kind"):
      load_tokenizer(path)
  with pytest.raises(InputError, match="cannot read"):
    load_tokenizer(tmp_path / "absent.json")
