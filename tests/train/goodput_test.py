import pytest

from jaxmoe.train.goodput import CATEGORIES, goodput


def process(started, alive=None, **seconds):
  now = started + sum(seconds.values())
  clock = {"unix_s": now, "started_unix_s": started, "last_alive_unix_s": alive}
  return {"event": "process", "time": {**clock, "seconds": seconds}}


def event(kind, at, **fields):
  clock = {name: fields.pop(name) for name in ("seconds", "lost_s", "lost_until_unix_s")
           if name in fields}  # fmt: skip
  return {"event": kind, **fields, "time": {"unix_s": at, **clock}}


def line(number, at, **seconds):
  return {"step": number, "time": {"unix_s": at, "seconds": seconds}}


def shares(found):
  return {name: value for name, value in found.seconds.items() if abs(value) > 1e-9}


def test_a_run_without_a_process_has_no_wall_time():
  assert goodput([], []).wall_s == 0
  assert goodput([line(1, 5.0, step=1)], [event("start", 1.0)]).share == 0


def test_an_undisturbed_run_is_the_sum_of_its_records():
  events = [process(100.0, start=2), event("start", 105, seconds={"start": 3}),
            event("compiled", 109, seconds={"compile": 4}),
            event("checkpoint", 112), event("done", 115, seconds={"checkpoint": 1})]  # fmt: skip
  lines = [line(1, 111, step=1.5, data=0.5), line(2, 114, step=2, evaluation=1)]
  found = goodput(lines, events)
  assert shares(found) == {
    "start": 5, "compile": 4, "step": 3.5, "data": 0.5, "evaluation": 1, "checkpoint": 1
  }  # fmt: skip
  assert found.wall_s == 15
  assert found.share == 3.5 / 15
  assert tuple(found.seconds) == CATEGORIES


def test_lines_that_were_cut_and_what_came_after_them_are_lost():
  """Killed at 120 while step 4 ran; the checkpoint was of step 2, and the next process starts."""
  events = [process(100.0, start=10), event("resume", 133, seconds={"start": 3}, lost_s=4.0,
            lost_until_unix_s=118.0, step=2, lost_steps=1)]  # fmt: skip
  events.insert(1, process(130.0, alive=120.0, start=0.0))
  events.append(event("done", 140, seconds={"step": 1}))
  lines = [line(1, 112, step=2), line(2, 114, step=2), line(3, 136, step=3), line(4, 139, step=3)]
  found = goodput(lines, events)
  assert shares(found) == {"start": 13, "step": 11, "lost": 4 + 2, "down": 10}
  assert found.wall_s == 40


def test_a_process_killed_before_it_could_say_anything_more_lost_all_it_lived():
  events = [process(100.0, start=1), process(120.0, alive=110.0, start=2),
            event("done", 122, seconds={})]  # fmt: skip
  assert shares(goodput([], events)) == {"start": 3, "lost": 9, "down": 10}


def test_lines_cut_two_processes_later_are_lost_once():
  """The second process was killed before it cut the lines of the first."""
  events = [process(100.0, start=1), process(110.0, alive=106.0, start=1),
            process(120.0, alive=113.0, start=1),
            event("resume", 121, seconds={}, lost_s=4.0, lost_until_unix_s=105.0, step=0),
            event("done", 122, seconds={"step": 1})]  # fmt: skip
  found = goodput([], events)
  assert shares(found) == {"start": 3, "lost": 4 + 1 + 2, "down": 4 + 7, "step": 1}


def test_what_a_rollback_throws_away_is_lost():
  events = [process(100.0, start=1), event("rollback", 106, lost_s=5.0, step=9, to=4),
            event("done", 108, seconds={"step": 0})]  # fmt: skip
  found = goodput([line(5, 108, step=2)], events)
  assert shares(found) == {"start": 1, "lost": 5, "step": 2}


def test_time_after_the_end_of_a_process_is_down_time_even_if_its_lock_was_touched():
  events = [process(100.0, start=1), event("stopped", 103, seconds={"step": 2}),
            process(110.0, alive=104.0, start=1)]  # fmt: skip
  assert shares(goodput([], events)) == {"start": 2, "step": 2, "down": 7}


@pytest.mark.parametrize("name", ["somebody_elses", "step"])
def test_an_unknown_category_is_other(name):
  found = goodput([line(1, 102, **{name: 1})], [process(100.0, start=1)])
  assert found.wall_s == 2
  assert found.seconds["step" if name == "step" else "other"] == pytest.approx(1)


def test_a_line_tells_the_shares_that_matter():
  events = [process(0.0, start=30), event("done", 90, seconds={"checkpoint": 0.01})]
  lines = [line(1, 89, step=58.99, data=1)]
  assert str(goodput(lines, events)) == (
    "1:30 of wall time: step 65.5%, data 1.1%, start 33.3%"
  )


HOURS_2 = 7200.0


def test_a_clock_set_back_or_forwards_in_the_middle_moves_no_second():
  events = [process(100.0, start=10), event("start", 112, seconds={"start": 2})]
  for jump in (-HOURS_2, HOURS_2):
    lines = [line(1, 115, step=3), line(2, 118 + jump, step=3), line(3, 122 + jump, evaluation=4)]
    done = event("done", 123 + jump, seconds={"checkpoint": 1})
    found = goodput(lines, [*events, done])
    assert shares(found) == {"start": 12, "step": 6, "evaluation": 4, "checkpoint": 1}
    assert "clock" not in str(found)


def test_a_clock_set_back_before_a_kill_leaves_what_was_lost_and_down():
  """Set back while step 2 ran; killed 5 s after step 3, and 10 s later there is another process."""
  back = 118 - HOURS_2
  events = [process(100.0, start=10), event("start", 112, seconds={"start": 2}),
            process(back + 18, alive=back + 8.0, start=1),
            event("resume", back + 20, seconds={"start": 1}, lost_s=3.0,
                  lost_until_unix_s=back + 3, step=2, lost_steps=1),
            event("done", back + 30, seconds={"checkpoint": 1})]  # fmt: skip
  lines = [line(1, 115, step=3), line(2, back, step=3), line(3, back + 25, step=4)]
  found = goodput(lines, events)
  assert shares(found) == {"start": 14, "step": 10, "checkpoint": 1, "lost": 3 + 5, "down": 10}


def test_a_clock_set_back_between_processes_counts_as_no_time_and_is_told():
  events = [process(100.0, start=1), event("stopped", 103, seconds={"step": 2}),
            process(110.0 - HOURS_2, alive=103.0, start=3),
            event("done", 120 - HOURS_2, seconds={"step": 7})]  # fmt: skip
  found = goodput([], events)
  assert shares(found) == {"start": 4, "step": 9}
  assert found.set_back_s == HOURS_2 - 7
  assert str(found) == (
    "0:13 of wall time: step 69.2%, start 30.8%; at least, for the clock was set back by 1:59:53 "
    "between processes"
  )


def test_a_sign_of_life_a_little_older_than_the_last_record_is_no_clock_set_back():
  events = [process(100.0, start=1), process(110.0, alive=104.9, start=1)]
  found = goodput([line(1, 105.0, step=4)], events)
  assert shares(found) == {"start": 2, "step": 4, "down": 5}
  assert found.set_back_s == 0


def test_time_in_which_a_process_was_stopped_is_a_category_and_no_goodput():
  found = goodput([line(1, 61, step=1, paused=59)], [process(0.0, start=1)])
  assert shares(found) == {"start": 1, "step": 1, "paused": 59}
