"""From a recipe to a run: what `launch.train` does once flags are read and the corpus is open."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxmoe.checkpoint import OrbaxStore, Store
from jaxmoe.checkpoint.digest import digest
from jaxmoe.checkpoint.store import read_latest
from jaxmoe.core.errors import InputError
from jaxmoe.core.layout import Layout
from jaxmoe.cost.peak import matmul_peak
from jaxmoe.data.corpus import Corpus
from jaxmoe.data.stream import Stream
from jaxmoe.optim import make_optimizer, make_schedule
from jaxmoe.train.experiment import Experiment
from jaxmoe.train.gradients import counts_first, make_gradients
from jaxmoe.train.hooks import EvaluationHook, SamplesHook, encode_prompt, resume_samples
from jaxmoe.train.journal import Journal
from jaxmoe.train.loop import Job, Rates, run
from jaxmoe.train.progress import Display
from jaxmoe.train.saver import Saver
from jaxmoe.train.state import State, StateSpec
from jaxmoe.train.step import Step, make_step
from jaxmoe.train.workdir import Workdir


@dataclasses.dataclass(frozen=True)
class Outcome:
  """Where a run stands when it returns: at its last step or where it was asked to stop."""

  step: int
  done: bool


class Session:
  """A run of one recipe in one workdir. Building it checks everything and writes nothing."""

  def __init__(
    self, experiment: Experiment, workdir: Workdir, corpus: Corpus, layout: Layout
  ):
    train = experiment.train
    self.experiment, self.workdir, self.corpus, self.layout = experiment, workdir, corpus, layout
    self._check_prompts()
    self.decoder = experiment.decoder()
    self._schedule = make_schedule(experiment.optim, train.num_steps)
    self._transform = make_optimizer(
      experiment.optim, train.num_steps, self.decoder.parameter_names, self.decoder.dims
    )
    self.spec = StateSpec(self.decoder, self._transform, layout)

  def train(self, stopped: Callable[[], bool] = lambda: False) -> Outcome:
    """Starts or goes on, trains to the end or until `stopped`, and returns where it stands.

    Raises:
      InputError: the workdir holds something else, or the data has changed.
      CheckpointError: no checkpoint is intact, or saving failed three times.
      NotFiniteError: too many steps were not finite.
    """
    train = self.experiment.train
    self.workdir.claim(self.experiment)
    journal = Journal(self.workdir.metrics, self.workdir.events)
    display = Display(train.num_steps, train.log_every, self._bytes_per_token())
    store = OrbaxStore(self.workdir.checkpoints, keep=train.keep)
    stream = self.corpus.stream(
      train.batch_size, train.seed, jax.process_index(), jax.process_count()
    )
    try:
      first, state = self._begin(store, stream, journal, display)
      if first >= train.num_steps:
        display.say(f"nothing to do: step {first} of {train.num_steps} is saved already")
        # Again, because the process that saved it may have died before it said so.
        journal.event("done", step=first, digest=self._digest(state), data=stream.stats())
        return Outcome(first, done=True)
      saver = Saver(self.spec, self.experiment, (store, stream), journal, display)
      job = self._job(saver, stream, journal, display, stopped)
      try:
        last, state = run(job, state, first)
      finally:
        display.close()
      with display.phase(f"saving step {last}"):
        saver.finish(last, state)
      done = last == train.num_steps
      event = "done" if done else "stopped"
      journal.event(event, step=last, digest=self._digest(state), data=stream.stats())
      return Outcome(last, done)
    finally:
      stream.close()
      store.close()

  def compiled_step(self, state: State, batch: dict[str, jax.Array]) -> Step:
    """Returns the step compiled for these shapes, with the state donated."""
    train = self.experiment.train
    gradients = make_gradients(self.decoder, train.num_micro)
    step = make_step(gradients, self._transform, self._schedule, train.seed)
    shardings = (self.spec.shardings, self.layout.replicated)
    jitted = jax.jit(step, donate_argnums=0, out_shardings=shardings)
    return jitted.lower(state, batch).compile()

  def _save_tokenizer(self) -> None:
    """Puts tokenizer.json into place whole, since another command may be reading it."""
    temporary = self.workdir.tokenizer.with_suffix(".new")
    self.corpus.tokenizer.save(temporary)
    temporary.replace(self.workdir.tokenizer)

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
    words = digest(self.spec.to_arrays(state))
    return hashlib.sha256(json.dumps(sorted(words.items())).encode()).hexdigest()[:16]

  def _begin(
    self, store: Store, stream: Stream, journal: Journal, display: Display
  ) -> tuple[int, State]:
    """Returns the step a run goes on from, 0 for a new one, and its state."""

    def on_damage(step: int, why: str) -> None:
      display.say(f"checkpoint {step} is damaged and set aside: {why}")
      journal.event("set_aside", step=step, why=why)

    with display.phase("looking for a checkpoint"):
      found = read_latest(store, self.spec.like(), on_damage)
    if found is None:
      self._save_tokenizer()
      journal.resume(0)
      resume_samples(self.workdir.samples, 0)
      with display.phase("making parameters"):
        state = jax.block_until_ready(self.spec.init(self.experiment.train.seed))
      journal.event("start", params=self.decoder.num_params, data=self._data_report())
      return 0, state
    step, arrays, record = found
    stream.restore(record["data"])
    self._save_tokenizer()  # the same: it is part of the data's state
    journal.resume(step)
    resume_samples(self.workdir.samples, step)
    journal.event("resume", step=step)
    display.say(f"going on from step {step}")
    return step, self.spec.from_arrays(arrays)

  def _job(
    self, saver: Saver, stream: Stream, journal: Journal, display: Display,
    stopped: Callable[[], bool],
  ) -> Job:
    experiment, train = self.experiment, self.experiment.train
    if counts_first(self.decoder, train.num_micro):
      display.say(
        "load_balance scope 'global' with accumulation: a forward pass counts choices first "
        "(exact; about a third more compute)"
      )
    shape = (train.batch_size, experiment.data.seq_len)
    names = ("ids", "labels", "position", "segment")
    batch = {name: jax.ShapeDtypeStruct(shape, jnp.int32) for name in names}
    with display.phase("compiling train_step"):
      step = self.compiled_step(self.spec.shapes, batch)  # type: ignore[arg-type]
    with display.phase("measuring the matmul peak"):
      peak = matmul_peak(experiment.model.dtype) * len(self.layout.mesh.devices.flat)
    tokens = shape[0] * shape[1]
    flops = experiment.model.train_flops_per_token(self.decoder.vocab_size, shape[1]) * tokens
    return Job(
      train=train,
      splits=self.decoder.splits,
      step=step,
      next_batch=lambda: self.layout.put_batch(next(stream)),
      data_time=lambda: stream.stats()["time"],
      hooks=self._hooks(display),
      save=saver,
      stopped=stopped,
      journal=journal,
      display=display,
      rates=Rates(flops, peak),
    )

  def _hooks(self, display: Display) -> tuple[Any, ...]:
    config, tokenizer = self.experiment, self.corpus.tokenizer
    length = config.data.seq_len
    domains = {name: self.corpus.held_out(name) for name in self.corpus.domains}
    text = (tokenizer.eod_id, length)
    return (
      EvaluationHook(config.evaluation, self.decoder, domains, text, display),
      SamplesHook(config.samples, self.decoder, tokenizer, length, self.workdir.samples),
    )

  def _bytes_per_token(self) -> float:
    """Returns the mean over a few held-out documents, for the display alone."""
    documents = [doc for name in self.corpus.domains for doc in self.corpus.held_out(name)[:8]]
    tokens = sum(len(document.ids) + 1 for document in documents)
    return sum(document.num_bytes for document in documents) / tokens

  def _data_report(self) -> dict[str, Any]:
    skipped = self.corpus.skipped
    return {"digest": self.corpus.digest, "domains": self.corpus.statistics, "skipped": skipped}
