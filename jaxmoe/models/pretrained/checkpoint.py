"""A checkpoint in the names of its family: its model, and each weight as ours when asked for."""

from __future__ import annotations

import dataclasses
import math
import os
import pathlib
import re
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from jaxmoe.core import param_names
from jaxmoe.core.errors import InputError
from jaxmoe.models.pretrained.checkpoint_files import CheckpointFiles
from jaxmoe.models.pretrained.config_reader import read_config
from jaxmoe.models.pretrained.model_family import FREQUENCIES, ModelFamily
from jaxmoe.models.pretrained.sharded_files import ShardedTensors
from jaxmoe.models.pretrained.tensor_mapping import (
  BoundParam,
  TensorLayout,
  bind_params,
  choose_layouts,
  some,
)
from jaxmoe.models.transformer import Decoder, DType, TransformerConfig

HEAD, TABLE = "lm_head.weight", "model.embed_tokens.weight"


@dataclasses.dataclass(frozen=True)
class Checkpoint:
  """A checkpoint whose names, shapes and config fit each other.

  Attributes:
    family: Of its `model_type`.
    plain: The content of its config.json.
    unread: Keys of it that nobody asked for and nobody knows to be harmless.
    model: Its record; parameters are of the widest dtype on disk, in float32 for float16.
    vocab_size: V.
    folder: Its tensors.
    weights: Each of the model's weights, and how it lies there.
    left_aside: The names of tensors that are not read, as transformers does not read them.
  """

  family: ModelFamily
  plain: Mapping[str, Any]
  unread: list[str]
  model: TransformerConfig
  vocab_size: int
  files: CheckpointFiles
  weights: list[tuple[BoundParam, TensorLayout | None]]
  left_aside: list[str]

  @property
  def decoder(self) -> Decoder:
    """The functions of the model."""
    return Decoder(self.model, self.vocab_size)

  @property
  def left_aside_line(self) -> str:
    """What to say of tensors that are not read; empty where all are."""
    names = self.left_aside
    if not names:
      return ""
    tensors = "1 tensor is" if len(names) == 1 else f"{len(names):,} tensors are"
    return f"note: {tensors} left aside, as transformers does: {some(names, 1)}"

  def gather(self, bound: BoundParam, layout: TensorLayout | None) -> np.ndarray:
    """Returns one weight."""
    return bound.gather(layout, self.files.read)

  def num_bytes(self, bound: BoundParam, layout: TensorLayout | None) -> int:
    """Returns how many bytes a weight has in the folder."""
    name = next((name for name, _ in bound.tensors(layout)), None)
    return 0 if name is None else math.prod(bound.shape) * self.files.dtypes[name].itemsize


def open_checkpoint(
  families: Mapping[str, ModelFamily], path: str | os.PathLike[str], dtype: DType | None = None,
  rules: str | None = None,
) -> Checkpoint:  # fmt: skip
  """Returns the checkpoint in a folder; reads headers and no weight.

  Args:
    families: Those that are known.
    path: The folder: config.json and safetensors.
    dtype: What parameters become; None for what they are.
    rules: A file that says how files of devices are put together, see `sharded_files`; None where
      files are no such.

  Raises:
    InputError: a family, key or dtype that is not known, a damaged or missing file, or tensors that
      are missing, left over or of another shape; in one line.
  """
  plain, config = read_config(path)
  kind = config.get(str, "model_type")
  if kind not in families:
    raise InputError(
      f"{config.where}: model_type={kind!r} is not known; there are: {', '.join(families)}"
    )
  family = families[kind]
  model, vocab_size = family.read(config), config.get(int, "vocab_size")
  sharded = ShardedTensors(pathlib.Path(path), pathlib.Path(rules)) if rules else None
  folder = CheckpointFiles(path, sharded)
  wide = {found for name, found in folder.dtypes.items() if not name.endswith("correction_bias")}
  on_disk: DType = "bfloat16" if {found.name for found in wide} == {"bfloat16"} else "float32"
  model = dataclasses.replace(model, dtype=on_disk, param_dtype=dtype or on_disk)
  there = set(folder.shapes)
  if model.tied and HEAD in there and _same(folder, HEAD, TABLE):
    there.remove(HEAD)  # some write the head, too
  try:
    weights = choose_layouts(
      bind_params(family.mappings, shapes_by_name(Decoder(model, vocab_size))),
      there,
      family.ignored,
    )
    _check_shapes(folder, weights)
  except InputError as error:
    raise InputError(f"{path}: {error}") from None
  used = {name for bound, layout in weights for name, _ in bound.tensors(layout) if layout}
  aside = [name for name in sorted(there - used) if not re.fullmatch(FREQUENCIES, name)]
  return Checkpoint(family, plain, config.unread, model, vocab_size, folder, weights, aside)


def shapes_by_name(decoder: Decoder) -> dict[str, jax.ShapeDtypeStruct]:
  """Returns shape and dtype of each weight of a model by canonical name, in order of depth."""
  shapes = {}
  for path, leaf in param_names.flatten(decoder.shapes).items():
    stacked = param_names.layer_names(path, decoder.layer_groups)
    shape = leaf.shape if stacked is None else leaf.shape[1:]
    shapes.update(dict.fromkeys(stacked or [path], jax.ShapeDtypeStruct(shape, leaf.dtype)))
  return dict(sorted(shapes.items(), key=lambda pair: _order(pair[0])))


def _order(name: str) -> tuple[int, int, str]:
  """Returns what sorts names as a token meets their weights: table, layers by depth, the rest."""
  pieces = name.split("/")
  if pieces[0] == param_names.LAYERS:
    return 1, int(pieces[1]), name
  return (0 if pieces[0] == "embed" else 2), 0, name


def _same(folder: CheckpointFiles, one: str, other: str) -> bool:
  """Whether two tensors hold the same bits."""
  if other not in folder.shapes or folder.shapes[one] != folder.shapes[other]:
    return False
  return folder.read(one).tobytes() == folder.read(other).tobytes()


def _check_shapes(
  folder: CheckpointFiles, weights: list[tuple[BoundParam, TensorLayout | None]]
) -> None:
  """Refuses tensors of another shape than the config asks for, before any is read."""
  for bound, layout in weights:
    if layout is None:
      continue
    shape = bound.tensor_shape(layout)
    for name, _ in bound.tensors(layout):
      if folder.shapes[name] != shape:
        raise InputError(
          f"{name} has the shape {list(folder.shapes[name])}, and config.json asks for "
          f"{list(shape)}; are both of one checkpoint?"
        )
