"""Universal folders of DeepSpeed: a folder for each parameter, with it and its moments, whole.

`zero/NAME/fp32.pt`, `exp_avg.pt` and `exp_avg_sq.pt` hold them, of stages 1 and 2 in their shape
under `param`, of stage 3 flat, with the shapes in `*_model_states.pt`. The number of updates is in
`zero/NAME/step.pt` or, of stage 3, in `zero/optimizer_state.pt`. Nothing in a file is run.
"""

from __future__ import annotations

import dataclasses
import math
import os
import pathlib
from typing import Any

from jaxmoe.checkpoint.deepspeed_zero import (
  MOMENTS,
  Shape,
  Stretch,
  TrainedFolder,
  ZeroTensor,
  count_of,
)
from jaxmoe.checkpoint.torch_file import TorchFile, TorchTensor
from jaxmoe.core.errors import InputError

LATEST, WEIGHTS = "latest_universal", "zero/*/fp32.pt"


class UniversalFolder(TrainedFolder):
  """A folder that DeepSpeed's `ds_to_universal` wrote."""

  def __init__(self, path: str | os.PathLike[str]):
    """Reads what is in the files but for numbers.

    Args:
      path: The folder with `zero`, or the one above with `latest_universal`, which names it.

    Raises:
      InputError: A file is missing or damaged.
    """
    self.path = universal_folder(path)
    names = sorted(file.parent.name for file in self.path.glob(WEIGHTS))
    models = sorted(self.path.glob("*model_states.pt"))
    if not names or not models:
      raise InputError(f"{self.path}: no {WEIGHTS} or no *model_states.pt; fetch all")
    try:
      model = TorchFile(models[0]).tree
      groups = model["param_shapes"]
      shapes = {str(name): shape for group in groups for name, shape in group.items()}
      shared = {str(name): str(of) for name, of in (model.get("shared_params") or {}).items()}
      self.tensors = {name: self._tensor(name, "fp32", shapes) for name in names}
      missing = sorted(shapes.keys() - self.tensors.keys() - shared.keys())
      if missing:
        raise InputError(f"{self.path}: no zero/{missing[0]}/fp32.pt; fetch all")
      self._read_adam(names, shapes)
      self.skipped = int(model.get("skipped_steps") or 0)
      for of in (self.tensors, *self.moments.values()):
        of.update({name: of[other] for name, other in shared.items()})
    except (ValueError, TypeError, LookupError, AttributeError) as error:
      raise InputError(
        f"{self.path}: not what DeepSpeed writes ({error}); fetch it again"
      ) from None

  def _read_adam(self, names: list[str], shapes: dict[str, Any]) -> None:
    """Reads moments, counts and settings, where there are any."""
    self.moments, self.count, self.settings = {}, 0, []
    if not any(self._file(name, MOMENTS[1]).exists() for name in names):
      return
    rest = TorchFile(self.path / "zero" / "optimizer_state.pt").tree
    inner = rest.get("optimizer_state_dict") or {}
    self.moments = {
      moment: {name: self._tensor(name, moment, shapes) for name in names} for moment in MOMENTS
    }
    files = [self._file(name, "step") for name in names]
    said = [TorchFile(file).tree for file in files if file.exists()]
    self.count = count_of(said or [one["step"] for one in inner["state"].values()])
    self.settings = list(rest.get("param_groups") or inner.get("param_groups") or [])

  def _file(self, name: str, what: str) -> pathlib.Path:
    return self.path / "zero" / name / f"{what}.pt"

  def _tensor(self, name: str, what: str, shapes: dict[str, Any]) -> ZeroTensor:
    """Returns a parameter or a moment, whose numbers lie in one piece."""
    tree = TorchFile(self._file(name, what)).tree
    found = tree["param"] if isinstance(tree, dict) else tree
    if not isinstance(found, TorchTensor):
      raise ValueError(f"{name}/{what}.pt without a tensor")
    shape: Shape = found.shape if isinstance(tree, dict) else tuple(shapes[name])
    size = math.prod(shape)
    steps = tuple(math.prod(found.shape[at + 1 :]) for at in range(len(found.shape)))
    if found.strides != steps or math.prod(found.shape) != size:
      raise ValueError(f"{name}/{what}.pt of {found.shape}, not {shape}")
    flat = dataclasses.replace(found, shape=(size,), strides=(1,))
    return ZeroTensor(shape, (Stretch(flat, 0, size),))


def universal_folder(path: str | os.PathLike[str]) -> pathlib.Path:
  """Returns the folder in which the files lie: that which `latest_universal` names, or `path`."""
  folder = pathlib.Path(path)
  try:
    named = (folder / LATEST).read_text().strip()
  except (OSError, UnicodeDecodeError):
    return folder
  return folder / named if pathlib.PurePath(named).name == named else folder
