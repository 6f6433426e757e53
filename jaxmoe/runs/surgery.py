"""Surgery on a run: its experts are changed, and a new run starts from them at step 0."""

from __future__ import annotations

import dataclasses
import itertools
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from jaxmoe.adapt import Surgery, Variety, clone, insert, open_inactive, prune, upcycle
from jaxmoe.core.errors import InputError
from jaxmoe.data.corpus import Corpus, open_corpus
from jaxmoe.models.transformer import TransformerConfig
from jaxmoe.moe.layer import MoEConfig
from jaxmoe.runs.derived_run import (
  LoadedState,
  check_moments,
  check_out,
  new_experiment,
  read_source,
  write_run,
)
from jaxmoe.train.expert_counts import ExpertCounts, count_experts, held_out_batches
from jaxmoe.train.run_store import need_store
from jaxmoe.train.workdir import Workdir

ONE_SOURCE_OF_COUNTS = "--prune_to needs one of --usage=FILE and --count_on=BATCHES"


@dataclasses.dataclass(frozen=True)
class Operation:
  """One change to the experts of a run.

  Attributes:
    name: As the flag of `jaxmoe surgery` is called.
    operate: Returns the surgery on a model, given how often its experts are chosen.
    fields: What the event of the new run says of it.
    usage: How often experts are chosen, where it is known and of interest.
    count_on: On how many batches that is counted; None where it is not.
    held_out: Whether these are of held-out documents.
  """

  name: str
  operate: Callable[[Any, TransformerConfig], Surgery]
  fields: dict[str, Any]
  usage: ExpertCounts | None = None
  count_on: int | None = None
  held_out: bool = False


@dataclasses.dataclass(frozen=True)
class NewRun:
  """What a new run has of its own.

  Attributes:
    config: A recipe for all but the model; None for the run's.
    overrides: Such as `--config.train.num_steps=100`.
    reset_moments: Whether its optimizer starts anew.
  """

  config: str | None = None
  overrides: Sequence[str] = ()
  reset_moments: bool = False


def inserting(num: int, like: Sequence[int] = ()) -> Operation:
  """Returns the operation that adds `num` inactive experts to every MoE layer; outputs stay."""
  fields = {"insert": num, "like": list(like)}
  return Operation("insert", lambda usage, model: insert(model, num, like), fields)


def opening(like: Sequence[int] = ()) -> Operation:
  """Returns the operation that opens inactive experts to the router."""
  fields = {"open": True, "like": list(like)}
  return Operation("open", lambda usage, model: open_inactive(model, like), fields)


def cloning(times: int) -> Operation:
  """Returns the operation that makes every expert so many; outputs stay."""
  return Operation("clone", lambda usage, model: clone(model, times), {"clone": times})


def upcycling(
  num_experts: int, num_active: int = 2, noise: float = 0.0, drop: float = 0.0
) -> Operation:
  """Returns the operation that makes a MoE layer of every dense block, each expert a copy."""
  fields = {"upcycle": num_experts, "active": num_active, "noise": noise, "drop": drop}

  def operate(usage: Any, model: TransformerConfig) -> Surgery:
    return upcycle(model, MoEConfig(num_experts, num_active), Variety(noise, drop))

  return Operation("upcycle", operate, fields)


def pruning(
  keep: int,
  usage: ExpertCounts | None = None,
  count_on: int | None = None,
  held_out: bool = False,
) -> Operation:
  """Returns the operation that keeps the most used experts, by `usage` or counted on batches.

  Raises:
    InputError: neither or both are given.
  """
  if (usage is None) == (count_on is None):
    raise InputError(ONE_SOURCE_OF_COUNTS)
  if held_out and usage is not None:
    raise InputError("--held_out goes with --count_on; --usage has counts already")
  fields = {"prune_to": keep, "count_on": count_on, "held_out": held_out}

  def operate(usage: Any, model: TransformerConfig) -> Surgery:
    return prune(model, usage, keep)

  return Operation("prune_to", operate, fields, usage, count_on, held_out)


def derive(
  workdir: Workdir,
  operation: Operation,
  out: str | None,
  new_run: NewRun,
  tokenizers: pathlib.Path | None,
  say: Callable[[str], None],
  warn: Callable[[str], None],
) -> int:
  """Writes the new run of a run and an operation; returns the step whose state it starts from.

  Args:
    workdir: The run.
    operation: What is done.
    out: The folder of the new run.
    new_run: What it has of its own.
    tokenizers: The folder of trained tokenizers; None keeps none.
    say: Called with what is read.
    warn: Called with a line about a checkpoint that is damaged.

  Raises:
    InputError, CheckpointError: a bad operation, recipe or folder; or no checkpoint is intact.
  """
  reset = new_run.reset_moments
  if operation.fields.get("drop") and not reset:
    raise InputError("--drop: hidden units drawn anew have no moments; set --reset_moments")
  old, store = workdir.experiment(), need_store(workdir)
  # Until choices are counted any usage tells what the new model is.
  usage = usage_of_none(old.model) if operation.count_on else operation.usage
  surgery = operation.operate(usage, old.model)
  new = new_experiment(old, surgery, new_run.config, new_run.overrides)
  folder = check_out(out, new)
  check_moments(old, new, reset)
  corpus = open_corpus(new.data, tokenizers, progress=say)
  source = read_source(workdir, store, corpus, warn)
  if operation.count_on:
    surgery = operation.operate(count(source, corpus, operation), old.model)
  given = {name: value for name, value in operation.fields.items() if value}
  event_fields = {"operation": operation.name, "flags": given}
  write_run(folder, source, surgery, new, corpus, event_fields, reset)
  return source.step


def usage_of_none(model: TransformerConfig) -> ExpertCounts:
  """Returns zeros for every expert of every MoE layer."""
  return [np.zeros(ffn.num_routable) for ffn in model.ffns if isinstance(ffn, MoEConfig)]


def count(source: LoadedState, corpus: Corpus, operation: Operation) -> ExpertCounts:
  """Returns how often each expert is chosen on the batches asked for."""
  train = source.experiment.train
  if operation.held_out:
    batches = held_out_batches(corpus, (train.batch_size, corpus.data.seq_len))
  else:
    batches = corpus.stream(train.batch_size, train.seed)
  some = list(itertools.islice(batches, operation.count_on))
  return count_experts(source.decoder, source.state.params, some)
