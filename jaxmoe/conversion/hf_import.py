"""From a public checkpoint to a run at step 0, written whole or not at all."""

from __future__ import annotations

import dataclasses
import functools
import os
import pathlib
from typing import Any

from jaxmoe.checkpoint.streaming_writer import LazyArray, write_streamed
from jaxmoe.commands.process import cli
from jaxmoe.conversion.hf_files import (
  CARRIED,
  CONFIG,
  DTYPES,
  FOLDER,
  TOKENIZER,
  Progress,
  copy_files,
  folder_for,
  tokenizer_of,
)
from jaxmoe.core.errors import InputError
from jaxmoe.core.output import write_whole
from jaxmoe.core.recipe import override, to_json, to_plain
from jaxmoe.data.mixture import Data, MixturePart
from jaxmoe.data.sources import Stdlib
from jaxmoe.data.sources.auto import source_at
from jaxmoe.data.tokenizers.tokenizer_file import TokenizerFile
from jaxmoe.models.pretrained import FAMILIES
from jaxmoe.models.pretrained.checkpoint import Checkpoint, open_checkpoint
from jaxmoe.models.pretrained.dtypes import dtypes_of
from jaxmoe.models.transformer import DType
from jaxmoe.optim import AdamW, Cosine, Optim
from jaxmoe.runs.chat_prompt import settled
from jaxmoe.runs.recipe_loading import load_recipe, parse_changes
from jaxmoe.train.experiment import Experiment, Samples, Train
from jaxmoe.train.run_log import RunLog
from jaxmoe.train.train_state import ONLY, PARAMS
from jaxmoe.train.workdir import Workdir

LONGEST = 4096
"""Tokens of a row, where the model could take more and nobody asked for them."""


@dataclasses.dataclass(frozen=True)
class Wishes:
  """What a user says of the run beside the checkpoint; see the flags of `jaxmoe convert`."""

  text: str | None = None
  eod: str | None = None
  config: str | None = None
  overrides: tuple[str, ...] = ()
  compute_dtype: DType | None = None


def from_hf(path: str, workdir: Workdir, dtype: DType | None, wishes: Wishes) -> None:
  """Writes the run of a checkpoint.

  Args:
    path: The folder of the checkpoint.
    workdir: Of the run; must not exist.
    dtype: What parameters become in the file; None for what they are.
    wishes: What else is asked for.

  Raises:
    InputError: a checkpoint that is not known or not whole, or a folder that cannot be written.
    CheckpointError: the disk refuses the weights; nothing is left.
  """
  if os.path.lexists(workdir.path):
    raise InputError(
      f"--workdir={workdir.path}: is there already, and is not written over; give another folder"
    )
  cli.set_up_jax(keep_memory=False)
  checkpoint = open_checkpoint(FAMILIES, path, dtype)
  source = pathlib.Path(path)
  tokenizer = tokenizer_of(source, checkpoint.vocab_size, wishes.eod)
  experiment = settled(recipe(checkpoint, tokenizer, wishes))
  workdir.check(experiment)
  moved = dataclasses.replace(tokenizer, path=str(workdir.path / FOLDER / TOKENIZER))
  data = dataclasses.replace(experiment.data, tokenizer=moved)
  experiment = dataclasses.replace(experiment, data=data)
  if checkpoint.unread:
    print(f"note: {path}/config.json has keys that are not read: {', '.join(checkpoint.unread)}")
  with folder_for(workdir.path) as half:
    _write(Workdir(half), checkpoint, experiment, tokenizer, source)
    dtypes_of(checkpoint, dtype).write(half / FOLDER / DTYPES)
  model = experiment.model
  print(f"wrote {workdir.path}: {checkpoint.plain['model_type']}, "
        f"{experiment.decoder().num_params:,} parameters in {model.param_dtype}; it computes in "
        f"{model.dtype}")


def recipe(checkpoint: Checkpoint, tokenizer: TokenizerFile, wishes: Wishes) -> Experiment:
  """Returns the recipe of the run; model and tokenizer are the checkpoint's.

  Raises:
    InputError: a bad recipe, field or text, or one that changes the shape of a parameter.
  """
  if wishes.config:
    asked = load_recipe(wishes.config, [])
  else:
    longest = checkpoint.plain.get("max_position_embeddings") or LONGEST
    asked = Experiment(
      data=Data(parts=(MixturePart(Stdlib("code")),), seq_len=min(longest, LONGEST)),
      optim=Optim(AdamW(weight_decay=0.1), Cosine(warmup_steps=10), learning_rate=1e-5),
      train=Train(num_steps=1000, batch_size=8, checkpoint_every=200, log_every=10),
      samples=Samples(prompts=("The ",)),
    )
  with cli.named("text"):
    parts = (MixturePart(source_at(wishes.text)),) if wishes.text else asked.data.parts
  data = dataclasses.replace(asked.data, parts=parts, tokenizer=tokenizer)
  made = dataclasses.replace(asked, data=data, model=checkpoint.model)
  changes = parse_changes(wishes.overrides)
  if wishes.compute_dtype:
    changes.append(("model.dtype", wishes.compute_dtype))
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
  source: pathlib.Path,
) -> None:
  """Writes all files of the run."""
  carried = workdir.path / FOLDER
  carried.mkdir()
  copy_files(source, carried, (CONFIG, *CARRIED))
  tokenizer.build((), "", None, lambda line: None).save(workdir.tokenizer)
  write_whole(workdir.config, to_json(experiment))
  record: dict[str, Any] = {
    "step": 0, "seed": experiment.train.seed, "config": to_plain(experiment), "rollbacks": 0,
    ONLY: "params",
  }  # fmt: skip
  progress = Progress(checkpoint.files.num_bytes)
  weights = {PARAMS + bound.name: (bound, layout) for bound, layout in checkpoint.weights}
  arrays = {
    name: LazyArray(bound.shape, bound.dtype, functools.partial(checkpoint.gather, bound, layout))
    for name, (bound, layout) in weights.items()
  }
  write_streamed(
    workdir.checkpoints, 0, arrays, record,
    lambda name: progress.add(checkpoint.num_bytes(*weights[name])),
  )  # fmt: skip
  progress.end()
  log = RunLog(workdir.metrics, workdir.events)
  log.event("convert", of=str(source), model_type=checkpoint.plain["model_type"])
  log.sync()
