import threading

import pytest

from jaxmoe.train import watchdog
from jaxmoe.train.watchdog import STALLED, Watchdog, dump_and_end


class Clock:
  """Time that passes only while the watchdog sleeps."""

  def __init__(self, naps):
    self.now, self._naps, self.did = 0.0, iter(naps), threading.Event()

  def monotonic(self):
    return self.now

  def wait(self, seconds):
    nap = next(self._naps, None)
    if nap is None:
      return True
    self.now += nap if isinstance(nap, float) else nap(seconds)
    return False


def watch(monkeypatch, limit_s, naps):
  """Returns what a watchdog said of naps; a nap may be a function that returns its seconds."""
  said, clock = [], Clock(naps)
  made = Watchdog(limit_s, lambda doing, waited: said.append((doing, waited)))
  monkeypatch.setattr(watchdog, "time", clock)
  made._end = clock
  return made, said


def test_silence_over_the_limit_is_told_once_with_what_had_begun(monkeypatch):
  made, said = watch(monkeypatch, 2.0, [0.25] * 50)
  made.beat("step 7")
  made._watch()
  ((doing, waited_s),) = said
  assert doing == "step 7" and 2.0 < waited_s <= 2.5


def test_beats_keep_it_quiet_and_no_limit_is_for_ever(monkeypatch):
  made, said = watch(monkeypatch, 1.0, [])
  made._end._naps = iter([lambda s: made.beat("x") or 0.25] * 50)
  made._watch()
  assert said == []
  made, said = watch(monkeypatch, 0.0, [0.25] * 50)
  made._watch()
  assert said == []


def test_time_in_which_the_whole_process_was_stopped_does_not_count(monkeypatch):
  made, said = watch(monkeypatch, 5.0, [0.25, 3600.0, 0.25, 0.25])
  made._watch()
  assert said == []


def test_a_sign_of_life_is_given_while_it_watches():
  ticks = threading.Event()
  made = Watchdog(0.0, lambda doing, waited: None, ticks.set)
  made.start()
  assert ticks.wait(30)
  made.stop()


def test_the_end_leaves_the_stacks_of_all_threads_and_the_code(tmp_path, capfd):
  ended, told, go = [], [], threading.Event()

  def waits_for_ever_and_a_day():
    go.wait(60)

  thread = threading.Thread(target=waits_for_ever_and_a_day)
  thread.start()
  dump_and_end(tmp_path / "stacks", "stuck since noon", lambda: told.append(1), ended.append)
  go.set()
  thread.join()
  stacks = (tmp_path / "stacks").read_text()
  assert "waits_for_ever_and_a_day" in stacks and "dump_and_end" in stacks
  err = capfd.readouterr().err
  assert "waits_for_ever_and_a_day" in err and err.endswith("error: stuck since noon\n")
  assert (ended, told) == ([STALLED], [1])


def test_a_disk_that_hangs_does_not_keep_the_process(tmp_path, monkeypatch):
  monkeypatch.setattr(watchdog, "_LAST_WORDS_S", 0.01)
  ended, hung = threading.Event(), []

  def tell():
    hung.append(not ended.wait(20))

  dump_and_end(tmp_path / "stacks", "x", tell, lambda code: ended.set())
  assert hung == [False]


def test_stacks_that_cannot_be_written_do_not_keep_the_process(tmp_path):
  ended = []
  with pytest.raises(OSError):
    dump_and_end(tmp_path / "no" / "stacks", "x", lambda: None, ended.append)
  assert ended == [STALLED]
