"""From a checkpoint to a run, at step 0 or with its moments, written whole or not at all."""

from __future__ import annotations

import dataclasses
import functools
import os
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp

from jaxmoe.checkpoint import LazyArray, open_store
from jaxmoe.conversion.hf_files import (
  CARRIED,
  CONFIG,
  DTYPES,
  FOLDER,
  TOKENIZER,
  Origin,
  Progress,
  copy_files,
  folder_for,
  tokenizer_of,
)
from jaxmoe.conversion.moments import LEFT, adam_of, state_arrays, step_of
from jaxmoe.core.config_io import override, to_json, to_plain
from jaxmoe.core.errors import InputError
from jaxmoe.core.output import write_atomic
from jaxmoe.data.mixture import Data, MixturePart
from jaxmoe.data.raw_example import Source
from jaxmoe.data.sources import Stdlib
from jaxmoe.data.tokenizers import Tokenizer
from jaxmoe.data.tokenizers.tokenizer_file import TokenizerFile
from jaxmoe.models.pretrained import FAMILIES
from jaxmoe.models.pretrained.checkpoint import Checkpoint, open_checkpoint
from jaxmoe.models.pretrained.checkpoint_files import Moments
from jaxmoe.models.pretrained.dtypes import dtypes_of
from jaxmoe.models.transformer import DType, Params
from jaxmoe.optim import AdamW, Cosine, Optim
from jaxmoe.train import changed_definitions
from jaxmoe.train.chat_date import settle_chat_date
from jaxmoe.train.experiment import Experiment, Samples, Train
from jaxmoe.train.run_log import RunLog
from jaxmoe.train.train_state import ONLY, PARAMS, params_from_arrays
from jaxmoe.train.workdir import Workdir

LONGEST = 4096
"""Tokens of a row, where the model could take more and nobody asked for them."""


@dataclasses.dataclass(frozen=True)
class ImportOptions:
  """What is said of a run beside the checkpoint that it is made of.

  Attributes:
    source: The text to score and train on; None for that of `base`.
    eod: The token that ends a document; None for what the checkpoint says.
    base: A recipe for all but model and tokenizer; None for one that fine-tunes.
    changes: (field, text) of the recipe that is changed.
    compute_dtype: What the run computes in; None for what fits the checkpoint.
    param_dtype: What parameters become; None for what they are.
    weights_only: Whether moments that are there are left.
    rules: A file that says how files of devices are put together; None where files are no such.
  """

  source: Source | None = None
  eod: str | None = None
  base: Experiment | None = None
  changes: tuple[tuple[str, str], ...] = ()
  compute_dtype: DType | None = None
  param_dtype: DType | None = None
  weights_only: bool = False
  rules: str | None = None


def from_hf(
  path: str, workdir: Workdir, options: ImportOptions, say: Callable[[str], None] = print
) -> None:
  """Writes the run of a checkpoint: at step 0, or at its own with the moments that it has.

  Args:
    path: The folder of the checkpoint.
    workdir: Of the run; must not exist.
    options: What else is asked for.
    say: Called with lines for a person.

  Raises:
    InputError: a checkpoint that is not known or not whole, or a folder that cannot be written.
    CheckpointError: the disk refuses the weights; nothing is left.
  """
  if os.path.lexists(workdir.path):
    raise InputError(
      f"--workdir={workdir.path}: is there already, and is not written over; give another folder"
    )
  checkpoint = open_checkpoint(FAMILIES, path, options.param_dtype, options.rules)
  source = pathlib.Path(path)
  tokenizer = tokenizer_of(source, checkpoint.vocab_size, options.eod)
  moments = None if options.weights_only else checkpoint.files.moments()
  experiment = settle_chat_date(recipe(checkpoint, tokenizer, options, moments))
  state = {} if moments is None else state_arrays(checkpoint, moments, experiment)
  step = 0 if moments is None else step_of(moments)
  workdir.check(experiment)
  moved = dataclasses.replace(tokenizer, path=str(workdir.path / FOLDER / TOKENIZER))
  data = dataclasses.replace(experiment.data, tokenizer=moved)
  experiment = dataclasses.replace(experiment, data=data)
  if checkpoint.unread:
    say(f"note: {path}/config.json has keys that are not read: {', '.join(checkpoint.unread)}")
  if checkpoint.left_aside:
    say(checkpoint.left_aside_line)
  with folder_for(workdir.path) as half:
    _write(Workdir(half), checkpoint, experiment, tokenizer, source, say, state, step)
    dtypes_of(checkpoint, options.param_dtype).write(half / FOLDER / DTYPES)
  model = experiment.model
  say(
    f"wrote {workdir.path}: {checkpoint.plain['model_type']}, "
    f"{experiment.decoder().num_params:,} parameters in {model.param_dtype}; it computes in "
    f"{model.dtype}"
  )
  if moments is not None:
    say(f"it is at step {step:,} with Adam's moments of {moments.count:,} updates; {LEFT}")


@dataclasses.dataclass(frozen=True)
class ImportedModel:
  """A public checkpoint in memory.

  Attributes:
    experiment: The recipe that a run of it would have.
    tokenizer: Its tokenizer.
    params: Its weights.
    origin: Its files.
  """

  experiment: Experiment
  tokenizer: Tokenizer
  params: Params
  origin: Origin


def load_model(path: str, options: ImportOptions, warn: Callable[[str], None]) -> ImportedModel:
  """Returns a checkpoint in memory; writes nothing, and warns of tensors that are left aside.

  Raises:
    InputError: as `from_hf`.
  """
  checkpoint = open_checkpoint(FAMILIES, path, options.param_dtype, options.rules)
  if checkpoint.left_aside:
    warn(checkpoint.left_aside_line)
  folder = pathlib.Path(path)
  file = tokenizer_of(folder, checkpoint.vocab_size, options.eod)
  experiment = settle_chat_date(recipe(checkpoint, file, options))
  arrays = {
    PARAMS + bound.name: jnp.asarray(checkpoint.gather(bound, layout), bound.dtype)
    for bound, layout in checkpoint.weights
  }
  params = params_from_arrays(experiment.decoder(), arrays)
  tokenizer = file.build((), "", None, lambda line: None)
  dtypes = dtypes_of(checkpoint, options.param_dtype)
  return ImportedModel(
    experiment, tokenizer, params, Origin(folder, folder / TOKENIZER, dtypes=dtypes)
  )


def recipe(
  checkpoint: Checkpoint, tokenizer: TokenizerFile, options: ImportOptions,
  moments: Moments | None = None,
) -> Experiment:  # fmt: skip
  """Returns the recipe of the run; model and tokenizer are the checkpoint's.

  Without a recipe of the options, Adam is that of `moments`, and the run goes on for 1,000 steps.

  Raises:
    InputError: a bad field, or one that changes the shape of a parameter.
  """
  asked = options.base
  if asked is None:
    longest = checkpoint.plain.get("max_position_embeddings") or LONGEST
    adam, steps = AdamW(weight_decay=0.1), 1000
    if moments is not None:
      adam, steps = adam_of(moments, adam), steps + step_of(moments)
    asked = Experiment(
      data=Data(parts=(MixturePart(Stdlib("code")),), seq_len=min(longest, LONGEST)),
      optim=Optim(adam, Cosine(warmup_steps=10), learning_rate=1e-5),
      train=Train(num_steps=steps, batch_size=8, checkpoint_every=200, log_every=10),
      samples=Samples(prompts=("The ",)),
    )
  parts = (MixturePart(options.source),) if options.source else asked.data.parts
  data = dataclasses.replace(asked.data, parts=parts, tokenizer=tokenizer)
  made = dataclasses.replace(asked, data=data, model=checkpoint.model)
  changes = list(options.changes)
  if options.compute_dtype:
    changes.append(("model.dtype", options.compute_dtype))
  changed = override(made, changes)
  before, after = made.decoder(), changed.decoder()
  if (before.shapes, before.layer_groups) != (after.shapes, after.layer_groups):
    raise InputError(
      "--config.model or --config.data.tokenizer fields change the parameters, which are the "
      "checkpoint's; leave them as they are"
    )
  changed.transform(after)  # its checks
  return changed


def _write(
  workdir: Workdir, checkpoint: Checkpoint, experiment: Experiment, tokenizer: TokenizerFile,
  source: pathlib.Path, say: Callable[[str], None], state: Mapping[str, LazyArray], step: int,
) -> None:  # fmt: skip
  """Writes all files of the run, with all of a state but its parameters, or with those alone."""
  carried = workdir.path / FOLDER
  carried.mkdir()
  copy_files(source, carried, (CONFIG, *CARRIED))
  tokenizer.build((), "", None, lambda line: None).save(workdir.tokenizer)
  write_atomic(workdir.config, to_json(experiment))
  record: dict[str, Any] = {
    "step": step, "seed": experiment.train.seed, "config": to_plain(experiment), "rollbacks": 0,
    ONLY: "state" if state else "params", changed_definitions.KEY: list(changed_definitions.MENDED),
  }  # fmt: skip
  progress = Progress(checkpoint.files.num_bytes, say)
  weights = {PARAMS + bound.name: (bound, layout) for bound, layout in checkpoint.weights}
  arrays = {
    name: LazyArray(bound.shape, bound.dtype, functools.partial(checkpoint.gather, bound, layout))
    for name, (bound, layout) in weights.items()
  }
  store = open_store(workdir.checkpoints, experiment.train.store)

  def written(name: str) -> None:
    if name in weights:
      progress.add(checkpoint.num_bytes(*weights[name]))

  store.write_streamed(step, {**arrays, **state}, record, written)
  store.close()
  progress.end()
  log = RunLog(workdir.metrics, workdir.events)
  aside: dict[str, Any] = {"left_aside": len(names)} if (names := checkpoint.left_aside) else {}
  log.event("convert", of=str(source), model_type=checkpoint.plain["model_type"], **aside)
  log.sync()
