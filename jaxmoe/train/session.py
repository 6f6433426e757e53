"""From a recipe to a run: what `jaxmoe train` does once flags are read and the corpus is open."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import pathlib
import platform
import sys
import tempfile
from collections.abc import Callable
from typing import Any

import jax

from jaxmoe.checkpoint import open_store
from jaxmoe.checkpoint.digest import digest
from jaxmoe.core import multihost
from jaxmoe.core.errors import (
  CheckpointError,
  InputError,
  PeerError,
  UserFacingError,
  machine_error,
)
from jaxmoe.core.layout import Layout
from jaxmoe.cost import host
from jaxmoe.cost.peak import best_peak, together
from jaxmoe.data.corpus import Corpus
from jaxmoe.data.loader_callbacks import LoaderCallbacks as DataWatch
from jaxmoe.data.stream import BatchStream
from jaxmoe.models.transformer import Params
from jaxmoe.parallel import share_of_rows
from jaxmoe.train import held_out_slice
from jaxmoe.train.evaluate import compressors
from jaxmoe.train.experiment import Experiment
from jaxmoe.train.gradients import counts_first
from jaxmoe.train.hooks import EvaluationHook, SamplesHook, encode_prompt
from jaxmoe.train.loop import Drawn, Hook, Job, Profiler, Rates, Sink, run
from jaxmoe.train.observers import Observers
from jaxmoe.train.param_update import may_underflow
from jaxmoe.train.parts import Parts
from jaxmoe.train.progress import Display
from jaxmoe.train.replication_check import check_replication
from jaxmoe.train.restore import check_same_run, restore_or_init
from jaxmoe.train.rollback import Rollback
from jaxmoe.train.run_log import NoRunLog, RunLog
from jaxmoe.train.saver import Saver
from jaxmoe.train.step import Step, abstract_batch, abstract_state, lower_step
from jaxmoe.train.train_state import State, StateSpec, came_from
from jaxmoe.train.update_underflow import UpdateUnderflow
from jaxmoe.train.wall_clock import WallClock
from jaxmoe.train.watchdog import Watchdog, dump_and_end
from jaxmoe.train.workdir import Workdir


@dataclasses.dataclass(frozen=True)
class Outcome:
  """Where a run stands when it returns: at its last step or where it was asked to stop."""

  step: int
  done: bool


@dataclasses.dataclass(frozen=True)
class Around:
  """What a run is given by whoever starts it, besides what it trains.

  Attributes:
    recipe: Where the recipe comes from, `{"name", "changes": {path: [recipe's, this run's]}}`.
    clock: Where the wall time of the process goes.
    sinks: Where lines go besides the log.
    profiler: What looks at single steps.
    first: Called with layout, parameters and batch before the process' first step; what it returns
      is said.
    peaks: The folder where the best matmul rates ever seen are kept; None keeps none.
  """

  recipe: dict[str, Any] | None = None
  clock: WallClock | None = None
  sinks: tuple[Sink, ...] = ()
  profiler: Profiler | None = None
  first: Callable[[Layout, Params, Any], str] | None = None
  peaks: pathlib.Path | None = None


class Session:
  """A run of one recipe in one workdir. Building it checks everything and writes nothing."""

  def __init__(
    self,
    experiment: Experiment,
    workdir: Workdir,
    corpus: Corpus,
    layout: Layout,
    around: Around = Around(),
  ):
    train = experiment.train
    self.experiment, self.workdir, self.corpus, self.layout = experiment, workdir, corpus, layout
    self._around = around
    self._share = share_of_rows(layout, train.batch_size)
    self._check_prompts()
    self.decoder = experiment.decoder()
    check_replication(experiment, self.decoder, layout)
    transform = experiment.transform(self.decoder)
    there = open_store(workdir.checkpoints, train.store)
    masters = came_from(there, experiment.masters(self.decoder))
    window = train.recovery.spike_window
    self.spec = StateSpec(self.decoder, transform, layout, window, masters)

  def train(self, stopped: Callable[[], bool] = lambda: False) -> Outcome:
    """Starts or goes on, trains to the end or until `stopped`, and returns where it stands.

    Raises:
      InputError: the workdir holds something else, or the data has changed.
      CheckpointError: no checkpoint is intact, or saving failed three times.
      NotFiniteError: too many steps were skipped or rolled back.
      DropError: a layer dropped more than its recipe allows.
    """
    train = self.experiment.train
    store = open_store(self.workdir.checkpoints, train.store, train.keep)
    with multihost.raise_on_all():
      if multihost.is_main_process():
        self.workdir.claim(self.experiment)
    check_same_run(store, self.experiment, self.corpus)
    observers = self._observers()
    observers.log.event("process", time=self._process_times(observers.clock), **_process())
    observers.watchdog.start()
    callbacks = DataWatch(observers.slow, observers.unread, observers.worker)
    stream = self.corpus.stream(train.batch_size, train.seed, *self._share, callbacks)
    samples = observers.log.also(self.workdir.samples)
    parts = Parts(self.experiment, self.corpus, self.spec, store, stream, observers, samples)
    try:
      with observers.clock.pauses.running():
        return self._train(parts, stopped)
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
      stream.close()
      if not isinstance(sys.exception(), PeerError):  # or it would wait for the dead
        store.close()

  def _train(self, parts: Parts, stopped: Callable[[], bool]) -> Outcome:
    num_steps, observers = self.experiment.train.num_steps, parts.observers
    saver = Saver(parts)
    evaluation, samples = self._hooks(parts)
    about = self._about(evaluation) if multihost.is_main_process() else {}
    first, state = restore_or_init(
      parts, saver, about, lambda state: self._sample(samples, state, observers)
    )
    self._write_files()
    if first >= num_steps:
      observers.display.say(f"nothing to do: step {first} of {num_steps} is saved already")
      # Again, because the process that saved it may have died before it said so.
      self._end("done", first, state, parts)
      return Outcome(first, done=True)
    job = self._job(parts, saver, (evaluation, samples), stopped)
    try:
      last, state = run(job, state, first)
    finally:
      observers.display.close()
    with observers.phase("checkpoint", f"saving step {last}"):
      saver.finish(last, state)
    done = last == num_steps
    self._end("done" if done else "stopped", last, state, parts)
    return Outcome(last, done)

  def compiled_step(self, state: State, batch: dict[str, Any]) -> Step:
    """Returns the step compiled for these shapes, with the state donated."""
    return lower_step(
      self.experiment, self.decoder, self.spec, self.layout, state, batch
    ).compile()

  def _observers(self) -> Observers:
    """Returns the onlookers of the run."""
    train, workdir = self.experiment.train, self.workdir
    display = Display(train.num_steps, train.log_every, self._bytes_per_token())
    log = RunLog(workdir.metrics, workdir.events, display.say)
    tick, stacks = workdir.touch, workdir.stacks
    if not multihost.is_main_process():
      log, tick = NoRunLog(), _nothing
      stacks = stacks.with_suffix(f".{jax.process_index()}.txt")

    def stalled(doing: str, waited_s: float) -> None:
      what, memory = f"nothing has begun for {waited_s:.0f} s after: {doing}", host.memory()
      free = f"; memory: {memory}" if memory else ""  # without it, reading it back takes for ever
      clock = {"waited_s": round(waited_s, 1), "free_bytes": memory and memory.free}
      dump_and_end(
        stacks,
        f"{what}{free}; stacks are in {stacks}; the same command goes on",
        lambda: log.event("stalled", time=clock, phase=doing),
      )

    watchdog = Watchdog(train.stall_s, stalled, tick)
    return Observers(log, display, self._around.clock or WallClock(), watchdog)

  def _process_times(self, clock: WallClock) -> dict[str, Any]:
    return {
      "started_unix_s": round(clock.started_unix_s, 3),
      "last_alive_unix_s": self.workdir.last_alive_unix_s,
      "seconds": clock.take("start"),
    }

  def _about(self, evaluation: EvaluationHook) -> dict[str, Any]:
    """Returns what the first event of a new run says."""
    corpus = self.corpus
    data = {"digest": corpus.digest, "domains": corpus.statistics, "skipped": corpus.skipped}
    data[held_out_slice.KEY] = evaluation.slice.plain()
    data["compressors"] = compressors(evaluation.domains, evaluation.among)
    return {"params": self.decoder.num_params, "recipe": self._around.recipe, "data": data}

  def _end(self, kind: str, step: int, state: State, parts: Parts) -> None:
    """Writes the last event of the process."""
    event_fields = {"step": step, "digest": self._digest(state), "data": parts.stream.stats()}
    if unlabelled := int(state.unlabelled):
      event_fields["unlabelled"] = unlabelled
      parts.observers.display.say(
        f"{unlabelled:,} of {step:,} steps had no token with a label, and changed nothing; with a "
        "larger train.batch_size or data.seq_len there are fewer"
      )
    seconds = parts.observers.clock.take("checkpoint")
    parts.observers.log.event(kind, time={"seconds": seconds}, **event_fields)
    with multihost.raise_on_all():
      try:
        parts.observers.log.sync()
      except OSError as error:
        raise CheckpointError(
          f"step {step} is saved, but its last lines cannot be written: {error}; the same command "
          "goes on once they can"
        ) from None

  def _sample(self, samples: SamplesHook, state: State, observers: Observers) -> None:
    """Writes what the untrained model has to say."""
    if samples.every:
      with observers.phase("samples", "writing with the untrained model", brief=True):
        samples(0, state)

  def _write_files(self) -> None:
    """Writes config.json, in which safe fields may have changed, and tokenizer.json."""
    with multihost.raise_on_all():
      if multihost.is_main_process():
        self._write_config_and_tokenizer()

  def _write_config_and_tokenizer(self) -> None:
    self.workdir.write_config(self.experiment)
    with tempfile.TemporaryDirectory() as folder:
      path = pathlib.Path(folder) / "tokenizer.json"
      self.corpus.tokenizer.save(path)
      self.workdir.replace(self.workdir.tokenizer, path.read_text(encoding="utf-8"))

  def _check_prompts(self) -> None:
    """Raises InputError for a prompt that could not be continued when its step comes."""
    context = self.experiment.data.seq_len
    for i, text in enumerate(self.experiment.samples.prompts):
      where = f"config.samples.prompts.{i}"
      try:
        size = len(encode_prompt(self.corpus.tokenizer, text))
      except InputError as error:
        raise InputError(f"{where}: {error}") from None
      if size >= context and self.experiment.samples.every:
        raise InputError(
          f"{where}: {text!r} has {size} tokens with the start of text, the context is {context}; "
          "shorten it, or set --config.samples.every=0"
        )

  def _digest(self, state: State) -> str:
    """Returns one digest of the whole state: of all names and their arrays' digests."""
    arrays = self.spec.to_arrays(state)
    if not int(state.unlabelled):  # the digests of runs of before know no such leaf
      del arrays["unlabelled"]
    words = digest(arrays)
    return hashlib.sha256(json.dumps(sorted(words.items())).encode()).hexdigest()[:16]

  def _job(
    self, parts: Parts, saver: Saver, hooks: tuple[Hook, ...], stopped: Callable[[], bool]
  ) -> Job:
    experiment, train, observers = self.experiment, self.experiment.train, parts.observers
    if counts_first(self.decoder, train.num_micro):
      observers.display.say(
        "load_balance scope 'global' with accumulation: a forward pass counts choices first "
        "(exact; about a third more compute)"
      )
    with observers.phase("compile", "compiling train_step"):
      step = self.compiled_step(abstract_state(self.spec), abstract_batch(experiment, self.layout))
    if self._around.first is not None:
      step = self._with_first(step, observers)
    with observers.phase("start", "measuring the matmul peak"):
      dtype, folder = experiment.model.dtype, self._around.peaks
      # Who writes it measures it, alone.
      peak = best_peak(dtype, folder) if multihost.is_main_process() else 1.0
      peak *= num_peaks(self.layout)
    length = experiment.data.seq_len
    per_token = experiment.model.train_flops_per_token(self.decoder.vocab_size, length)
    flops = per_token * train.batch_size * length
    counts = may_underflow(experiment.optim)
    clock = {"seconds": observers.clock.take("start"), "peak_flops_per_s": peak}
    observers.log.event("compiled", time=clock)
    return Job(
      train=train,
      layer_groups=self.decoder.layer_groups,
      step=step,
      draw=lambda: self._draw(parts.stream),
      hooks=hooks,
      save=saver,
      roll_back=Rollback(parts, saver, self.workdir.events),
      stopped=multihost.AnyProcess(stopped),
      observers=observers,
      rates=Rates(flops, peak),
      drop_limits=experiment.model.drop_limits,
      sinks=self._around.sinks,
      profiler=self._around.profiler,
      standstill=UpdateUnderflow(experiment.optim, train.num_steps, observers) if counts else None,
    )

  def _with_first(self, step: Step, observers: Observers) -> Step:
    """Returns the step before whose first run `around.first` looks at what it is given."""
    pending = [self._around.first]

    def checked(state: State, batch: Any) -> Any:
      if pending:
        look = pending.pop()
        assert look is not None
        with observers.phase("compile", "comparing the first step with one device"):
          message = look(self.layout, state.params, batch)
        observers.display.say(message)
      return step(state, batch)

    return checked

  def _draw(self, stream: BatchStream) -> Drawn:
    batch = self.layout.put_batch(next(stream))
    stats = stream.stats()
    clock = stats["time"]
    return Drawn(batch, stats["batches"], stats["domains"], clock["busy_s"], clock["mb_per_s"])

  def _hooks(self, parts: Parts) -> tuple[EvaluationHook, SamplesHook]:
    config, tokenizer = self.experiment, self.corpus.tokenizer
    length = config.data.seq_len
    domains = {name: self.corpus.held_out(name) for name in self.corpus.domains}
    text = ((tokenizer.start_id, tokenizer.eod_id), length)
    return (
      EvaluationHook(config.evaluation, self.decoder, domains, text, parts.observers),
      SamplesHook(config.samples, self.decoder, tokenizer, length, parts.samples),
    )

  def _bytes_per_token(self) -> float:
    """Returns the mean over what is learned of a few held-out documents; 0 where nothing is."""
    documents = [doc for name in self.corpus.domains for doc in self.corpus.held_out(name)[:8]]
    learned = [document.scored for document in documents]
    tokens = sum(
      len(document.ids) + 1 if mask is None else int(mask.sum())
      for document, mask in zip(documents, learned)
    )
    return sum(document.scored_bytes for document in documents) / max(tokens, 1)


def num_peaks(layout: Layout) -> float:
  """Returns how many times the peak that process 0 measures the devices of a layout have together.

  Virtual devices are the cores of their machine, however many they are, and so are those of its
  other processes.
  """
  devices = list(layout.mesh.devices.flat)
  if devices[0].platform != "cpu":
    return len(devices)
  places = multihost.all_gather_text(host.place())
  return together([places[index] for index in sorted({one.process_index for one in devices})])


def _nothing() -> None:
  """The sign of life of a process that writes no files."""


def _process() -> dict[str, Any]:
  """Returns what the `process` event says of this process."""
  devices = jax.devices()
  return {
    "pid": os.getpid(),
    "host": platform.node(),
    "python": platform.python_version(),
    "jax": jax.__version__,
    "devices": f"{len(devices)} x {devices[0].device_kind}",
    "processes": jax.process_count(),
  }
