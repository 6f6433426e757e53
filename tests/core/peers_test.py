"""A process that is alone; what several do is tested by tests/launch/local_test.py."""

import pytest

from jaxmoe.checkpoint.manifest import DamagedStepError
from jaxmoe.core import peers
from jaxmoe.core.errors import CheckpointError, InputError, PeerError


def test_a_process_that_is_alone_is_the_first_and_asks_nobody(monkeypatch):
  monkeypatch.setattr(peers, "_rows", None)
  assert peers.first() and not peers.several()
  assert peers.gather("a") == ["a"]
  assert peers.of_first("a") == peers.first_trouble("a") == "a"
  peers.same("what", "a")
  with pytest.raises(InputError, match="mine"), peers.together():
    raise InputError("mine")


def test_alone_whether_to_stop_is_answered_at_once():
  answers = iter([False, True])
  asked = peers.AnyAsked(lambda: next(answers))
  assert [asked(), asked()] == [False, True]


@pytest.fixture
def three(monkeypatch):
  """Makes this process the second of three, of which the others say what a list says, in turn."""
  others = []

  def rows(said):
    before, after = others.pop(0)
    parts = [len(text).to_bytes(4, "little") + text.encode() for text in (before, after)]
    size = max(map(len, (*parts, said)))
    return [part.ljust(size, b"\0") for part in (parts[0], said, parts[1])]

  monkeypatch.setattr(peers, "several", lambda: True)
  monkeypatch.setattr(peers, "_rows", rows)
  monkeypatch.setattr(peers, "_ROW_BYTES", 1 << 20)
  return others


def test_what_one_cannot_do_none_goes_on_from(three):
  three.append(("", "InputError\nno such file"))
  with pytest.raises(InputError, match=r"^no such file \(process 2\)$"), peers.together():
    pass
  three.append(("", "DamagedStepError\nbits"))
  with pytest.raises(DamagedStepError, match="bits"), peers.together():
    pass
  three.append(("CheckpointError\nfull", ""))
  with pytest.raises(CheckpointError, match=r"^full$"), peers.together():
    raise InputError("mine, which comes second")
  three.append(("", ""))
  with peers.together():
    pass


def test_trouble_of_any_is_trouble_of_all_and_says_whose_it_is(three):
  three.extend([("", "full"), ("", ""), ("a", "b")])
  assert peers.first_trouble("") == "full (process 2)"
  assert peers.first_trouble("mine") == "mine (process 1)"
  assert peers.first_trouble("") == "a"


def test_processes_that_see_other_files_are_told_apart(three):
  three.append(("a", "b"))
  with pytest.raises(InputError, match="text of process 2 is another than that of process 0"):
    peers.same("the text", "a")


def test_a_text_longer_than_a_row_arrives_whole(monkeypatch):
  monkeypatch.setattr(peers, "several", lambda: True)
  size, sent = 16, "ü" * 37

  def rows(said):
    return [said[:size].ljust(size, b"\0")] * 2

  monkeypatch.setattr(peers, "_rows", rows)
  monkeypatch.setattr(peers, "_ROW_BYTES", size)
  assert peers.gather(sent) == [sent, sent]


def test_only_what_a_dead_process_leaves_is_taken_for_it(monkeypatch):
  gone = ValueError("UNKNOWN: Gloo AllGather failed: Connection closed by peer [127.0.0.1]:13221")
  assert peers.lost(gone) is None, "alone nobody is lost"
  monkeypatch.setattr(peers, "several", lambda: True)
  assert isinstance(peers.lost(gone), PeerError)
  assert peers.lost(RuntimeError("RESOURCE_EXHAUSTED: out of memory")) is None
  assert peers.lost(InputError("batch_size must be a multiple")) is None
  assert peers.lost(KeyError("gloo")) is None
