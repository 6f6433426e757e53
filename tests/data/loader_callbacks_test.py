"""Sources that are slow or fail while a stream runs: who is named, what is tried again."""

import dataclasses
import errno
import os
import threading

import numpy as np
import pytest

from jaxmoe.core.errors import InputError
from jaxmoe.data.corpus import open_corpus
from jaxmoe.data.sources.text_files import TextFiles
from tests.data.callbacks import Callbacks


@pytest.fixture
def uncached(two_domains):
  return dataclasses.replace(two_domains, cache_bytes=0)


@pytest.fixture
def reads(monkeypatch):
  """Returns a list of functions of (domain, path) that are called before a text is read."""
  before, real = [], TextFiles.read

  def read(self, locator):
    for call in before:
      call(self.domain, locator)
    return real(self, locator)

  monkeypatch.setattr(TextFiles, "read", read)
  return before


def _take(stream, number):
  batches = [next(stream) for _ in range(number)]
  stream.close()
  return batches


def _assert_equal(ours, theirs):
  for a, b in zip(ours, theirs, strict=True):
    for name in b:
      np.testing.assert_array_equal(a[name], b[name])


def test_a_slow_source_is_named_once_and_again_whenever_the_wait_has_doubled(uncached, reads):
  corpus = open_corpus(uncached)
  expected = _take(corpus.stream(4, 0), 6)
  told, blocked, open_again = [], threading.Event(), threading.Event()
  slow_path = corpus.train("high")[2].locator

  def block(domain, path):
    if path == slow_path:
      blocked.set()
      assert open_again.wait(60)

  def slow(domain, document, waited_s):
    if blocked.is_set():  # any batch may be slow on a busy machine
      told.append((domain, document, waited_s))
    if len(told) == 4:
      open_again.set()

  reads.append(block)
  watch = Callbacks(slow=slow, slow_s=0.02)
  _assert_equal(_take(corpus.stream(4, 0, callbacks=watch), 6), expected)
  # The first may have looked just before the document was reached.
  assert {entry[:2] for entry in told[1:4]} == {("high", os.path.basename(slow_path))}
  for (*_, waited_s), least in zip(told, (0.02, 0.04, 0.08, 0.16)):
    assert waited_s >= least


def test_callbacks_come_on_the_thread_of_the_caller(uncached, reads):
  corpus, threads = open_corpus(uncached), []
  failed = set()

  def fail_once(domain, path):
    if path not in failed and len(failed) < 2:
      failed.add(path)
      raise OSError(errno.EIO, "Input/output error")

  reads.append(fail_once)
  watch = Callbacks(unread=lambda *_: threads.append(threading.current_thread()))
  _take(corpus.stream(4, 0, callbacks=watch), 3)
  assert threads == [threading.current_thread()] * 2


def test_a_read_that_fails_once_is_named_and_changes_no_batch(uncached, reads):
  corpus = open_corpus(uncached)
  expected = _take(corpus.stream(4, 0), 6)
  failed, told = set(), []

  def fail_once(domain, path):
    if domain == "high" and path not in failed and len(failed) < 2:
      failed.add(path)
      raise OSError(errno.ESTALE, "Stale file handle")

  reads.append(fail_once)
  watch = Callbacks(unread=lambda *what: told.append(what))
  _assert_equal(_take(corpus.stream(4, 0, callbacks=watch), 6), expected)
  names = {os.path.basename(path) for path in failed}
  assert len(names) == 2
  assert sorted(told) == sorted(("high", name, "Stale file handle") for name in names)


def test_a_source_that_died_stops_the_stream_with_its_name_each_time_it_is_asked(uncached, reads):
  corpus = open_corpus(uncached)
  corpus._reader._waits_s = (0, 0, 0)
  told = []
  state = corpus.stream(4, 0).state()

  def fail(domain, path):
    if domain == "high":
      raise OSError(errno.ENOENT, "No such file or directory")

  reads.append(fail)
  stream = corpus.stream(4, 0, callbacks=Callbacks(unread=lambda *what: told.append(what)))
  for _ in range(2):
    with pytest.raises(InputError, match=r"document '.*' of 'high' could not be read in 4 tries"):
      _take(stream, 6)
    stream = corpus.stream(4, 0, callbacks=Callbacks())
  assert len(told) == 3 and len({name for _, name, _ in told}) == 1
  reads.clear()
  stream.restore(state)
  _take(stream, 6)


def test_an_error_is_told_again_until_a_state_is_restored(uncached, reads):
  corpus = open_corpus(uncached)
  expected = _take(corpus.stream(4, 0), 6)
  stream = corpus.stream(4, 0)
  state = stream.state()

  def change(domain, path):
    raise ValueError("gone bad")

  reads.append(change)
  for _ in range(3):
    with pytest.raises(InputError, match="gone bad"):
      next(stream)
  reads.clear()
  with pytest.raises(InputError, match="gone bad"):
    next(stream)
  stream.restore(state)
  _assert_equal(_take(stream, 6), expected)


def test_closing_leaves_a_thread_that_hangs_in_a_read_behind(uncached, reads, monkeypatch):
  monkeypatch.setattr("jaxmoe.data.prefetch._PATIENCE_S", 0.05)
  corpus, entered, open_again = open_corpus(uncached), threading.Event(), threading.Event()

  def block(domain, path):
    entered.set()
    assert open_again.wait(60)

  reads.append(block)
  told = []

  def slow(*what):
    told.append(what)
    raise KeyboardInterrupt

  stream = corpus.stream(4, 0, callbacks=Callbacks(slow=slow, slow_s=0.01))
  with pytest.raises(KeyboardInterrupt):
    next(stream)
  assert entered.wait(60)
  stream.close()
  open_again.set()
  assert len(told) == 1
