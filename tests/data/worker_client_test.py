"""The data worker: its batches are the thread's, whatever happens to it."""

import dataclasses
import json
import os
import pathlib
import random
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from jaxmoe.core.config_io import to_json
from jaxmoe.core.errors import InputError
from jaxmoe.data.corpus import open_corpus
from jaxmoe.data.mixture import Data, MixturePart
from jaxmoe.data.sources.text_files import TextFiles
from jaxmoe.data.tokenizers.bpe import Bpe
from tests.data.callbacks import Callbacks


@pytest.fixture
def both(two_domains):
  """Returns the recipe with a thread and with a process."""
  return two_domains, dataclasses.replace(two_domains, worker="process")


@pytest.fixture
def streams():
  """Returns a function that makes a stream, which is closed at the end of the test."""
  made = []

  def make(data, seed=0, *rest, **more):
    made.append(open_corpus(data).stream(4, seed, *rest, **more))
    return made[-1]

  yield make
  for stream in made:
    stream.close()


def _take(stream, number):
  return [next(stream) for _ in range(number)]


def _assert_equal(ours, theirs):
  for a, b in zip(ours, theirs, strict=True):
    assert list(a) == list(b)
    for name in b:
      assert a[name].dtype == b[name].dtype == np.int32
      np.testing.assert_array_equal(a[name], b[name])


def _timeless(stream):
  return {name: value for name, value in stream.stats().items() if name != "time"}


def _pid(stream):
  return stream._producer._workers[0]._process.pid


def _runs(pid):
  """Whether a process runs; one that nobody waited for yet does not."""
  try:
    return pathlib.Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] not in "ZX"
  except OSError:
    return False


def _wait_until(condition, timeout_s=60):
  until = time.monotonic() + timeout_s
  while not condition():
    assert time.monotonic() < until
    time.sleep(0.02)


@pytest.mark.parametrize("seed", [0, 1, 7])
def test_batches_counts_and_states_equal_those_of_the_thread(both, streams, seed):
  thread, process = (streams(data, seed) for data in both)
  assert process.state() == thread.state()
  for _ in range(12):
    _assert_equal(_take(process, 1), _take(thread, 1))
    assert process.state() == thread.state()
    assert _timeless(process) == _timeless(thread)
  assert process.stats()["time"]["busy_s"] > 0


def test_a_state_moves_between_thread_and_process_and_back(both, streams):
  whole = streams(both[0], 3)
  states, batches = [whole.state()], []
  for _ in range(30):
    batches += _take(whole, 1)
    states.append(json.loads(json.dumps(whole.state())))
  thread, process = (streams(data, 3) for data in both)
  draw = random.Random(0)
  for _ in range(12):
    stream, at = draw.choice([thread, process, process]), draw.randrange(28)
    stream.restore(states[at])
    assert stream.state() == states[at]
    number = draw.randrange(0, 30 - at)
    _assert_equal(_take(stream, number), batches[at : at + number])
    assert stream.state() == states[at + number]


def test_each_process_of_a_run_has_a_worker_for_its_rows(both, streams):
  whole = _take(streams(both[0], 5), 6)
  for index in range(2):
    rows = slice(2 * index, 2 * index + 2)
    expected = [{name: array[rows] for name, array in batch.items()} for batch in whole]
    _assert_equal(_take(streams(both[1], 5, index, 2), 6), expected)


def test_a_trained_tokenizer_is_the_same_in_the_worker(both, tmp_path):
  thread, process = (
    open_corpus(dataclasses.replace(data, tokenizer=Bpe(270)), tmp_path / "kept").stream(4, 0)
    for data in both
  )
  _assert_equal(_take(process, 4), _take(thread, 4))
  thread.close()
  process.close()


@pytest.mark.parametrize("seed", [0, 1])
def test_a_killed_worker_is_replaced_and_no_batch_is_lost_or_repeated(both, streams, seed):
  told, draw = [], random.Random(seed)
  watch = Callbacks(worker=lambda *what: told.append(what))
  thread, process = streams(both[0], seed), streams(both[1], seed, callbacks=watch)
  for kills in range(3):
    number = draw.randrange(5)
    _assert_equal(_take(process, number), _take(thread, number))
    os.kill(_pid(process), signal.SIGKILL)
    # What it had made before may still come.
    while len(told) == kills:
      _assert_equal(_take(process, 1), _take(thread, 1))
  assert told == [("died", 1), ("died", 2), ("died", 3)]
  _assert_equal(_take(process, 10), _take(thread, 10))
  assert process.state() == thread.state() and _timeless(process) == _timeless(thread)


@pytest.mark.slow
def test_a_stopped_worker_is_killed_and_replaced(both, streams):
  told = []
  watch = Callbacks(worker=lambda *what: told.append(what), stall_s=3.0)
  thread, process = streams(both[0], 2), streams(both[1], 2, callbacks=watch)
  _assert_equal(_take(process, 3), _take(thread, 3))
  stopped = _pid(process)
  os.kill(stopped, signal.SIGSTOP)
  while not told:
    _assert_equal(_take(process, 1), _take(thread, 1))
  assert told == [("stalled", 1)] and not _runs(stopped)
  _assert_equal(_take(process, 10), _take(thread, 10))


def test_signals_for_the_whole_run_do_not_end_the_worker(both, streams):
  told = []
  thread = streams(both[0])
  process = streams(both[1], callbacks=Callbacks(worker=lambda *what: told.append(what)))
  _assert_equal(_take(process, 2), _take(thread, 2))
  for number in (signal.SIGINT, signal.SIGTERM):
    os.kill(_pid(process), number)
  assert os.getpgid(_pid(process)) != os.getpgrp()
  _assert_equal(_take(process, 40), _take(thread, 40))
  assert not told


def test_a_worker_that_keeps_dying_is_given_up_with_its_last_words(both, streams, monkeypatch):
  told = []
  code = "import sys; sys.exit('no luck\\ntoday')"
  monkeypatch.setattr("jaxmoe.data.worker_client._COMMAND", ("-c", code))
  stream = streams(both[1], callbacks=Callbacks(worker=lambda *what: told.append(what)))
  for _ in range(2):
    with pytest.raises(InputError, match=r"died 4 times.*last words: no luck today; set .*=thread"):
      next(stream)
  assert told == [("died", number) for number in (1, 2, 3, 4)]


def test_what_is_wrong_with_the_data_arrives_as_the_worker_says_it(both, streams, write_texts):
  thread, process = (streams(dataclasses.replace(data, cache_bytes=0)) for data in both)
  _take(process, 1)
  _take(thread, 1)
  write_texts({f"a{i:03d}.txt": "other" for i in range(24)}, "low")
  for stream in (thread, process, process):
    # Which one depends on how far ahead each has read.
    with pytest.raises(InputError, match=r"^document 'a0\d\d\.txt' of 'low' changed while it was"):
      _take(stream, 100)


def test_a_worker_that_finds_other_files_is_refused(both, streams, write_texts):
  watch = Callbacks(worker=lambda *what: None)
  process = streams(both[1], callbacks=watch)
  _take(process, 1)
  write_texts({"new.txt": "a new text"}, "low")
  os.kill(_pid(process), signal.SIGKILL)
  with pytest.raises(InputError, match="finds other data"):
    _take(process, 100)


@pytest.mark.slow
def test_a_worker_names_a_slow_source_and_is_not_taken_for_a_stalled_one(both, streams, tmp_path):
  path, told, restarts = tmp_path / "low" / "a003.txt", [], []
  text = path.read_bytes()

  def slow(domain, document, waited_s):
    if (domain, document) != ("low", "a003.txt"):
      return
    told.append(waited_s)
    # Once the wait is longer than the patience with a silent worker, the source wakes up.
    if waited_s > 3:
      writer = os.open(path, os.O_WRONLY)
      path.unlink()
      path.write_bytes(text)
      os.write(writer, text)
      os.close(writer)

  watch = Callbacks(
    slow=slow, worker=lambda *what: restarts.append(what), slow_s=0.5, stall_s=2.9
  )
  thread, process = (
    streams(dataclasses.replace(data, cache_bytes=0), callbacks=watch) for data in both
  )
  expected = _take(thread, 40)
  _assert_equal(_take(process, 1), expected[:1])
  path.unlink()
  os.mkfifo(path)  # a read of it waits for somebody who writes
  _assert_equal(_take(process, 39), expected[1:])
  assert len(told) >= 2 and not restarts


def test_no_worker_outlives_its_parent(both):
  code = (
    "import sys, time; from jaxmoe.core.config_io import from_json; from jaxmoe.data import *\n"
    "corpus = open_corpus(from_json(Data, sys.argv[1]))\n"
    "streams = [corpus.stream(4, 0) for _ in range(2)]\n"
    "next(streams[0])\n"  # the other worker waits to be told where to begin
    "print(*(stream._producer._workers[0]._process.pid for stream in streams), flush=True)\n"
    "time.sleep(600)\n"
  )
  command = [sys.executable, "-c", code, to_json(both[1])]
  with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as parent:
    workers = [int(pid) for pid in parent.stdout.readline().split()]
    assert len(workers) == 2 and all(map(_runs, workers))
    parent.kill()
  _wait_until(lambda: not any(map(_runs, workers)))


def test_a_stream_that_is_dropped_left_open_or_closed_ends_its_worker_without_a_sound(both):
  code = (
    "import sys; from jaxmoe.core.config_io import from_json; from jaxmoe.data import *\n"
    "corpus = open_corpus(from_json(Data, sys.argv[1]))\n"
    "dropped, left, closed, unused = (corpus.stream(4, 0) for _ in range(4))\n"
    "[next(stream) for stream in (dropped, left, closed)]\n"
    "for s in (dropped, left, closed, unused): print(s._producer._workers[0]._process.pid)\n"
    "closed.close(); closed.close(); del dropped, s\n"
  )
  command = [sys.executable, "-W", "error", "-X", "dev", "-c", code, to_json(both[1])]
  done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
  assert (done.returncode, done.stderr) == (0, "")
  pids = [int(line) for line in done.stdout.split()]
  assert len(pids) == 4 and not any(map(_runs, pids))


def test_the_worker_is_refused_under_another_name():
  with pytest.raises(InputError, match="worker must be"):
    Data((MixturePart(TextFiles("x")),), worker="thraed")
