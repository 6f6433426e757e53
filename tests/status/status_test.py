"""What is said of runs in every state, from their files, within 80 columns."""

import contextlib
import json
import os
import subprocess
import sys

import pytest
from rich.cells import cell_len

from jaxmoe.core.errors import CheckpointError, InputError
from jaxmoe.status import run_status
from jaxmoe.status.load_table import BLOCKS, LETTERS, bar, load_table
from jaxmoe.status.run_status import read_status
from jaxmoe.status.status_page import status_lines
from jaxmoe.status.text_columns import ago, clock, fit, labelled
from jaxmoe.train import lock
from tests.status import run_files
from tests.status.run_files import NOW, PROCESS, STARTED, layer, line, write_run


@pytest.fixture
def make(tmp_path, monkeypatch):
  """Returns a function that writes the files of a run and returns its folder."""
  monkeypatch.setattr(run_status.time, "time", lambda: NOW + 100)

  def write(lines=(), events=(), name="run", **options):
    return write_run(tmp_path / name, lines, events, **options)

  return write


@pytest.fixture
def held():
  """Returns a function that holds the lock of a run until the test ends."""
  with contextlib.ExitStack() as until:
    yield lambda run: until.enter_context(run_files.held(run))


def told(run, **options):
  return "\n".join(status_lines(read_status(run), **options))


# States.


def test_a_run_whose_folder_is_held_is_running(make, held):
  run = make([line(n) for n in range(1, 41)], [PROCESS, {"event": "start"}])
  held(run)
  text = told(run)
  assert f"state     running, process {os.getpid()}; last sign of life 3 s ago" in text
  # A step takes 0.75 s with its data; 60 are to come.
  assert "step      40 of 100 (40.0%)  10,240 tokens  0:45 left" in text
  assert "loss 3.2500 nats/token  grad norm 0.5  learning rate 0.001" in text
  assert "1,030 tokens/s, MFU 12.5% (median of the last 20)" in text


def test_looking_at_a_run_takes_no_lock(make, held):
  run = make([], [])
  seen = []

  def watched(event, arguments):
    if event in ("fcntl.flock", "fcntl.lockf", "fcntl.fcntl") and watching:
      seen.append(event)

  watching = [True]
  sys.addaudithook(watched)
  read_status(run)
  watching.clear()
  assert seen == []
  held(run)  # nothing is in the way


def test_the_lock_of_another_file_is_not_taken_for_it(make, held):
  one, other = make(name="one"), make(name="other")
  held(other)
  assert not lock.is_held(one / "lock", None)
  assert lock.is_held(other / "lock", None)
  assert not lock.is_held(one / "nothing", None)


def test_a_lock_that_the_system_files_under_another_device_is_found_by_who_has_it_open(
  make, held, tmp_path, monkeypatch
):
  run = make()
  held(run)
  inode = (run / "lock").stat().st_ino
  entry = "1: FLOCK  ADVISORY  {} {} 00:99:{} 0 EOF\n"
  monkeypatch.setattr(lock, "TABLE", tmp_path / "locks")
  for kind, pid, number, expected in (
    ("WRITE", os.getpid(), inode, True),
    ("WRITE", 1 << 22, inode, False),
    ("WRITE", os.getpid(), inode + 1, False),
    ("READ", os.getpid(), inode, False),
  ):
    lock.TABLE.write_text(entry.format(kind, pid, number))
    assert lock.is_held(run / "lock", None) == expected
  lock.TABLE.write_text(f"1: -> FLOCK  ADVISORY  WRITE {os.getpid()} 00:99:{inode} 0 EOF\n")
  assert not lock.is_held(run / "lock", None)


def test_without_a_list_of_locks_a_living_process_counts(make, tmp_path, monkeypatch):
  run = make()
  monkeypatch.setattr(lock, "TABLE", tmp_path / "nothing")
  child = subprocess.Popen([sys.executable, "-c", ""])
  child.wait()
  assert lock.is_held(run / "lock", os.getpid())
  assert not lock.is_held(run / "lock", child.pid)
  assert not lock.is_held(run / "lock", None)


ENDS = {
  "done": ({"event": "done", "step": 1}, "state     done; last sign"),
  "stopped": ({"event": "stopped", "step": 1}, "stopped as it was told to"),
  "failed": (
    {"event": "failed", "code": 3, "why": "step 7: not\x1b[31m finite"},
    "why       step 7: not [31m finite",
  ),
  "stalled": ({"event": "stalled", "phase": "step 7"}, "exit code 42: no step after step 7"),
}


@pytest.mark.parametrize("state", ENDS)
def test_a_run_that_ended_says_how(make, held, state):
  event, words = ENDS[state]
  run = make([line(1)], [PROCESS, {"event": "start"}, event, {"event": "sink_failed"}])
  assert read_status(run).state == state
  assert words in told(run)
  if state == "failed":
    assert "failed with exit code 3" in told(run)
  held(run)  # the process that said so still winds up
  assert read_status(run).state == state


def test_a_run_that_goes_on_after_an_end_is_not_taken_for_ended(make, held):
  run = make([line(1)], [PROCESS, {"event": "stopped"}, PROCESS, {"event": "resume"}])
  assert read_status(run).state == "killed"
  assert "killed: no process runs here" in told(run)
  held(run)
  assert read_status(run).state == "running"


def test_what_of_the_data_was_not_read_is_told(make):
  skipped = {
    "counts": {"text": {"invalid UTF-8": 3, "an empty document": 1200}},
    "broken": {"rows": {"files": 1, "bytes": 34567}},
  }
  start = {"event": "start", "data": {"skipped": skipped}}
  text = told(make([line(1)], [PROCESS, start]))
  assert "not read  text: 1,203 bad records (invalid UTF-8, an empty document)" in text
  assert "          rows: at least 34,567 bytes lost of 1 file" in text
  nothing = {"event": "start", "data": {"skipped": {"counts": {}, "places": []}}}
  assert "not read" not in told(make([line(1)], [PROCESS, nothing], name="whole"))


def test_a_run_of_another_machine_is_not_said_to_be_dead(make):
  run = make([line(1)], [{**PROCESS, "host": "node-7"}])
  assert read_status(run).state == "elsewhere"
  assert "not seen from here: it ran on node-7; last sign of life 3 s ago" in told(run)


def test_a_run_that_surgery_wrote_is_said_to_be_untrained_until_a_process_holds_it(make, held):
  run = make([], [{"event": "surgery", "step": 6}], checkpoints=(0,))
  for file in ("metrics.jsonl", "lock"):
    (run / file).unlink()
  assert read_status(run).state == "untrained"
  assert "not trained yet" in told(run) and "sign of life" not in told(run)
  (run / "lock").touch()
  assert read_status(run).state == "killed"  # before its first event
  held(run)
  assert read_status(run).state == "running"


def test_an_old_run_without_process_events_is_read_too(make):
  old = {"step": 2, "loss": 1.0, "skipped": 0, "tokens": 8, "layers": {"1": {"load": [0.5, 0.5]}}}
  old["time"] = {"tokens_per_s": 5.0, "mfu": 0.1, "seconds": {"total": 1.0, "step": 0.9}}
  run = make([old], [{"event": "start", "time": {"unix_s": NOW}}])
  text = told(run)
  assert "step      2 of 100 (2.0%)  16 tokens" in text
  assert "    1 ▅▅ " in text
  assert read_status(run).goodput is None


# What is told.


def test_scores_counts_and_checkpoints_are_told(make):
  scores = {"bits_per_byte": 1.5, "domains": {"code": 1.25, "prose": None}}
  lines = [line(n) for n in range(1, 61)]
  lines[9]["eval"] = scores
  events = [PROCESS, *({"event": "rollback"},) * 2, *({"event": "save_failed"},) * 3]
  text = told(make(lines, events, checkpoints=(20, 40)))
  assert "held out  bits/byte of a slice at step 10: 1.500  code 1.250  prose no value" in text
  assert "trouble   1 skipped steps  2 rollbacks  3 failed saves" in text
  assert "saved     step 40, 100 s ago  also 20" in text


def test_scores_of_a_slice_and_of_all_held_out_text_have_names_of_their_own(make):
  sizes = {"code": {"bytes": 30_000, "of": 600_000}, "prose": {"bytes": 30_000, "of": 200_000}}
  start = {"event": "start", "data": {"slice": sizes}}
  last = line(60, eval={"bits_per_byte": 1.6, "domains": {"code": 1.2, "prose": 2.0}})
  run = make([line(n) for n in range(1, 60)] + [last], [PROCESS, start])
  scores = {"step": 60, "bits_per_byte": 1.477, "domains": {"code": 1.4, "prose": 1.708}}
  (run / "eval.json").write_text(json.dumps(scores))
  text = told(run)
  assert "held out  bits/byte of a slice at step 60: 1.400  code 1.200  prose 2.000" in text
  assert "          60 of 800 kB" in text
  assert "eval.json bits/byte of all at step 60: 1.477  code 1.400  prose 1.708" in text
  (run / "eval.json").write_text('{"step": 60, "dom')
  assert "eval.json" not in told(run)


def test_steps_without_labels_are_counted_and_the_last_loss_is_told_with_its_step(make):
  none = {"loss": None, "grad_norm": None, "labels": 0}
  lines = [line(1), line(2, **none, unlabelled=1), line(3, loss=2.5, unlabelled=1)]
  text = told(make(lines, [PROCESS], name="a"))
  assert "training  loss 2.5000 nats/token  grad norm 0.5" in text
  assert "trouble   1 skipped steps  1 steps without labels" in text
  lines += [line(step, **none, unlabelled=step - 2) for step in (4, 5)]
  text = told(make(lines, [PROCESS], name="b"))
  assert "training  loss 2.5000 nats/token at step 3, none labelled since" in text
  assert "training  no labels  learning rate" in told(make(lines[3:], [PROCESS], name="c"))


def test_the_last_scores_are_told_and_those_too_far_back_are_not_searched(make, monkeypatch):
  lines = [line(n) for n in range(1, 61)]
  for n in (9, 19):
    lines[n]["eval"] = {"bits_per_byte": n, "domains": {}}
  run = make(lines)
  assert read_status(run).scored["step"] == 20
  monkeypatch.setattr(run_status, "SEARCHED_BYTES", 100)
  assert read_status(run).scored is None


def test_where_the_time_went_is_told_unless_the_file_is_too_long_to_sum(make, monkeypatch):
  event = {**PROCESS, "time": {**STARTED, "seconds": {"start": 10.0}}}
  run = make([line(n) for n in range(1, 41)], [event])
  assert read_status(run).goodput.seconds["step"] == 20.0
  assert "time      0:40 of wall time: step 50.0%, data 25.0%, start 25.0%" in told(run)
  monkeypatch.setattr(run_status, "SUMMED_BYTES", 100)
  assert read_status(run).goodput is None
  assert "wall time" not in told(run)


def test_what_is_left_counts_what_comes_every_so_many_steps_not_what_came_once(make, held):
  """80 steps of 0.75 s, and 7.5 s of evaluation in the 20 so far: half of their time besides."""
  first = {**PROCESS, "time": {**STARTED, "seconds": {"start": 10.0}}}
  lines = [line(n) for n in range(1, 21)]
  lines[3]["time"]["seconds"] = {"step": 0.5, "data": 0.25, "evaluation": 7.5, "compile": 99.0}
  run = make(lines, [first])
  held(run)
  assert "1:30 left" in told(run)


def test_a_run_that_has_no_line_yet_is_told(make):
  text = told(make(events=[PROCESS]))
  assert "step      none of 100 yet" in text
  assert "no checkpoint yet" in text


def test_a_torn_last_line_is_left_out(make):
  run = make([line(1), line(2)])
  with open(run / "metrics.jsonl", "a") as file:
    file.write('{"step": 3, "loss": 1.')
  assert read_status(run).lines[-1]["step"] == 2


def test_a_folder_without_a_run_and_a_damaged_one_are_refused(tmp_path, make):
  with pytest.raises(CheckpointError, match="no run here"):
    read_status(tmp_path / "nothing")
  run = make()
  for text in ("{", "[]", "\x00"):
    (run / "config.json").write_text(text)
    with pytest.raises(InputError, match=r"config\.json"):
      read_status(run)


# The table.


@pytest.mark.parametrize("signs", [BLOCKS, LETTERS])
def test_a_bar_has_a_sign_for_each_expert_by_its_load_over_the_fair_share(signs):
  heights = {0.0: "x", 1e-9: signs[0], 0.24: signs[0], 0.25: signs[1], 0.99: signs[3]}
  heights |= {1.0: signs[4], 1.74: signs[6], 1.76: signs[7], 2.5: signs[7]}
  load = [times / len(heights) for times in heights]
  assert bar(load, signs) == "".join(heights.values())
  assert bar([], signs) == ""


@pytest.mark.parametrize("experts", [32, 33, 48, 100, 256])
def test_many_experts_share_32_signs_in_order(experts):
  half = experts // 2
  load = [2 / experts] * half + [0.0] * (experts - half)
  drawn = bar(load, LETTERS)
  assert len(drawn) == 32
  assert drawn.startswith("@" * 15) and drawn.endswith("x" * 15)


def test_columns_of_the_table_stand_below_their_heads():
  head, *rows, _ = load_table({str(n): layer(256, used=n + 1) for n in range(64)})
  assert len(rows) == 64
  for word in ("entropy", "max.viol", "dead", "drops", "eff.k"):
    end = head.index(word) + len(word)
    assert all(row[end - 1] != " " and row[end : end + 1] in ("", " ") for row in rows)
  assert rows[0].split()[2:] == ["0.988", "255.00", "255", "1.2%", "1.99"]


def test_a_short_terminal_gets_the_first_the_last_and_the_worst_layers_in_order():
  layers = {str(n): layer(64) for n in range(64)}
  layers["31"], layers["7"] = layer(64, used=3), layer(64, max_violation=5.0)
  lines = load_table(layers, rows=10)
  shown = [row.split()[0] for row in lines[1:-1]]
  assert shown == ["0", "1", "...", "7", "...", "31", "...", "62", "63"]
  assert all(len(load_table(layers, rows)) - 2 <= max(rows, 5) for rows in range(-5, 70))
  left_out = sum(int(row.split()[1]) for row in lines[1:-1] if row.split()[0] == "...")
  assert left_out + sum(name != "..." for name in shown) == 64


# Width.


RUNS = {
  "64 layers of 256 experts": [line(n, 64, 256) for n in range(1, 4)],
  "no MoE layer": [line(1, 0)],
  "one expert": [line(1, 1, 1)],
  "not finite": [line(1, loss=None, grad_norm=None)],
  "no labels": [line(1), line(2, loss=None, grad_norm=None, labels=0, unlabelled=1)],
  "huge numbers": [
    line(10**9, tokens=10**12, grad_norm=1e30, data={"d" * 99: {"tokens": 10**18}}),
  ],
  "many domains": [
    line(1, eval={"bits_per_byte": 1.0, "domains": {f"domain-{n}" * 9: 1.0 for n in range(40)}})
  ],
  "wide names": [
    line(1, eval={"bits_per_byte": 1.0, "domains": {"数据" * 50: 1.0, "\x1b[31mred\x07": 2.0}})
  ],
}


@pytest.mark.parametrize("encoding", ["utf-8", "ascii", "latin-1", None])
@pytest.mark.parametrize("rows", [None, 40])
@pytest.mark.parametrize("name", RUNS)
def test_every_line_fits_80_columns_and_its_encoding(make, name, rows, encoding):
  failed = {"event": "failed", "code": 4, "why": "the disk is full and é " * 30}
  process = {**PROCESS, "time": {**STARTED, "seconds": {"start": 10.0, "data": 1.0}}}
  run = make(RUNS[name], [process, failed], checkpoints=range(1, 60), name="run-" + "long" * 40)
  lines = status_lines(read_status(run), rows, encoding)
  for text in lines:
    assert cell_len(text) <= 80, text
    assert text.isprintable()
    text.encode(encoding or "ascii")
  assert rows is None or len(RUNS[name][0]["layers"]) < 9 or len(lines) <= rows


def test_pieces_of_text_are_cut_and_told_shortly():
  assert fit("a" * 81) == "a" * 77 + "..."
  assert fit("a\tb\x1b[0m\n") == "a b [0m "
  assert list(labelled("x", ["aa", "bb", "cc"], 16)) == ["x         aa  bb", "          cc"]
  assert [ago(s) for s in (-1, 5, 150, 7300, 10**6)] == ["0 s", "5 s", "2 min", "2 h", "12 days"]
  assert [clock(s) for s in (5, 65, 3665)] == ["0:05", "1:05", "1:01:05"]
