"""The setup of a run: its observers, checks before it begins, and what its speed is measured by."""

from __future__ import annotations

import pathlib
import tempfile
from typing import Any

import jax

from jaxmoe.core import multihost
from jaxmoe.core.errors import InputError
from jaxmoe.core.layout import Layout
from jaxmoe.cost import host
from jaxmoe.cost.peak import best_peak, kept_peak, peaks_of_machines
from jaxmoe.data.corpus import Corpus
from jaxmoe.models.transformer import Decoder
from jaxmoe.train.experiment import Experiment
from jaxmoe.train.gradients import counts_first
from jaxmoe.train.hooks import encode_prompt
from jaxmoe.train.observers import Observers
from jaxmoe.train.progress import Display
from jaxmoe.train.run_log import NoRunLog, RunLog
from jaxmoe.train.wall_clock import WallClock
from jaxmoe.train.watchdog import Watchdog, dump_and_end
from jaxmoe.train.workdir import Workdir


def make_observers(
  experiment: Experiment, workdir: Workdir, corpus: Corpus, clock: WallClock | None
) -> Observers:
  """Returns the observers of a run; of its processes the first alone writes files."""
  train = experiment.train
  display = Display(train.num_steps, train.log_every, bytes_per_token(corpus))
  log = RunLog(workdir.metrics, workdir.events, display.say)
  tick, stacks = workdir.touch, workdir.stacks
  if not multihost.is_main_process():
    log, tick = NoRunLog(), _nothing
    stacks = stacks.with_suffix(f".{jax.process_index()}.txt")

  def stalled(doing: str, waited_s: float) -> None:
    what, memory = f"nothing has begun for {waited_s:.0f} s after: {doing}", host.memory()
    free = f"; memory: {memory}" if memory else ""  # without it, reading it back takes for ever
    times = {"waited_s": round(waited_s, 1), "free_bytes": memory and memory.free}
    dump_and_end(
      stacks,
      f"{what}{free}; stacks are in {stacks}; the same command goes on",
      lambda: log.event("stalled", time=times, phase=doing),
    )

  watchdog = Watchdog(train.stall_s, stalled, tick)
  return Observers(log, display, clock or WallClock(), watchdog)


def check_prompts(experiment: Experiment, tokenizer: Any) -> None:
  """Raises InputError for a prompt that could not be continued when its step comes."""
  context = experiment.data.seq_len
  for i, text in enumerate(experiment.samples.prompts):
    where = f"config.samples.prompts.{i}"
    try:
      size = len(encode_prompt(tokenizer, text))
    except InputError as error:
      raise InputError(f"{where}: {error}") from None
    if size >= context and experiment.samples.every:
      raise InputError(
        f"{where}: {text!r} has {size} tokens with the start of text, the context is {context}; "
        "shorten it, or set --config.samples.every=0"
      )


def write_config_and_tokenizer(workdir: Workdir, experiment: Experiment, tokenizer: Any) -> None:
  """Writes config.json, in which safe fields may have changed, and tokenizer.json."""
  with multihost.raise_on_all():
    if not multihost.is_main_process():
      return
    workdir.write_config(experiment)
    with tempfile.TemporaryDirectory() as folder:
      path = pathlib.Path(folder) / "tokenizer.json"
      tokenizer.save(path)
      workdir.replace(workdir.tokenizer, path.read_text(encoding="utf-8"))


def bytes_per_token(corpus: Corpus) -> float:
  """Returns the mean over what is learned of a few held-out documents; 0 where nothing is."""
  documents = [doc for name in corpus.domains for doc in corpus.held_out(name)[:8]]
  learned = [document.scored for document in documents]
  tokens = sum(
    len(document.ids) + 1 if mask is None else int(mask.sum())
    for document, mask in zip(documents, learned)
  )
  return sum(document.scored_bytes for document in documents) / max(tokens, 1)


def tell_counting(decoder: Decoder, num_micro: int, observers: Observers) -> None:
  """Says so where a forward pass of all microbatches comes before the gradients of the first."""
  if counts_first(decoder, num_micro):
    observers.display.say(
      "load_balance scope 'global' with accumulation: a forward pass counts choices first "
      "(exact; about a third more compute)"
    )


def step_flops(experiment: Experiment, vocab_size: int) -> float:
  """Returns the model FLOPs of a step."""
  length = experiment.data.seq_len
  per_token = experiment.model.train_flops_per_token(vocab_size, length)
  return per_token * experiment.train.batch_size * length


def peak_flops_per_s(dtype: str, layout: Layout, folder: pathlib.Path | None) -> float:
  """Returns the matmul peak of all devices of a layout; process 0, which writes it, measures it.

  One that is kept is taken as it is: no first step waits for another look at it.
  """
  peak = kept_peak(dtype, folder) if multihost.is_main_process() else 1.0
  return peak * num_peaks(layout)


def look_at_peak_again(dtype: str, folder: pathlib.Path | None) -> None:
  """Measures the matmul peak for the runs that come, where it is kept."""
  if folder is not None and multihost.is_main_process():
    best_peak(dtype, folder)


def num_peaks(layout: Layout) -> float:
  """Returns how many times the peak that process 0 measures the devices of a layout have together.

  Virtual devices are the cores of their machine, however many they are, and so are those of its
  other processes.
  """
  devices = list(layout.mesh.devices.flat)
  if devices[0].platform != "cpu":
    return len(devices)
  places = multihost.all_gather_text(host.place())
  return peaks_of_machines(
    [places[index] for index in sorted({one.process_index for one in devices})]
  )


def _nothing() -> None:
  """The sign of life of a process that writes no files."""
