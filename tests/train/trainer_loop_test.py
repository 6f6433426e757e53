import contextlib
import math
import time
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmoe.core.errors import NotFiniteError
from jaxmoe.core.metrics import Mean
from jaxmoe.optim import Optim
from jaxmoe.train import step_line, trainer, wall_clock
from jaxmoe.train.completion import Completion, CompletionWatcher
from jaxmoe.train.experiment import Recovery, Train
from jaxmoe.train.observers import Observers
from jaxmoe.train.run_options import RunOptions
from jaxmoe.train.trainer import Trainer
from jaxmoe.train.wall_clock import WallClock


class Recorder(Trainer):
  """A trainer whose log, step, hooks and saver write down what happens, in order."""

  store = spec = None
  workdir = types.SimpleNamespace(events=None)
  decoder = types.SimpleNamespace(layer_groups=())
  flops_s = (1.0, 1.0)

  def __init__(self, bad=(), hooks=(), stop_at=None, sinks=(), unlabelled=(), engine=None):
    self.options = RunOptions(listeners=sinks, engine=engine)
    watchdog = types.SimpleNamespace(beat=lambda doing: None)
    self.observers = Observers(Log(self), Display(self), WallClock(), watchdog)
    self.unlabelled, self.nothing = unlabelled, 0
    self.events, self.lines, self.said = [], [], []
    self.bad, self.stop_at, self.batches = bad, stop_at, 0
    self.skipped = self.in_a_row = 0
    self.hooks = tuple(self.hook(*each) for each in hooks)
    self.sampling = Sampling(self)

  def hook(self, name, every, result):
    def call(step, state):
      self.events.append((name, step, int(state)))
      return result(step)

    hook = types.SimpleNamespace(name=name, every=every)
    return type("Hook", (), {"__call__": lambda _, *a: call(*a), **vars(hook)})()

  def next_batch(self):
    self.batches += 1
    data = {"batches": self.batches, "domains": {"a": {"tokens": self.batches}}}
    return {"number": self.batches}, {**data, "time": {"busy_s": 0.0, "mb_per_s": 0.0}}

  def program(self, state, batch):
    step = int(state) + 1
    self.events.append(("dispatch", step))
    # Bad is a batch, whatever the step that meets it.
    bad, empty = batch["number"] in self.bad, batch["number"] in self.unlabelled
    self.skipped += bad
    self.nothing += empty
    self.in_a_row = self.in_a_row if empty else (self.in_a_row + 1) * bad
    loss = np.float32(np.nan if bad else 1 / step)
    return jnp.int32(step), {
      "layers": {}, "balance": {}, "loss": Mean(loss, np.float32(not empty)), "total_loss": loss,
      "grad_norm": np.float32(1), "tokens": np.float32(8), "skipped": np.int32(self.skipped),
      "finite": jnp.bool_(not bad), "in_a_row": np.int32(self.in_a_row),
      "unlabelled": np.int32(self.nothing),
    }  # fmt: skip

  def save(self):
    self.events.append(("save", self.step, int(self.state)))

  def rollback(self, harm):
    self.events.append(("harm", harm.args))
    self.skipped -= harm.in_a_row
    self.in_a_row = 0
    self._health.forget()
    self._go_on_from(harm.first - 2, jnp.int32(harm.first - 2))
    for listener in self.options.listeners:
      listener.rollback(self.step)

  def stopped(self):
    return self.batches == self.stop_at


class Sampling:
  """Samples of the untrained model, which wait if they are told to."""

  def __init__(self, recorder):
    self.recorder, self.waits = recorder, False

  def catch_up(self):
    self.waits = False
    self.recorder.events.append(("untrained",))


class Log:
  """A log that keeps what it is given."""

  def __init__(self, recorder):
    self.recorder = recorder

  def step(self, line):
    self.recorder.lines.append(line)
    self.recorder.events.append(("line", line["step"]))

  def event(self, kind, **fields):
    self.recorder.events.append((kind, fields["step"]))
    self.recorder.why = fields["why"]


class Display:
  """A display that keeps what it is told."""

  def __init__(self, recorder):
    self.recorder = recorder

  def step(self, line):
    assert self.recorder.lines[-1] is line

  def say(self, text):
    self.recorder.said.append(text)

  def phase(self, name, brief):
    return contextlib.nullcontext()

  def start(self, step):
    self.recorder.said.append(f"start {step}")


def go(recorder, first=0, **train):
  train = Train(**{"num_steps": 5, "checkpoint_every": 100, **train})
  model = types.SimpleNamespace(drop_limits={})
  recorder.experiment = types.SimpleNamespace(train=train, model=model, optim=Optim())
  recorder._go_on_from(first, jnp.int32(first))
  recorder.run()
  return recorder.step, recorder.state


def test_a_line_is_written_after_the_next_step_is_dispatched():
  recorder = Recorder()
  assert go(recorder)[0] == 5
  expected = [("dispatch", 1)]
  for step in (1, 2, 3):
    expected += [("dispatch", step + 1), ("line", step)]
  expected += [("dispatch", 5), ("line", 4), ("line", 5), ("save", 5, 5)]
  assert recorder.events == expected


def test_what_the_untrained_model_writes_waits_for_the_line_of_the_first_step():
  recorder = Recorder()
  recorder.sampling.waits = True
  go(recorder, num_steps=3)
  assert recorder.events == [
    ("dispatch", 1), ("line", 1), ("untrained",), ("dispatch", 2), ("dispatch", 3), ("line", 2),
    ("line", 3), ("save", 3, 3),
  ]  # fmt: skip


def test_what_the_untrained_model_writes_comes_before_hooks_and_checkpoint_of_the_first_step():
  recorder = Recorder(hooks=[("a", 1, lambda step: {})])
  recorder.sampling.waits = True
  go(recorder, num_steps=1)
  assert recorder.events == [
    ("dispatch", 1), ("untrained",), ("a", 1, 1), ("line", 1), ("save", 1, 1)
  ]  # fmt: skip


def test_there_is_one_line_a_step_in_order_whatever_happens_on_the_way():
  hooks = [("a", 2, lambda step: {}), ("b", 3, lambda step: {})]
  recorder = Recorder(bad=(4,), hooks=hooks)
  go(recorder, num_steps=11, checkpoint_every=4)
  assert [line["step"] for line in recorder.lines] == list(range(1, 12))
  assert recorder.batches == 11
  np.testing.assert_allclose(
    [line["loss"] for line in recorder.lines if line["loss"]],
    [1 / step for step in range(1, 12) if step != 4],
  )


def test_what_hooks_return_stands_in_the_line_of_their_step_and_of_the_last():
  hooks = [("a", 2, lambda step: {"a": step}), ("b", 3, lambda step: {"b": {"x": step}}),
           ("never", 0, lambda step: 1 / 0)]  # fmt: skip
  recorder = Recorder(hooks=hooks)
  go(recorder, num_steps=7)
  returned = {name: [(line["step"], line[name]) for line in recorder.lines if name in line]
              for name in "ab"}  # fmt: skip
  assert returned["a"] == [(2, 2), (4, 4), (6, 6), (7, 7)]
  assert returned["b"] == [(3, {"x": 3}), (6, {"x": 6}), (7, {"x": 7})]
  assert [event for event in recorder.events if event[0] in "ab"] == [
    ("a", 2, 2), ("b", 3, 3), ("a", 4, 4), ("a", 6, 6), ("b", 6, 6), ("a", 7, 7), ("b", 7, 7)
  ]  # fmt: skip


def test_a_checkpoint_is_written_after_the_lines_up_to_its_step():
  recorder = Recorder()
  go(recorder, num_steps=7, checkpoint_every=3)
  saves = [event for event in recorder.events if event[0] == "save"]
  assert saves == [("save", 3, 3), ("save", 6, 6), ("save", 7, 7)]
  for save in saves:
    at = recorder.events.index(save)
    lines = [event[1] for event in recorder.events[:at] if event[0] == "line"]
    assert lines == list(range(1, save[1] + 1))


def test_the_last_step_is_saved_once_also_where_a_checkpoint_is_due():
  recorder = Recorder()
  go(recorder, num_steps=6, checkpoint_every=3)
  assert [event[1] for event in recorder.events if event[0] == "save"] == [3, 6]


def test_a_run_that_is_asked_to_stop_saves_the_step_it_is_at():
  recorder = Recorder(stop_at=3)
  step, state = go(recorder, num_steps=9)
  assert (step, int(state)) == (3, 3)
  assert recorder.events[-1] == ("save", 3, 3)
  assert [line["step"] for line in recorder.lines] == [1, 2, 3]


def test_a_run_goes_on_from_its_first_step():
  recorder = Recorder()
  assert go(recorder, first=3)[0] == 5
  assert [line["step"] for line in recorder.lines] == [4, 5]
  assert recorder.said == ["start 3"]


def test_a_run_that_is_at_its_end_does_nothing():
  recorder = Recorder()
  assert go(recorder, first=5)[0] == 5
  assert recorder.events == []


def test_skipped_steps_are_events_and_lines_and_the_run_goes_on():
  recorder = Recorder(bad=(2, 4))
  assert go(recorder, max_skips=2)[0] == 5
  assert [event for event in recorder.events if event[0] == "skipped"] == [
    ("skipped", 2), ("skipped", 4)
  ]  # fmt: skip
  assert [line["loss"] is None for line in recorder.lines] == [False, True, False, True, False]
  assert [text for text in recorder.said if "not finite" in text] != []


@pytest.mark.parametrize("budget, last", [(0, 2), (1, 4), (2, 5)])
def test_a_run_ends_at_the_first_skip_over_its_budget_with_its_line_and_no_checkpoint(budget, last):
  recorder = Recorder(bad=(2, 4, 5, 6))
  with pytest.raises(NotFiniteError, match=f"step {last}: {budget + 1} steps were skipped"):
    go(recorder, num_steps=9, max_skips=budget, checkpoint_every=last)
  assert [line["step"] for line in recorder.lines] == list(range(1, last + 1))
  assert ("save", last, last) not in recorder.events
  assert ("skipped", last) in recorder.events


def test_everything_that_depends_on_the_clock_stands_under_time():
  runs = [Recorder(hooks=[("a", 2, lambda step: {"a": 1})]) for _ in range(2)]
  for recorder in runs:
    go(recorder)
  first, second = ([dict(line) for line in recorder.lines] for recorder in runs)
  for line in (*first, *second):
    clock = line.pop("time")
    assert clock["tokens_per_s"] > 0
    assert clock["seconds"]["step"] > 0 and clock["unix_s"] > 0
  assert first == second


def test_too_many_skips_in_a_row_take_the_run_back_and_it_goes_on_with_the_next_batches():
  recorder = Recorder(bad=(3, 4))
  recovery = Recovery(patience=2)
  assert go(recorder, num_steps=5, recovery=recovery)[0] == 5
  assert recorder.events.count(("harm", (4, 4, 2, "not finite", 3))) == 1
  assert [line["step"] for line in recorder.lines] == [1, 2, 3, 4, 2, 3, 4, 5]
  # Batch 5 was in flight when the line of step 4 was written; its step is forgotten.
  assert [line["data"]["a"]["tokens"] for line in recorder.lines] == [1, 2, 3, 4, 6, 7, 8, 9]


def test_steps_without_labels_are_lines_and_spend_neither_budget_nor_patience():
  recorder = Recorder(bad=(3,), unlabelled=(1, 4, 5))
  assert go(recorder, num_steps=6, max_skips=1, recovery=Recovery(patience=2))[0] == 6
  assert [event for event in recorder.events if event[0] == "skipped"] == [("skipped", 3)]
  assert [line["loss"] is None for line in recorder.lines] == [True, False, True, True, True, False]
  assert [line.get("unlabelled") for line in recorder.lines] == [1, 1, 1, 2, 3, 3]
  assert [line.get("labels") for line in recorder.lines] == [0, None, None, 0, 0, None]
  assert [text for text in recorder.said if "no token has a label" in text] == [
    "step 1: no token has a label, and nothing changes; such steps are counted (unlabelled)"
  ]


def test_skips_are_in_a_row_whatever_has_no_labels_between_them_and_the_first_is_told():
  recorder = Recorder(bad=(4, 7), unlabelled=(2, 3, 5, 6))
  assert go(recorder, num_steps=7, recovery=Recovery(patience=2), checkpoint_every=5)[0] == 7
  told = ("harm", (7, 7, 2, "not finite", 4))
  assert recorder.events.count(told) == 1
  before = recorder.events[: recorder.events.index(told)]
  assert not [event for event in before if event[0] == "save"], "step 5 lies between the skips"


def test_no_checkpoint_is_written_after_a_step_that_was_skipped_but_at_the_end():
  recorder = Recorder(bad=(2, 6))
  go(recorder, num_steps=6, checkpoint_every=2)
  assert [event[1] for event in recorder.events if event[0] == "save"] == [4, 6]


def test_harm_at_the_last_step_goes_back_too():
  recorder = Recorder(bad=(4, 5))
  assert go(recorder, num_steps=5, recovery=Recovery(patience=2))[0] == 5
  assert [event for event in recorder.events if event[:1] == ("save",)] == [("save", 5, 5)]
  assert recorder.lines[-1]["loss"] == np.float32(1 / 5)


def test_sinks_get_every_line_and_are_told_of_a_rollback():
  got = []

  class Sink:
    def __call__(self, line):
      got.append(line["step"])

    def rollback(self, step):
      got.append(f"back to {step}")

  go(Recorder(bad=(2,), sinks=(Sink(),)), num_steps=3, recovery=Recovery(patience=1))
  assert got == [1, 2, "back to 0", 1, 2, 3]


def test_a_spike_is_told_from_a_loss_that_is_not_finite():
  recorder = Recorder(bad=(2,))
  real = recorder.program

  def program(state, batch):
    state, metrics = real(state, batch)
    return state, {**metrics, "finite": np.bool_(True)}

  recorder.program = program
  go(recorder, num_steps=3)
  assert recorder.why == "spike"


class Device:
  """A device that computes one step after the other while a clock that tests move goes on.

  Args:
    at_once: Whether a dispatch returns when its step is done, as small programs on a CPU do.
  """

  STEP_S = 1.0

  def __init__(self, at_once):
    self.now, self.free, self._at_once = 0.0, 0.0, at_once
    self._asked = 0

  def time(self):
    return 1e9 + self.now

  def perf_counter(self):
    return self.now

  def pass_by(self, seconds):
    self.now += seconds

  def dispatched(self):
    """Starts the next step."""
    self.free = max(self.now, self.free) + self.STEP_S
    self.now = self.free if self._at_once else self.now + 0.01

  def expect(self, metrics):
    """Returns the completion of the step that was dispatched last."""
    done = self.free
    metrics["arrives"] = done
    return types.SimpleNamespace(at=done, look=lambda: None, before_dispatch=lambda: None)

  def fetched(self, metrics):
    """Waits for the results of a step."""
    self.now = max(self.now, metrics.pop("arrives", self.free))

  def close(self):
    """Ends with the run."""


@pytest.fixture
def on_device(monkeypatch):
  """Returns a function (at_once, data_s, write_s, stalls) that gives the lines of a run there.

  `stalls` has seconds that a draw or a write of a step takes besides.
  """

  def run_it(at_once=False, data_s=0.02, write_s=0.01, stalls=(), engine_s=None):
    device, stalls = Device(at_once), dict(stalls)
    monkeypatch.setattr(trainer, "CompletionWatcher", lambda: device)
    monkeypatch.setattr(wall_clock, "time", device)
    fetch = step_line.summarize

    def summarize(metrics, layer_groups):
      device.fetched(metrics)
      return fetch(metrics, layer_groups)

    monkeypatch.setattr(step_line, "summarize", summarize)
    wait = lambda metrics: device.fetched(dict(metrics))  # noqa: E731
    monkeypatch.setattr(trainer.jax, "block_until_ready", wait)
    slow = lambda step: device.pass_by(5.0) or {"eval": 1}  # noqa: E731
    engine = engine_s and Engine(lambda: device.pass_by(engine_s))
    hooks = [("evaluation", 4, slow)] if engine is None else []
    recorder = Recorder(engine=engine, hooks=hooks, sinks=(lambda line: device.pass_by(
      write_s + stalls.get(("write", line["step"]), 0.0)),))  # fmt: skip
    draw, program = recorder.next_batch, recorder.program

    def timed_draw():
      with recorder.observers.phase("data"):
        device.pass_by(data_s + stalls.get(("draw", recorder.batches + 1), 0.0))
      return draw()

    def timed_step(state, batch):
      device.dispatched()
      return program(state, batch)

    recorder.next_batch, recorder.program = timed_draw, timed_step
    go(recorder, num_steps=9)
    return recorder.lines, device

  return run_it


@pytest.mark.parametrize("at_once", [False, True])
@pytest.mark.parametrize(
  "host",
  [
    {},
    {"data_s": 20.0},  # no batch in time
    {"write_s": 0.5},
    {"stalls": {("draw", 3): 30.0, ("draw", 8): 30.0}},
    {"stalls": {("write", 2): 30.0, ("write", 3): 30.0, ("write", 6): 30.0}},
  ],
)
def test_no_step_is_faster_than_its_device_and_an_evaluation_is_no_step(on_device, at_once, host):
  lines, device = on_device(at_once, **host)
  clocks = [line["time"] for line in lines]
  took = [clock["seconds"]["step"] + clock["seconds"].get("data", 0.0) for clock in clocks]
  assert min(took) >= Device.STEP_S - 1e-6
  assert max(clock["mfu"] for clock in clocks) <= 1 / Device.STEP_S
  scored = [clock["seconds"].get("evaluation", 0.0) for clock in clocks]
  assert scored == [5.0 if n in (4, 8, 9) else 0.0 for n in range(1, 10)]
  assert math.isclose(sum(took) + sum(scored), device.now, abs_tol=0.6)
  if not host:
    assert max(took) < 1.1 * Device.STEP_S, "nor slower where nothing holds it up"


def test_who_waits_for_arrays_notes_when_they_arrived():
  completions = CompletionWatcher()
  started = time.perf_counter()
  found = completions.expect({"a": jnp.arange(4) + 1, "b": np.float32(1)})
  while found.at == math.inf:
    time.sleep(0.001)
  first = found.at
  found.look()
  found.wait()
  assert started < first == found.at <= time.perf_counter()
  completions.close()


def test_who_comes_by_notes_what_is_there_before_the_one_that_waits():
  found = Completion({"a": jax.block_until_ready(jnp.arange(4) + 1)})
  assert found.at == math.inf
  found.look()
  assert found.at < math.inf


class Engine:
  """Adds 100 to the state every two steps."""

  every = 2

  def __init__(self, seconds=lambda: None):
    self.seconds, self.seen = seconds, []

  def __call__(self, step, state):
    self.seconds()
    self.seen.append((step, int(state)))
    return state + 100


def test_an_engine_replaces_the_state_between_two_steps_before_it_is_looked_at_and_saved():
  engine = Engine()
  recorder = Recorder(hooks=[("a", 2, lambda step: {})], engine=engine)
  assert go(recorder, num_steps=5, checkpoint_every=2) == (5, 205)
  assert engine.seen == [(2, 2), (4, 104)]
  assert [event for event in recorder.events if event[0] in ("a", "save")] == [
    ("a", 2, 102), ("save", 2, 102), ("a", 4, 204), ("save", 4, 204), ("a", 5, 205),
    ("save", 5, 205),
  ]  # fmt: skip
  assert [line["step"] for line in recorder.lines] == [1, 2, 3, 4, 5]


@pytest.mark.parametrize("at_once", [False, True])
def test_the_time_of_an_engine_is_no_step(on_device, at_once):
  lines, _ = on_device(at_once, engine_s=5.0)
  clocks = [line["time"]["seconds"] for line in lines]
  took = [clock["step"] + clock.get("data", 0.0) for clock in clocks]
  assert min(took) >= Device.STEP_S - 1e-6 and max(took) < 1.1 * Device.STEP_S
  assert sum(clock.get("engine", 0.0) for clock in clocks) == pytest.approx(5.0 * 4)
  assert max(line["time"]["mfu"] for line in lines) <= 1 / Device.STEP_S
