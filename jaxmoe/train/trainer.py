"""The trainer: a run of one recipe in one workdir, from its first step or its newest checkpoint.

The loop dispatches step n, then fetches and writes the metrics of step n - 1. Hooks run after a
step whose number they are due at, and after the last; what they return is written into the step's
line. A checkpoint is written after the line of its step, and not after a step that was skipped:
whatever made it harmful may be in the state.
"""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Callable
from typing import Any

import jax

from jaxmoe.checkpoint import open_store
from jaxmoe.core import multihost
from jaxmoe.core.backends import ChoiceLog
from jaxmoe.core.errors import PeerError, UserFacingError, machine_error
from jaxmoe.core.kept_programs import Compiler
from jaxmoe.core.layout import Layout
from jaxmoe.data.corpus import Corpus
from jaxmoe.parallel import share_of_rows
from jaxmoe.train import run_setup
from jaxmoe.train.completion import CompletionWatcher
from jaxmoe.train.experiment import Experiment
from jaxmoe.train.hooks import EvaluationHook, SamplesHook
from jaxmoe.train.kernel_choices import check_kernels, tell_kernels
from jaxmoe.train.replication_check import check_replication
from jaxmoe.train.restore import check_same_run, forget, restore_or_init
from jaxmoe.train.rollback import Rollback
from jaxmoe.train.run_events import about_run, tell_end, tell_process
from jaxmoe.train.run_options import Hook, RunOptions, RunResult
from jaxmoe.train.saver import Saver
from jaxmoe.train.step import Step, abstract_batch, abstract_state, step_program
from jaxmoe.train.step_health import HarmfulStepsError, StepHealth, check_drops
from jaxmoe.train.step_line import DispatchedStep, step_line
from jaxmoe.train.train_state import State, StateSpec, came_from
from jaxmoe.train.update_underflow import UpdateUnderflow, may_underflow
from jaxmoe.train.workdir import Workdir


class Trainer:
  """A run of one recipe in one workdir. Building it checks everything and writes nothing.

  Attributes:
    decoder: The model.
    spec: Shapes and names of its state.
    step: Where it stands.
    state: The state after that step, None before `fit`.
  """

  def __init__(
    self,
    experiment: Experiment,
    workdir: Workdir,
    corpus: Corpus,
    layout: Layout,
    options: RunOptions | None = None,
  ):
    train = experiment.train
    self.experiment, self.workdir, self.corpus, self.layout = experiment, workdir, corpus, layout
    self.options = options or RunOptions()
    self._share = share_of_rows(layout, train.batch_size)
    run_setup.check_prompts(experiment, corpus.tokenizer)
    programs = self.options.programs
    self._choices = ChoiceLog() if programs is None else programs.choices
    self.decoder = experiment.decoder(layout, log=self._choices)
    check_replication(experiment, self.decoder, layout)
    transform = experiment.transform(self.decoder)
    there = open_store(workdir.checkpoints, train.store)
    masters = came_from(there, experiment.masters(self.decoder))
    window = train.recovery.spike_window
    self._compiled = Compiler() if programs is None else programs.of(experiment, masters)
    self.spec = StateSpec(self.decoder, transform, layout, window, masters, self._compiled)
    check_kernels(experiment, self.decoder, self.spec, layout)
    self.step = 0
    self.state: Any = None
    self._pending: DispatchedStep | None = None

  def fit(self, stopped: Callable[[], bool] = lambda: False) -> RunResult:
    """Starts or goes on, trains to the end or until `stopped`, and returns where it stands.

    Raises:
      InputError: the workdir holds something else, or the data has changed.
      CheckpointError: no checkpoint is intact, or saving failed three times.
      NotFiniteError: too many steps were skipped or rolled back.
      DropError: a layer dropped more than its recipe allows.
    """
    experiment, train = self.experiment, self.experiment.train
    self.store = open_store(self.workdir.checkpoints, train.store, train.keep)
    with multihost.raise_on_all():
      if multihost.is_main_process():
        self.workdir.claim(experiment)
    check_same_run(self.store, experiment, self.corpus)
    clock, files = self.options.clock, (self.workdir, self.corpus)
    self.observers = observers = run_setup.make_observers(experiment, *files, clock)
    tell_process(observers, self.workdir)
    observers.watchdog.start()
    self.stream = self.corpus.stream(train.batch_size, train.seed, *self._share, observers)
    self.stopped = multihost.AnyProcess(stopped)
    self.saver = Saver(experiment, self.corpus, self.spec, self.store, self.stream, observers)
    try:
      with observers.clock.pauses.running():
        return self._fit()
    except (RuntimeError, ValueError, OSError, MemoryError) as raised:
      error = multihost.peer_error(raised) or machine_error(raised) or raised
      if isinstance(error, UserFacingError | PeerError):
        seconds = observers.clock.take("start")
        observers.log.event("failed", time={"seconds": seconds}, code=error.code, why=str(error))
      if error is raised:
        raise
      raise error from raised
    finally:
      observers.watchdog.stop()
      self.stream.close()
      if not isinstance(sys.exception(), PeerError):  # or it would wait for the dead
        self.store.close()

  def _fit(self) -> RunResult:
    num_steps, observers = self.experiment.train.num_steps, self.observers
    evaluation, self.sampling = self.hooks = self._hooks()
    self._start(evaluation)
    run_setup.write_config_and_tokenizer(self.workdir, self.experiment, self.corpus.tokenizer)
    if self.step >= num_steps:
      observers.display.say(f"nothing to do: step {self.step} of {num_steps} is saved already")
      # Again, because the process that saved it may have died before it said so.
      self._end(done=True)
      return RunResult(self.step, done=True)
    self._compile()
    try:
      self.run()
    finally:
      observers.display.close()
    with observers.phase("checkpoint", f"saving step {self.step}"):
      self.saver.finish(self.step, self.state)
    with observers.phase("start"):
      run_setup.look_at_peak_again(self.experiment.model.dtype, self.options.peaks)
    done = self.step == num_steps
    self._end(done)
    return RunResult(self.step, done)

  def _hooks(self) -> tuple[EvaluationHook, SamplesHook]:
    config, tokenizer, decoder = self.experiment, self.corpus.tokenizer, self.decoder
    length = config.data.seq_len
    if config.kernels.asked:  # what fits a step need not fit these programs
      decoder = config.decoder(self.layout, strict=False)
    domains = {name: self.corpus.held_out(name) for name in self.corpus.domains}
    text = ((tokenizer.start_id, tokenizer.eod_id), length)
    samples = self.observers.log.also(self.workdir.samples)
    return (
      EvaluationHook(config.evaluation, decoder, domains, text, self.observers),
      SamplesHook(config.samples, decoder, tokenizer, length, samples),
    )

  def _start(self, evaluation: EvaluationHook) -> None:
    """Sets step and state: those of the newest intact checkpoint, or those of a new run."""
    corpus, num_params, recipe = self.corpus, self.decoder.num_params, self.options.recipe
    about = functools.partial(about_run, corpus, num_params, evaluation, recipe)
    start = restore_or_init(
      self.experiment, self.spec, self.store, self.stream, self.observers, self.sampling, about
    )
    self.saver.rollbacks = start.rollbacks
    self._go_on_from(start.step, start.state)

  def _compile(self) -> None:
    """Makes the program of a step, and what its speed is measured by."""
    experiment, observers, options = self.experiment, self.observers, self.options
    run_setup.tell_counting(self.decoder, experiment.train.num_micro, observers)
    self._choices.take()  # those of programs that write samples
    with observers.phase("compile", "compiling train_step"):
      batch = abstract_batch(experiment, self.layout)
      self.program = self.compiled_step(abstract_state(self.spec), batch)
    with observers.phase("start", "measuring the matmul peak"):
      peak = run_setup.peak_flops_per_s(experiment.model.dtype, self.layout, options.peaks)
    self.flops_s = run_setup.step_flops(experiment, self.decoder.vocab_size), peak
    clock = {"seconds": observers.clock.take("start"), "peak_flops_per_s": peak}
    observers.log.event("compiled", time=clock)
    tell_kernels(observers, self.workdir.events, self._choices.take())

  def compiled_step(self, state: State, batch: dict[str, Any]) -> Step:
    """Returns the step compiled for these shapes, with the state donated."""
    program = step_program(self.experiment, self.decoder, self.spec, self.layout)
    return self._compiled(program, state, batch)

  def run(self) -> None:
    """Trains until the end, or until asked to stop; the last step is saved.

    Raises:
      NotFiniteError: more steps were skipped, or more rollbacks needed, than the budget allows.
      DropError: a layer dropped more than its limit.
    """
    experiment, observers, ended = self.experiment, self.observers, False
    optim, train = experiment.optim, experiment.train
    self._check_first = self.options.check_first
    self._health = StepHealth(train, observers)
    self._rollback = Rollback(experiment, self.spec, self.store, observers, self.workdir.events)
    counts = may_underflow(optim)
    self._underflow = UpdateUnderflow(optim, train.num_steps, observers) if counts else None
    self._busy_s = 0.0
    with contextlib.closing(CompletionWatcher()) as self._completions:
      observers.display.start(self.step)
      while self.step < train.num_steps and not ended:
        try:
          ended = self._advance()
        except HarmfulStepsError as harm:
          self.rollback(harm)

  def _advance(self) -> bool:
    """Makes a step, and whatever is due after it; returns whether it was the last."""
    train, before = self.experiment.train, self._pending
    self._pending = self.train_step()
    n = self.step = self.step + 1
    if before is not None:
      self.log_step(before)
    last = n == train.num_steps
    ended = last or self.stopped()
    self._between_steps()
    due: list[Hook] = [hook for hook in self.hooks if hook.every and (last or n % hook.every == 0)]
    saving = ended or n % train.checkpoint_every == 0
    skipped = self._finish(due) if due or saving or self.sampling.waits else 0
    if saving and (ended or not skipped):
      with self.observers.phase("checkpoint"):
        self.save()
    return ended

  def next_batch(self) -> tuple[dict[str, jax.Array], dict[str, Any]]:
    """Returns a batch on the devices, and what the stream says of itself with it."""
    observers = self.observers
    with observers.phase("data"):
      batch = self.layout.put_batch(next(self.stream))
      data = self.stream.stats()
      observers.watchdog.beat(f"step {self.step + 1}")
    return batch, data

  def train_step(self) -> DispatchedStep:
    """Dispatches the next step."""
    n, profiler = self.step + 1, self.options.profiler
    before = self._pending.completion if self._pending is not None else None
    if before is not None:
      before.look()
    batch, data = self.next_batch()
    if before is not None:
      before.before_dispatch()
    if profiler is not None:
      profiler.before(n)
    self._look_at_first(batch)
    self.state, metrics = self.program(self.state, batch)
    if profiler is not None:
      profiler.after(n, metrics)
    since_busy_s, self._busy_s = self._busy_s, data["time"]["busy_s"]
    return DispatchedStep(n, metrics, data, since_busy_s, self._completions.expect(metrics))

  def _look_at_first(self, batch: dict[str, jax.Array]) -> None:
    """Has the first step's parameters and batch checked, where somebody asked."""
    check, self._check_first = self._check_first, None
    if check is not None:
      with self.observers.phase("compile", "comparing the first step with one device"):
        message = check(self.layout, self.state.params, batch)
      self.observers.display.say(message)

  def _between_steps(self) -> None:
    """Lets an engine replace the state."""
    engine = self.options.engine
    if engine is None or self.step % engine.every:
      return
    assert self._pending is not None
    jax.block_until_ready(self._pending.metrics)  # or the step's own seconds would be the engine's
    with self.observers.phase("engine"):
      self.state = engine(self.step, self.state)

  def _finish(self, due: list[Hook]) -> int:
    """Runs hooks on the state of the step and writes its line; returns the skips in a row.

    What the untrained model writes comes before what hooks do, and else after the line.
    """
    dispatched = self._pending
    assert dispatched is not None
    jax.block_until_ready(dispatched.metrics)  # or the step's own seconds would count as a hook's
    extra: dict[str, Any] = {}
    if due:
      self._write_waiting()
    for hook in due:
      with self.observers.phase(hook.name):
        extra.update(hook(dispatched.step, self.state))
    self._pending = None
    skipped = self.log_step(dispatched, extra)
    self._write_waiting()
    return skipped

  def _write_waiting(self) -> None:
    """Writes the samples that waited for the first step, if there are any."""
    if self.sampling.waits:
      with self.observers.phase("samples", "writing with the untrained model", brief=True):
        self.sampling.catch_up()

  def log_step(self, dispatched: DispatchedStep, extra: dict[str, Any] | None = None) -> int:
    """Writes the line of a step, with what hooks returned; returns the skips in a row."""
    observers, groups = self.observers, self.decoder.layer_groups
    line = step_line(dispatched, extra, groups, observers.clock, self.flops_s)
    observers.log.step(line)
    observers.display.step(line)
    for listener in self.options.listeners:
      listener(line)
    return self.check_health(dispatched, line)

  def check_health(self, dispatched: DispatchedStep, line: dict[str, Any]) -> int:
    """Tells of what is wrong with a step; returns how many in a row were skipped up to it.

    Raises:
      HarmfulStepsError: they are too many in a row.
      NotFiniteError: they are too many in all.
      DropError: a layer dropped more than its limit.
    """
    if line.get("labels") == 0 and line["unlabelled"] == 1:
      self.observers.display.say(
        f"step {dispatched.step}: no token has a label, and nothing changes; such steps are "
        "counted (unlabelled)"
      )
    if self._underflow is not None:
      self._underflow(dispatched.step, dispatched.metrics)
    check_drops(line, self.experiment.model.drop_limits)
    return self._health.check(dispatched, line)

  def save(self) -> None:
    """Starts to write a checkpoint."""
    self.saver(self.step, self.state)

  def rollback(self, harm: HarmfulStepsError) -> None:
    """Goes back to a checkpoint, and on with other data, by the rules of `Recovery`.

    Raises:
      NotFiniteError: the run has gone back as often as it may.
      CheckpointError: no checkpoint is intact, or the files cannot be changed.
    """
    observers, skip = self.observers, self.experiment.train.recovery.skip_batches
    self._rollback.check_budget(harm, self.saver.rollbacks)
    with observers.phase("checkpoint", f"going back from step {harm.step}"):
      self.saver.settle()
      step, state = self._rollback.read(harm)
      self.saver.rollbacks += 1
      while self.stream.num_batches < harm.batch + skip:
        next(self.stream)
      cut = forget(observers.log, self.sampling, step)
    lost_s = cut.seconds + sum(observers.clock.take("step").values())
    event_fields = {"step": harm.step, "to": step, "skipped_batches": skip, "why": harm.why}
    observers.log.event("rollback", time={"lost_s": round(lost_s, 3)}, **event_fields)
    observers.display.say(f"went back to step {step}; {skip} more batches are left out")
    self._health.forget()
    self._go_on_from(step, state)
    for listener in self.options.listeners:
      listener.rollback(step)

  def _go_on_from(self, step: int, state: State) -> None:
    """Sets step and state; a step that was dispatched is forgotten."""
    self.step, self.state, self._pending = step, state, None

  def _end(self, done: bool) -> None:
    """Writes the last event of the process."""
    tell_end(done, self.step, self.state, self.spec, self.stream, self.observers)
