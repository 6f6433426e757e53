"""A process that is alone; what several do is tested by tests/commands/local_test.py."""

import pytest

from jaxmoe.checkpoint.manifest import DamagedStepError
from jaxmoe.core import multihost
from jaxmoe.core.errors import CheckpointError, InputError, PeerError


def test_a_process_that_is_alone_is_the_first_and_asks_nobody(monkeypatch):
  monkeypatch.setattr(multihost, "_rows", None)
  assert multihost.is_main_process() and not multihost.is_multi_process()
  assert multihost.all_gather_text("a") == ["a"]
  assert multihost.broadcast("a") == multihost.first_error("a") == "a"
  multihost.assert_equal("what", "a")
  with pytest.raises(InputError, match="mine"), multihost.raise_on_all():
    raise InputError("mine")


def test_alone_whether_to_stop_is_answered_at_once():
  answers = iter([False, True])
  asked = multihost.AnyProcess(lambda: next(answers))
  assert [asked(), asked()] == [False, True]


@pytest.fixture
def three(monkeypatch):
  """Makes this process the second of three, of which the others say what a list says, in turn."""
  others = []

  def rows(texts):
    before, after = others.pop(0)
    parts = [len(text).to_bytes(4, "little") + text.encode() for text in (before, after)]
    size = max(map(len, (*parts, texts)))
    return [part.ljust(size, b"\0") for part in (parts[0], texts, parts[1])]

  monkeypatch.setattr(multihost, "is_multi_process", lambda: True)
  monkeypatch.setattr(multihost, "_rows", rows)
  monkeypatch.setattr(multihost, "_ROW_BYTES", 1 << 20)
  return others


def test_what_one_cannot_do_none_goes_on_from(three):
  three.append(("", "InputError\nno such file"))
  with pytest.raises(InputError, match=r"^no such file \(process 2\)$"), multihost.raise_on_all():
    pass
  three.append(("", "DamagedStepError\nbits"))
  with pytest.raises(DamagedStepError, match="bits"), multihost.raise_on_all():
    pass
  three.append(("CheckpointError\nfull", ""))
  with pytest.raises(CheckpointError, match=r"^full$"), multihost.raise_on_all():
    raise InputError("mine, which comes second")
  three.append(("", ""))
  with multihost.raise_on_all():
    pass


def test_trouble_of_any_is_trouble_of_all_and_says_whose_it_is(three):
  three.extend([("", "full"), ("", ""), ("a", "b")])
  assert multihost.first_error("") == "full (process 2)"
  assert multihost.first_error("mine") == "mine (process 1)"
  assert multihost.first_error("") == "a"


def test_processes_that_see_other_files_are_told_apart(three):
  three.append(("a", "b"))
  with pytest.raises(InputError, match="text of process 2 is another than that of process 0"):
    multihost.assert_equal("the text", "a")


def test_a_text_longer_than_a_row_arrives_whole(monkeypatch):
  monkeypatch.setattr(multihost, "is_multi_process", lambda: True)
  size, sent = 16, "ü" * 37

  def rows(texts):
    return [texts[:size].ljust(size, b"\0")] * 2

  monkeypatch.setattr(multihost, "_rows", rows)
  monkeypatch.setattr(multihost, "_ROW_BYTES", size)
  assert multihost.all_gather_text(sent) == [sent, sent]


def test_only_what_a_dead_process_leaves_is_taken_for_it(monkeypatch):
  gone = ValueError("UNKNOWN: Gloo AllGather failed: Connection closed by peer [127.0.0.1]:13221")
  assert multihost.peer_error(gone) is None, "alone nobody is lost"
  monkeypatch.setattr(multihost, "is_multi_process", lambda: True)
  assert isinstance(multihost.peer_error(gone), PeerError)
  assert multihost.peer_error(RuntimeError("RESOURCE_EXHAUSTED: out of memory")) is None
  assert multihost.peer_error(InputError("batch_size must be a multiple")) is None
  assert multihost.peer_error(KeyError("gloo")) is None
