"""Weights & Biases: one W&B run for a workdir, over all its restarts.

WANDB_MODE=offline keeps everything in WORKDIR/wandb until `wandb sync`. W&B's own environment
variables (WANDB_PROJECT, WANDB_ENTITY, ...) hold; without WANDB_PROJECT the project is `jaxmoe`.
"""

from __future__ import annotations

import json
import pathlib
import uuid
from collections.abc import Mapping
from typing import Any

from jaxmoe.core.errors import InputError
from jaxmoe.train.sinks import flatten

FINISH_S = 5.0


class WandB:
  """Logs every number of a line at its step, and longer lists as histograms.

  W&B takes no point back: a step that it has already is not sent again. After a restart that
  changes nothing, since the lines are the same; after a rollback the old points stay, and new ones
  come once the run is past the furthest step it had reached.
  """

  name = "wandb"

  def __init__(self, workdir: pathlib.Path, env: Mapping[str, str]):
    self._workdir = workdir
    self._wandb = _import()
    self._project = env.get("WANDB_PROJECT", "jaxmoe")
    self._run: Any = None
    self._reached = 0
    offline = env.get("WANDB_MODE", "online") != "online"
    if not offline and not self._wandb.login(prompt=False):
      raise InputError(
        "--sinks=wandb: nobody is logged in to W&B here; run `wandb login`, or set "
        "WANDB_MODE=offline and run `wandb sync` later"
      )

  def resume(self, step: int) -> None:
    """Starts W&B's run, or goes on with it."""
    del step
    if self._run is not None:
      return
    folder = self._workdir / "wandb"
    folder.mkdir(parents=True, exist_ok=True)
    settings = self._wandb.Settings(silent=True, console="off", finish_timeout=FINISH_S)
    self._run = self._wandb.init(
      dir=str(self._workdir),
      id=_kept_id(folder / "run_id", self._workdir.resolve().name),
      name=self._workdir.resolve().name,
      project=self._project,
      resume="allow",
      config=_config(self._workdir / "config.json"),
      settings=settings,
    )
    self._reached = self._run.step - 1  # W&B's is the next one

  def write(self, line: dict[str, Any]) -> None:
    """Logs the numbers of a line."""
    if line["step"] <= self._reached:
      return
    scalars, lists = flatten(line)
    histograms = {tag: self._wandb.Histogram(numbers) for tag, numbers in lists.items()}
    self._run.log({**scalars, **histograms}, step=line["step"])
    self._reached = line["step"]

  def close(self) -> None:
    """Waits until W&B has everything, or `FINISH_S`."""
    if self._run is not None:
      self._run.finish()
    self._run = None


def _import() -> Any:
  try:
    import wandb
  except ImportError as error:
    raise InputError(f"--sinks=wandb needs wandb ({error}); pip install 'jaxmoe[wandb]'") from None
  return wandb


def _kept_id(path: pathlib.Path, name: str) -> str:
  """Returns the id of W&B's run, made at the first start and kept in the workdir.

  Not of the path alone: another run, later or on another machine, may have the same.
  """
  if not path.exists():
    word = "".join(letter if letter.isascii() and letter.isalnum() else "-" for letter in name)
    path.write_text(f"{word[:40]}-{uuid.uuid4().hex[:8]}\n", encoding="utf-8")
  return path.read_text(encoding="utf-8").strip()


def _config(path: pathlib.Path) -> dict[str, Any]:
  """Returns the recipe of the run, if it can be read."""
  try:
    return json.loads(path.read_text(encoding="utf-8"))
  except (OSError, ValueError):
    return {}
