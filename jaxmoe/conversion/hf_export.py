"""From a run to a public checkpoint, written whole or not at all."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import itertools
import json
import os
import pathlib
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np

from jaxmoe.checkpoint.manifest import DamagedStepError
from jaxmoe.conversion.hf_files import (
  CARRIED,
  CONFIG,
  DTYPES,
  TOKENIZER,
  Origin,
  Progress,
  copy_files,
  folder_for,
  origin_of,
  read_object,
)
from jaxmoe.core.errors import CheckpointError, InputError
from jaxmoe.core.layout import one_device
from jaxmoe.data.format_selection import tokenizer_template
from jaxmoe.data.tokenizers import load_tokenizer
from jaxmoe.data.tokenizers.template_file import find_template
from jaxmoe.models.pretrained import FAMILIES
from jaxmoe.models.pretrained.casting import Caster
from jaxmoe.models.pretrained.checkpoint import shapes_by_name
from jaxmoe.models.pretrained.dtypes import Dtypes, is_buffer, read_dtypes
from jaxmoe.models.pretrained.model_family import differences
from jaxmoe.models.pretrained.origin import with_origin
from jaxmoe.models.pretrained.safetensors_writer import TensorSpec, plan_shards, write_shards
from jaxmoe.models.pretrained.tensor_mapping import BoundParam, TensorSlice, bind_params
from jaxmoe.models.transformer import Params, TransformerConfig
from jaxmoe.moe.dispatch import Dropless
from jaxmoe.train.experiment import Experiment
from jaxmoe.train.run_folder import check_folder
from jaxmoe.train.run_store import need_store
from jaxmoe.train.train_state import PARAMS, Abstract, Arrays, as_stored, unstack_params
from jaxmoe.train.workdir import Workdir

LIMIT_BYTES = 5 * 10**9
"""Of one file, where nobody says."""


@dataclasses.dataclass(frozen=True)
class ExportSpec:
  """A checkpoint that is to be written.

  Attributes:
    kind: Its `model_type`.
    bound: Each weight of the model, in the order of a forward pass.
    asked: The dtype of tensors other than buffers; None for their own.
    own: Those of the checkpoint that the run came from; None where it came from none.
    limit_bytes: Of one file.
  """

  kind: str
  bound: list[BoundParam]
  asked: str | None
  own: Dtypes | None
  limit_bytes: int

  def tensors(self) -> list[TensorSpec]:
    """Returns what is written, in order."""
    found = {
      name: TensorSpec(name, bound.tensor_shape(bound.layout), self.dtype_of(bound, name))
      for bound in self.bound
      if bound.layout is not None
      for name, _ in bound.tensors(bound.layout)
    }
    return list(found.values())

  def dtype_of(self, bound: BoundParam, tensor: str) -> np.dtype:
    """Returns the dtype of a tensor of a weight."""
    if self.asked and not is_buffer(bound):
      return np.dtype(jax.numpy.dtype(self.asked))
    return self.own.of(bound, tensor) if self.own else bound.dtype

  def dtypes(self) -> list[str]:
    """Returns the names of all dtypes, that of the most bytes first."""
    sizes: collections.Counter[str] = collections.Counter()
    for tensor in self.tensors():
      sizes[tensor.dtype.name] += tensor.num_bytes
    return [name for name, _ in sizes.most_common()]


Say = Callable[[str], None]


def to_hf(
  workdir: Workdir, path: str, dtype: str | None, limit_bytes: int = LIMIT_BYTES,
  say: Say = print, warn: Say = print,
) -> None:
  """Writes the newest intact step of a run as a checkpoint.

  Args:
    workdir: The run.
    path: The folder; must not exist.
    dtype: Of all tensors but buffers; None for those that they had in the checkpoint the run came
      from, or else that its files have.
    limit_bytes: Of one file.
    say: Called with lines for a person.
    warn: Called with a line about a checkpoint that is damaged.

  Raises:
    InputError: no family has such a model, or the folder cannot be written; nothing is left.
    CheckpointError: there is no run, or no intact checkpoint.
  """
  out = new_folder(path)
  experiment = workdir.experiment()
  store = need_store(workdir)
  origin = origin_of(workdir)
  spec = export_spec(experiment, origin, dtype, limit_bytes, say)
  for step in reversed(store.steps()):
    there = store.contents(step)

    def read(under: str, like: Abstract, step: int = step, there: Any = there) -> Arrays:
      return store.read(step, as_stored(like, there), under=under)[0]

    caster = Caster()
    try:
      with folder_for(out) as half:
        _write(half, origin, experiment, spec, _pieces(spec, read, caster), say)
    except DamagedStepError as error:
      warn(f"checkpoint {step} is damaged, trying the one before: {error}")
    else:
      _tell_rounding(caster, spec, say)
      described = " and ".join(spec.dtypes())
      say(f"wrote {out}: {FAMILIES[spec.kind].architecture} of step {step}, in {described}")
      return
  raise CheckpointError(f"no intact checkpoint in {store}")


def params_to_hf(
  experiment: Experiment, params: Params, origin: Origin, path: str, dtype: str | None
) -> None:
  """Writes parameters in memory as a checkpoint; arguments and errors as of `to_hf`."""
  out, decoder = new_folder(path), experiment.decoder()
  spec = export_spec(experiment, origin, dtype, LIMIT_BYTES, nothing)
  arrays = unstack_params(decoder, params)
  pieces = _pieces(spec, lambda under, like: arrays, Caster())
  with folder_for(out) as half:
    _write(half, origin, experiment, spec, pieces, nothing)


def nothing(line: str) -> None:
  """Says nothing."""


def new_folder(path: str) -> pathlib.Path:
  """Returns the path of a folder that can be made.

  Raises:
    InputError: something is there already, or it cannot be written.
  """
  out = pathlib.Path(path)
  if os.path.lexists(out):
    raise InputError(f"--to_hf={out}: is there already, and is not written over; give another")
  check_folder(out, f"--to_hf={out}")
  return out


def export_spec(
  experiment: Experiment, origin: Origin, dtype: str | None, limit_bytes: int, say: Say
) -> ExportSpec:
  """Returns what is written of a model.

  Raises:
    InputError: no family has such a model.
  """
  kind = family_of(experiment.model, read_object(origin.folder / CONFIG).get("model_type"))
  if any(not isinstance(moe.dispatch, Dropless) for moe in experiment.model.moe_records()):
    say("note: a checkpoint cannot say that experts drop tokens; transformers will drop none")
  bound = bind_params(FAMILIES[kind].mappings, shapes_by_name(experiment.decoder()))
  own = origin.dtypes or read_dtypes(origin.folder / DTYPES)
  return ExportSpec(kind, bound, dtype, own, limit_bytes)


def _tell_rounding(caster: Caster, target: ExportSpec, say: Say) -> None:
  """Says how many values are not written as the run has them."""
  changed = {name: number for name, number in caster.changed.items() if number}
  if not changed:
    return
  described = " and ".join(f"{number:,} values to {name}" for name, number in changed.items())
  why = "which the checkpoint that the run came from has" if target.own else "which its files have"
  if target.asked:
    why = "as asked"
  say(f"note: rounded {described}, {why}; --file_dtype=float32 writes what the run has")


def family_of(model: TransformerConfig, carried: str | None) -> str:
  """Returns the `model_type` of a model: the one it came with, if that still fits, or any other.

  Raises:
    InputError: no family has such a model; with what the nearest one lacks.
  """
  lacks: dict[str, list[str]] = {}
  for kind in dict.fromkeys([carried, *FAMILIES]) if carried in FAMILIES else FAMILIES:
    with contextlib.suppress(InputError):
      lacks[kind] = differences(FAMILIES[kind], model)
      if not lacks[kind]:
        return kind
  if not lacks:
    raise InputError("no public family has attention, experts or dense parts of these kinds")
  kind = min(lacks, key=lambda name: len(lacks[name]))
  more = len(lacks[kind]) - 1
  raise InputError(
    f"no public family has such a model; the nearest, {kind}, differs in {lacks[kind][0]}"
    + (f" and {more} more fields" if more else "")
  )


def _write(
  folder: pathlib.Path, origin: Origin, experiment: Experiment, target: ExportSpec,
  pieces: Iterator[TensorSlice], say: Say,
) -> None:
  """Writes all files of a checkpoint."""
  tensors = target.tensors()
  progress = Progress(sum(tensor.num_bytes for tensor in tensors), say)
  shards = plan_shards(tensors, target.limit_bytes)
  write_shards(folder, shards, pieces, progress.add)
  progress.end()
  carried = origin.folder
  names = copy_files(carried, folder, CARRIED) if carried.is_dir() else []
  eod_id = None
  if TOKENIZER not in names:
    tokenizer = load_tokenizer(origin.tokenizer)
    eod_id = tokenizer.eod_id
    _write_tokenizer(folder, origin.tokenizer, experiment, say)
  elif find_template(folder) and experiment.data.chat and origin.trained:
    say(
      "note: messages are trained in the format of data.chat; the checkpoint has the chat "
      "template that the model came with"
    )
  plain = _config(experiment, target, read_object(carried / CONFIG), eod_id)
  _write_json(folder / CONFIG, plain)


def _pieces(
  target: ExportSpec, read: Callable[[str, Abstract], Arrays], caster: Caster
) -> Iterator[TensorSlice]:
  """Yields what each weight is of its tensors; those of one layer are in memory at a time."""
  sharding = one_device().replicated
  for under, group in itertools.groupby(target.bound, key=_part):
    of = list(group)
    like = {
      PARAMS + bound.name: jax.ShapeDtypeStruct(bound.shape, bound.dtype, sharding=sharding)
      for bound in of
    }
    arrays = read(PARAMS + under, like)
    for bound in of:
      whole = np.asarray(arrays[PARAMS + bound.name])
      if bound.layout is not None:
        for piece in bound.slices(bound.layout, whole):
          yield from caster.cast(piece, target.dtype_of(bound, piece.name))
      elif whole.any():
        raise InputError(
          f"{bound.name} is not zero, and {FAMILIES[target.kind].architecture} has no place for it"
        )


def _part(bound: BoundParam) -> str:
  """Returns what the names of a layer's weights start with, or of those outside of layers."""
  pieces = bound.name.split("/")
  return "/".join(pieces[: 1 if bound.depth is None else 2]) + "/"


def _config(
  experiment: Experiment, target: ExportSpec, carried: dict[str, Any], eod_id: int | None
) -> dict[str, Any]:
  """Returns the content of config.json: the model's keys, and those of its origin beside them."""
  own = {
    "bos_token_id": None,
    "eos_token_id": eod_id,
    "max_position_embeddings": experiment.data.seq_len,
    "pad_token_id": None,
  }
  plain = with_origin(FAMILIES, target.kind, experiment.model, carried)
  main, names = target.dtypes()[0], ("torch_dtype", *({"dtype"} & plain.keys()))
  if target.asked or target.own is None or target.own.asked:
    plain.update(dict.fromkeys(names, main))
  else:
    plain.setdefault("torch_dtype", plain.get("dtype", main))
  return {**own, **plain, "vocab_size": experiment.data.tokenizer.vocab_size}


def _write_tokenizer(
  folder: pathlib.Path, own: pathlib.Path, experiment: Experiment, say: Say
) -> None:
  """Writes the tokenizer of a run that carries none, in the form of transformers."""
  plain = read_object(own)
  if "tokenizer" not in plain:
    say("note: bytes have no tokenizer.json; the checkpoint has none")
    return
  (folder / TOKENIZER).write_text(plain["tokenizer"], encoding="utf-8")
  added = json.loads(plain["tokenizer"])["added_tokens"]
  end = next((token["content"] for token in added if token["id"] == plain["eod_id"]), None)
  config: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": end}
  template = None
  try:
    template = tokenizer_template(experiment.data) if experiment.data.chat is None else None
  except InputError as error:
    say(f"note: the checkpoint has no chat template: {error}")
  if template is not None:  # what messages were trained in
    named = {"default": template.text, "tool_use": template.tool_use}
    several = [{"name": name, "template": text} for name, text in named.items() if text]
    config |= {**template.tokens, "chat_template": several if several[1:] else template.text}
  _write_json(folder / "tokenizer_config.json", config)


def _write_json(path: pathlib.Path, plain: dict[str, Any]) -> None:
  path.write_text(json.dumps(plain, indent=2, sort_keys=True) + "\n", encoding="utf-8")
