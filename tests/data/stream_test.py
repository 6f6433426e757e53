"""Batches: resuming, processes, shares, counters, threads."""

import dataclasses
import json
import subprocess
import sys
import threading

import numpy as np
import pytest

from jaxmoe.core.errors import InputError
from jaxmoe.data.corpus import open_corpus
from jaxmoe.data.mixture import Data, MixturePart
from jaxmoe.data.sources.jsonl import Jsonl
from jaxmoe.data.sources.synthetic import Synthetic
from jaxmoe.data.sources.text_files import TextFiles
from jaxmoe.data.tokenizers.bpe import Bpe

NAMES = ("ids", "labels", "position", "segment", "domain")


@pytest.fixture
def take():
  """Returns a function that takes batches of a stream, which is closed at the end of the test."""
  streams = []

  def take(stream, number):
    streams.append(stream)
    return [next(stream) for _ in range(number)]

  yield take
  for stream in streams:
    stream.close()


def _assert_equal(ours, theirs):
  assert len(ours) == len(theirs)
  for a, b in zip(ours, theirs):
    assert set(a) == set(b) == set(NAMES)
    for name in NAMES:
      np.testing.assert_array_equal(a[name], b[name])


def _timeless(stats):
  return {name: value for name, value in stats.items() if name != "time"}


def test_a_batch_is_five_int32_arrays(two_domains, take):
  (batch,) = take(open_corpus(two_domains).stream(4, 0), 1)
  assert set(batch) == set(NAMES)
  assert all(array.shape == (4, 16) and array.dtype == np.int32 for array in batch.values())


def test_every_row_says_what_domain_its_text_is_from(two_domains, take):
  batches = take(open_corpus(two_domains).stream(4, 0), 8)
  ids, domain = (np.concatenate([batch[name] for batch in batches]) for name in ("ids", "domain"))
  letters = ids < 256  # others stand between documents
  np.testing.assert_array_equal(domain[letters] == 0, ids[letters] >= ord("a"))
  assert set(domain.sum(axis=1).tolist()) == {0, domain.shape[1]}


@pytest.mark.parametrize("shuffle_tokens", [1, 640])
def test_a_stream_restored_at_any_batch_goes_on_bit_for_bit(two_domains, take, shuffle_tokens):
  data = dataclasses.replace(two_domains, shuffle_tokens=shuffle_tokens)
  stream = open_corpus(data).stream(4, 7)
  states, batches, counters = [json.dumps(stream.state())], [], []
  for _ in range(16):
    batches += take(stream, 1)
    states.append(json.dumps(stream.state()))
    counters.append(_timeless(stream.stats()))
  again = open_corpus(data).stream(4, 7)
  for done in (0, 1, 6, 15, 3):
    again.restore(json.loads(states[done]))
    assert json.dumps(again.state()) == states[done]
    _assert_equal(take(again, 16 - done), batches[done:])
    assert _timeless(again.stats()) == counters[-1]
    assert json.dumps(again.state()) == states[-1]


@pytest.mark.parametrize("count", [2, 4])
def test_processes_share_the_rows_and_the_state_of_one_stream(two_domains, take, count):
  corpus = open_corpus(two_domains)
  whole = corpus.stream(4, 3)
  first = take(whole, 5)
  state = whole.state()
  rest = take(whole, 5)
  parts = [corpus.stream(4, 3, index, count) for index in range(count)]
  for expected in (first, rest):
    sliced = [take(part, 5) for part in parts]
    joined = [
      {name: np.concatenate([batch[name] for batch in batches]) for name in NAMES}
      for batches in zip(*sliced)
    ]
    _assert_equal(joined, expected)
    assert all(part.stats()["domains"] == parts[0].stats()["domains"] for part in parts)
    for part in parts:
      part.restore(state)


def test_the_same_seed_gives_the_same_batches_and_another_seed_others(two_domains, take):
  corpus = open_corpus(two_domains)
  a, b, c = (take(corpus.stream(4, seed), 4) for seed in (5, 5, 6))
  _assert_equal(a, b)
  assert any((x["ids"] != y["ids"]).any() for x, y in zip(a, c))


def test_what_changes_no_batch_is_no_part_of_the_fingerprint(two_domains, take):
  small = dataclasses.replace(two_domains, cache_bytes=7)
  stream = open_corpus(two_domains).stream(4, 0)
  take(stream, 3)
  other = open_corpus(small).stream(4, 0)
  other.restore(stream.state())
  _assert_equal(take(other, 3), take(stream, 3))


def test_a_state_of_other_data_is_refused(two_domains, write_texts, take):
  state = open_corpus(two_domains).stream(4, 0).state()

  def refuses(data, batch_size=4, seed=0):
    with pytest.raises(InputError, match="other data"):
      open_corpus(data).stream(batch_size, seed).restore(state)

  open_corpus(two_domains).stream(4, 0, 1, 2).restore(state)
  refuses(two_domains, seed=1)
  refuses(two_domains, batch_size=8)
  refuses(dataclasses.replace(two_domains, seq_len=8))
  refuses(dataclasses.replace(two_domains, tokenizer=Bpe(260)))
  heavier = dataclasses.replace(two_domains.parts[0], weight=2.0)
  refuses(dataclasses.replace(two_domains, parts=(heavier, two_domains.parts[1])))
  write_texts({"a003.txt": "changed"}, "low")
  refuses(two_domains)


def test_the_share_of_rows_is_the_weight_in_every_stretch(two_domains, take):
  batches = take(open_corpus(two_domains).stream(8, 0), 50)
  rows = np.concatenate([batch["ids"] for batch in batches])
  letters = np.where(rows == 256, 0, rows).max(axis=1)
  is_low = letters >= ord("a")
  for start in range(0, 400 - 40, 20):
    assert abs(is_low[start : start + 40].mean() - 0.75) <= 1 / 40


def test_counters_agree_with_the_batches(two_domains, take):
  corpus = open_corpus(dataclasses.replace(two_domains, shuffle_tokens=1))
  stream = corpus.stream(4, 0)
  rows = np.concatenate([batch["labels"] for batch in take(stream, 60)])
  is_low = (np.where(rows == 256, 0, rows) >= ord("a")).any(axis=1)
  stats = stream.stats()
  assert stats["batches"] == 60
  for name, chosen in (("low", rows[is_low]), ("high", rows[~is_low])):
    labels = chosen.reshape(-1)
    ends = np.flatnonzero(labels == 256)
    expected = {
      "tokens": len(labels),
      "documents": len(ends),
      "bytes": int(ends[-1] + 1 - len(ends)),
      "epochs": len(ends) / len(corpus.train(name)),
    }
    assert stats["domains"][name] == expected
    finished = np.split(labels, ends + 1)[: len(corpus.train(name))]
    read = {bytes(piece[:-1].tolist()).decode() for piece in finished}
    assert read == {document.text for document in corpus.train(name)}


def _read_back(rows):
  """Returns the documents that end in rows, and what is left at the end."""
  labels = rows.reshape(-1)
  pieces = np.split(labels, np.flatnonzero(labels == 256) + 1)
  return [bytes(piece[piece != 256].tolist()).decode() for piece in pieces]


@pytest.mark.parametrize("restart", [False, True])
def test_counters_of_a_mixture_of_sources_agree_with_what_was_handed_out(
  write_texts, some_texts, take, restart
):
  lines = "\n".join(json.dumps({"text": t}) for t in some_texts(30, "STUVWXYZ").values())
  parts = (
    MixturePart(TextFiles(write_texts(some_texts(24, "abcdefgh"), "low"), "low"), 5.0),
    MixturePart(Jsonl(write_texts({"a.jsonl": lines}, "high"), "high"), 2.0),
    MixturePart(Synthetic("add", size=2, num_documents=40), 1.0),
  )
  data = Data(parts, seq_len=16, held_out=0.2, shuffle_tokens=1)
  stream = open_corpus(data).stream(4, 0)
  batches = take(stream, 30)
  if restart:
    state = json.loads(json.dumps(stream.state()))
    stream = open_corpus(data).stream(4, 0)
    stream.restore(state)
  rows = np.concatenate([batch["labels"] for batch in [*batches, *take(stream, 50)]])
  letters = np.where(rows == 256, 0, rows).max(axis=1)
  is_low, is_high = letters >= ord("a"), letters < ord("a")
  is_add = np.isin(rows, list(b"0123456789")).any(axis=1)
  corpus, stats = open_corpus(data), stream.stats()["domains"]
  for name, chosen in (("low", is_low & ~is_add), ("high", is_high & ~is_add), ("add", is_add)):
    ended = _read_back(rows[chosen])[:-1]
    sizes = {d.text: d.num_bytes for d in corpus.train(name)}
    assert stats[name] == {
      "tokens": int(chosen.sum()) * 16,
      "documents": len(ended),
      "bytes": sum(sizes[text] for text in ended),
      "epochs": len(ended) / len(corpus.train(name)),
    }
    assert stats[name]["epochs"] > 1


def test_time_is_kept_apart_from_what_repeats(two_domains, take):
  stream = open_corpus(two_domains).stream(4, 0)
  take(stream, 3)
  clock = stream.stats()["time"]
  assert set(clock) == {"busy_s", "wait_s", "tokens_per_s", "mb_per_s"}
  assert clock["busy_s"] > 0 and clock["tokens_per_s"] > 0
  assert "busy_s" not in json.dumps(stream.state())


def test_closing_stops_the_thread_and_the_stream(two_domains):
  before = set(threading.enumerate())
  stream = open_corpus(two_domains).stream(4, 0)
  next(stream)
  assert set(threading.enumerate()) - before
  stream.close()
  stream.close()
  assert not set(threading.enumerate()) - before
  with pytest.raises(ValueError, match="closed"):
    next(stream)


def test_a_stream_that_is_dropped_or_left_open_ends_without_a_sound(two_domains):
  code = (
    "from jaxmoe.data import *; from jaxmoe.data.sources.text_files import TextFiles; import sys\n"
    "data = Data((MixturePart(TextFiles(sys.argv[1])),), seq_len=16, held_out=0.2)\n"
    "corpus = open_corpus(data)\n"
    "dropped, left, closed = (corpus.stream(4, 0) for _ in range(3))\n"
    "[next(stream) for stream in (dropped, left, closed)]\n"
    "closed.close(); del dropped\n"
    "import jax._src.xla_bridge as bridge\n"
    "assert not bridge._backends and not {'torch', 'transformers'} & set(sys.modules)\n"
  )
  folder = two_domains.parts[0].source.path
  command = [sys.executable, "-W", "error", "-X", "dev", "-c", code, folder]
  done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
  assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_a_file_that_changes_while_in_use_stops_the_stream(two_domains, write_texts, take):
  stream = open_corpus(two_domains).stream(4, 0)
  write_texts({f"a{i:03d}.txt": "other" for i in range(24)}, "low")
  with pytest.raises(InputError, match="changed while it was in use"):
    take(stream, 3)


def test_rows_that_do_not_divide_over_the_processes_are_refused(two_domains):
  corpus = open_corpus(two_domains)
  for arguments in ((4, 0, 0, 3), (0, 0), (4, 0, 2, 2), (4, 0, -1, 2)):
    with pytest.raises(InputError, match="process"):
      corpus.stream(*arguments)


def test_what_is_kept_in_memory_changes_no_batch(two_domains, take):
  streams = (
    open_corpus(dataclasses.replace(two_domains, cache_bytes=size)).stream(4, 0)
    for size in (0, 100, 2**20)
  )
  none, some, everything = (take(stream, 20) for stream in streams)
  _assert_equal(none, everything)
  _assert_equal(some, everything)


def test_rows_of_long_sequences_and_one_training_document_work(write_texts, take):
  texts = {"one.txt": "hello", "two.txt": "world", "three.txt": "third"}
  data = Data((MixturePart(TextFiles(write_texts(texts))),), seq_len=64, held_out=0.5)
  (batch,) = take(open_corpus(data).stream(2, 0), 1)
  assert batch["segment"].max() >= 64 // 6
