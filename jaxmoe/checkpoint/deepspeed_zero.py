"""Shards of DeepSpeed's ZeRO (Rajbhandari et al. 2019): parameters and moments, without torch.

Each process writes `*_optim_states.pt`, in which its part of all weights lies flat in float32, and
`*_model_states.pt`, which says names and shapes in the order of the parts. Stages 1 and 2 cut the
flat whole of a group of parameters into as many parts as there are processes; stage 3 cuts each
parameter. Adam's moments lie as the parameters do. Nothing in a file is run.
"""

from __future__ import annotations

import dataclasses
import math
import os
import pathlib
import re
from typing import Any

import numpy as np

from jaxmoe.checkpoint.inert_pickle import Record
from jaxmoe.checkpoint.torch_file import TorchFile, TorchTensor
from jaxmoe.core.errors import InputError

LATEST, OPTIMIZER_FILES = "latest", "*zero_pp_rank_*_optim_states.pt"
_RANK = re.compile(r"(?:\w+_)?zero_pp_rank_(\d+)_mp_rank_(\d+)_optim_states\.pt")
MOMENTS = "exp_avg", "exp_avg_sq"
Shape = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Stretch:
  """Numbers of a parameter that lie together: in which flat array, from where, how many."""

  flat: TorchTensor
  start: int
  size: int


@dataclasses.dataclass(frozen=True)
class ZeroTensor:
  """A parameter: its shape, and pieces that follow one another."""

  shape: Shape
  pieces: tuple[Stretch, ...]


class TrainedFolder:
  """What DeepSpeed wrote of a training run.

  Attributes:
    path: The folder with the files.
    tensors: Trained and frozen parameters by name.
    moments: Of trained parameters by name, those of each of `MOMENTS`; none where Adam kept none.
    count: Updates of Adam; 0 where it kept no moments.
    skipped: Steps that changed nothing.
    settings: What Adam was set to, such as `betas`, in each group of parameters.
  """

  path: pathlib.Path
  tensors: dict[str, ZeroTensor]
  moments: dict[str, dict[str, ZeroTensor]]
  count: int
  skipped: int
  settings: list[dict[str, Any]]

  def read(self, name: str, moment: str | None = None) -> np.ndarray:
    """Returns a parameter in float32, or one of its moments.

    Raises:
      InputError: A file is damaged.
    """
    tensor = self.moments[moment][name] if moment else self.tensors[name]
    flat, at = np.empty(math.prod(tensor.shape), np.float32), 0
    for piece in tensor.pieces:
      flat[at : at + piece.size] = piece.flat.part(piece.start, piece.size)
      at += piece.size
    return flat.reshape(tensor.shape)


class ZeroFolder(TrainedFolder):
  """A folder that DeepSpeed wrote under ZeRO."""

  def __init__(self, path: str | os.PathLike[str]):
    """Reads what is in the files but for numbers.

    Args:
      path: The folder with the files, or the one above with `latest`, which names it.

    Raises:
      InputError: A file is missing or damaged, or the folder is of tensor-parallel devices or of
        experts that DeepSpeed wrote apart.
    """
    self.path = zero_folder(path)
    where = str(self.path)
    apart = sorted(self.path.glob("*layer_*_expert_*"))
    if apart:
      raise InputError(f"{where}: {apart[0].name} is of experts that lie apart; not handled")
    optimizers = self._optimizers()
    try:
      states = [_dict(file.tree, "optimizer_state_dict") for file in optimizers]
      (stage,) = {_stage(state) for state in states}
      models = [_dict(file.tree) for file in self._models(stage, len(states))]
      self.tensors = _tensors(stage, states, models)
      inner = "base_optimizer_state" if stage < 3 else "optimizer_state_dict"
      kept = [state.get(inner) for state in states]
      self.moments = _moments(stage, kept, states, models)
      self.count = count_of(_steps(kept)) if self.moments else 0
      self.skipped = int(models[0].get("skipped_steps") or 0)
      self.settings = _settings(kept[0]) if self.moments else []
    except (ValueError, TypeError, LookupError, AttributeError) as error:
      raise InputError(f"{where}: not what DeepSpeed writes ({error}); fetch it again") from None

  def _optimizers(self) -> list[TorchFile]:
    """Returns the files of all processes in order of rank."""
    found: dict[int, pathlib.Path] = {}
    for path in self.path.glob(OPTIMIZER_FILES):
      named = _RANK.fullmatch(path.name)
      if named is None or int(named[2]):
        raise InputError(f"{path}: of tensor-parallel devices, which are not handled")
      found[int(named[1])] = path
    if sorted(found) != list(range(len(found))) or not found:
      raise InputError(f"{self.path}: parts {sorted(found)} of {OPTIMIZER_FILES}; fetch all")
    return [TorchFile(found[rank]) for rank in range(len(found))]

  def _models(self, stage: int, number: int) -> list[TorchFile]:
    """Returns the files of names and shapes: one, or of stage 3 one for each process."""
    if stage < 3:
      return [TorchFile(self.path / "mp_rank_00_model_states.pt")]
    return [
      TorchFile(self.path / f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt")
      for rank in range(number)
    ]


def zero_folder(path: str | os.PathLike[str]) -> pathlib.Path:
  """Returns the folder in which the files lie: the one that `latest` names, or `path`."""
  folder = pathlib.Path(path)
  try:
    named = (folder / LATEST).read_text().strip()
  except (OSError, UnicodeDecodeError):
    return folder
  return folder / named if pathlib.PurePath(named).name == named else folder


def _dict(tree: Any, *names: str) -> dict[Any, Any]:
  """Returns a dict, or that of a name in it."""
  for name in names:
    tree = tree[name]
  if not isinstance(tree, dict):
    raise ValueError(f"no dict {' '.join(names)}")
  return tree


def _stage(state: dict[Any, Any]) -> int:
  """Returns the stage, a number or an enum's record of one."""
  said = state["zero_stage"]
  stage = said.arguments[0] if isinstance(said, Record) else said
  if stage not in (1, 2, 3):
    raise ValueError(f"stage {stage}")
  return stage


def _tensors(
  stage: int, states: list[dict[Any, Any]], models: list[dict[Any, Any]]
) -> dict[str, ZeroTensor]:
  """Returns all parameters: trained ones, frozen ones, and others by another name."""
  groups = _groups(models)
  if stage < 3:
    flats = [state["single_partition_of_fp32_groups"] for state in states]
    found = _by_group(groups, flats, states[0].get("param_alignment_paddings"))
  else:
    found = _by_parameter(groups, [state["fp32_flat_groups"] for state in states])
  fragments = [model.get("frozen_param_fragments") or {} for model in models]
  for name, shape in (models[0].get("frozen_param_shapes") or {}).items():
    found[str(name)] = _frozen(_shape(shape), [of[name] for of in fragments])
  for name, other in (models[0].get("shared_params") or {}).items():
    found[str(name)] = found[str(other)]
  return found


def _groups(models: list[dict[Any, Any]]) -> list[list[tuple[str, Shape]]]:
  """Returns names and shapes of the trained parameters of each group."""
  return [
    [(str(name), _shape(shape)) for name, shape in _dict(group).items()]
    for group in models[0]["param_shapes"]
  ]


def _moments(
  stage: int, kept: list[Any], states: list[dict[Any, Any]], models: list[dict[Any, Any]]
) -> dict[str, dict[str, ZeroTensor]]:
  """Returns Adam's moments, which lie as the parameters do; none where it has kept none."""
  inner = [of["state"] if isinstance(of, dict) and "state" in of else {} for of in kept]
  if not all(of and all(set(MOMENTS) <= set(group) for group in of.values()) for of in inner):
    return {}
  groups, found = _groups(models), {}
  paddings = states[0].get("param_alignment_paddings")
  for moment in MOMENTS:
    flats = [[of[at][moment] for at in range(len(groups))] for of in inner]
    found[moment] = (
      _by_group(groups, flats, paddings) if stage < 3 else _by_parameter(groups, flats)
    )
    for name, other in (models[0].get("shared_params") or {}).items():
      found[moment][str(name)] = found[moment][str(other)]
  return found


def _steps(kept: list[Any]) -> list[Any]:
  """Returns what all processes and groups say of the number of updates."""
  return [group["step"] for of in kept for group in of["state"].values()]


def count_of(said: list[Any]) -> int:
  """Returns the number of Adam's updates, which is the same wherever it is said.

  Raises:
    ValueError: It is not, or is no number of updates.
  """
  counts = {float(one.read()) if isinstance(one, TorchTensor) else float(one) for one in said}
  if len(counts) != 1 or not all(one.is_integer() and one >= 0 for one in counts):
    raise ValueError(f"parts of different steps {sorted(counts)}")
  return int(counts.pop())


def _settings(kept: Any) -> list[dict[str, Any]]:
  """Returns what is set of each group of parameters."""
  return [_dict(group) for group in kept.get("param_groups") or []]


def _shape(value: Any) -> Shape:
  if not isinstance(value, tuple) or not all(isinstance(one, int) and one >= 0 for one in value):
    raise ValueError(f"a shape {value}")
  return value


def _flat(value: Any) -> TorchTensor:
  if not isinstance(value, TorchTensor) or len(value.shape) != 1 or value.strides != (1,):
    raise ValueError("a part that is no flat tensor")
  return value


def _by_group(
  groups: list[list[tuple[str, Shape]]], flats: list[Any], paddings: Any
) -> dict[str, ZeroTensor]:
  """Returns parameters of stages 1 and 2: each group flat, cut into a part a process."""
  found = {}
  for at, group in enumerate(groups):
    parts = [_flat(of[at]) for of in flats]
    offset = 0
    for place, (name, shape) in enumerate(group):
      size = math.prod(shape)
      found[name] = ZeroTensor(shape, _pieces(parts, offset, size))
      offset += size + (int(paddings[at][place]) if paddings else 0)
  return found


def _pieces(parts: list[TorchTensor], offset: int, size: int) -> tuple[Stretch, ...]:
  """Returns where so many numbers of the parts, one after another, lie."""
  pieces, end = [], offset + size
  for part in parts:
    length = part.shape[0]
    low, high = max(offset, 0), min(end, length)
    if low < high:
      pieces.append(Stretch(part, low, high - low))
    offset, end = offset - length, end - length
  if sum(piece.size for piece in pieces) != size:
    raise ValueError("parts that end before their parameters")
  return tuple(pieces)


def _by_parameter(groups: list[list[tuple[str, Shape]]], flats: list[Any]) -> dict[str, ZeroTensor]:
  """Returns parameters of stage 3: each cut into a part a process, groups one after another."""
  found, offset, number = {}, 0, len(flats)
  each = [[_flat(part) for part in of] for of in flats]
  for name, shape in (pair for group in groups for pair in group):
    size = math.prod(shape)
    share = -(-size // number)
    pieces = [
      piece
      for rank, parts in enumerate(each)
      if (mine := min(share, size - rank * share)) > 0
      for piece in _pieces(parts, offset, mine)
    ]
    found[name] = ZeroTensor(shape, tuple(pieces))
    offset += share
  return found


def _frozen(shape: Shape, fragments: list[Any]) -> ZeroTensor:
  """Returns a parameter that is not trained: a part a process, or whole."""
  if not all(isinstance(part, TorchTensor) for part in fragments):
    raise ValueError("a frozen parameter that is no tensor")
  size = math.prod(shape)
  parts = [dataclasses.replace(part, shape=(math.prod(part.shape),), strides=(1,))
           for part in fragments]  # fmt: skip
  return ZeroTensor(shape, _pieces(parts, 0, size))
