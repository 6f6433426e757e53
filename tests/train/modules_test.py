"""Few modules lie between a batch and the update that it makes."""

import pathlib
import sys
import types

import jax
import pytest

import jaxmoe
from jaxmoe.core.layout import one_device
from jaxmoe.core.parallel_context import ONE_DEVICE
from jaxmoe.runs.recipe_loading import load_recipe
from jaxmoe.train.completion import CompletionWatcher
from jaxmoe.train.observers import Observers
from jaxmoe.train.run_options import RunOptions
from jaxmoe.train.step import abstract_batch, abstract_state, build_train_step
from jaxmoe.train.train_state import StateSpec
from jaxmoe.train.trainer import Trainer
from jaxmoe.train.wall_clock import WallClock

ROOT = pathlib.Path(jaxmoe.__file__).parent
PARTS = ("models", "moe", "ops", "commands")
"""What they enter themselves is theirs; commands, which nothing may import, listen to JAX's events
in a process that ran one before."""
WAY = {
  "core/metrics.py", "core/parallel_context.py", "core/rng.py", "core/tokens.py",
  "optim/transform.py", "train/completion.py", "train/gradients.py", "train/step.py",
  "train/trainer.py",
}  # fmt: skip


class Entered:
  """The modules of this project that Python enters between `start` and `stop`."""

  def __init__(self):
    self.modules, self._below = set(), 0

  def start(self):
    sys.setprofile(self._event)

  def stop(self):
    sys.setprofile(None)

  def _event(self, frame, event, _):
    if event == "return" and self._below:
      self._below -= 1
    elif event == "call" and self._below:
      self._below += 1
    elif event == "call":
      path = pathlib.PurePath(frame.f_code.co_filename)
      if path.is_relative_to(ROOT):
        name = path.relative_to(ROOT)
        self._below = name.parts[0] in PARTS
        self.modules |= set() if self._below else {name.as_posix()}


@pytest.fixture
def trainer(monkeypatch):
  """A trainer of tiny whose program is a step that is traced, and what it enters on the way."""
  experiment = load_recipe("configs/tiny.py", ["--config.model.stack.0.repeats=1"])
  decoder, layout = experiment.decoder(), one_device()
  masters = experiment.masters(decoder)
  spec = StateSpec(decoder, experiment.transform(decoder), layout, 3, masters)
  step, entered = build_train_step(experiment, decoder, ONE_DEVICE), Entered()

  class Stream:
    def __next__(self):
      return abstract_batch(experiment, layout)

    def stats(self):
      return {"time": {"busy_s": 0.0}}

  def program(state, batch):
    state, metrics = jax.eval_shape(step, state, batch)
    entered.stop()
    return state, metrics

  def next_batch(self):
    found = real(self)
    entered.start()
    return found

  real = Trainer.next_batch
  monkeypatch.setattr(Trainer, "next_batch", next_batch)
  monkeypatch.setattr(layout.__class__, "put_batch", lambda self, batch: batch)
  made = object.__new__(Trainer)
  watchdog = types.SimpleNamespace(beat=lambda doing: None)
  made.observers = Observers(None, None, WallClock(), watchdog)
  made.layout, made.stream, made.program, made.options = layout, Stream(), program, RunOptions()
  made.step, made.state, made._check_first, made._busy_s = 0, abstract_state(spec), None, 0.0
  made._completions = CompletionWatcher()
  made._pending = types.SimpleNamespace(completion=made._completions.expect({}))
  yield made, entered
  made._completions.close()


def test_a_step_enters_nine_modules_between_batch_and_update(trainer):
  made, entered = trainer
  made.train_step()
  assert entered.modules == WAY and len(WAY) <= 9
