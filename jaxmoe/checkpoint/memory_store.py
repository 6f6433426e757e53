"""A store in the memory of this process: for tests, and for trying out a loop."""

import json
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np

from jaxmoe.checkpoint.digest import launch_digest
from jaxmoe.checkpoint.manifest import (
  Manifest,
  check_digests,
  check_requested,
  make_manifest,
  parse_manifest,
)
from jaxmoe.checkpoint.step_reader import StepReader
from jaxmoe.checkpoint.store import DAMAGED, Arrays, LazyArray, Record, nothing
from jaxmoe.core.errors import CheckpointError, InputError


class MemoryStore:
  """A store whose steps are copies on the host; they are gone when the process ends.

  One process only: it holds whole arrays.
  """

  def __init__(self, keep: int = 3):
    if keep < 1:
      raise InputError(f"a store must keep at least one step, got {keep=}")
    self._keep = keep
    self._held: dict[int, tuple[str, dict[str, np.ndarray]]] = {}
    self._aside: dict[str, tuple[str, dict[str, np.ndarray]]] = {}

  def __str__(self) -> str:
    return "memory"

  def write(self, step: int, arrays: Mapping[str, jax.Array], record: Record) -> None:
    """Copies a step; blocks while it does."""
    if self._held and step <= max(self._held):
      raise InputError(f"steps are written in order: {step} after {max(self._held)}")
    manifest = make_manifest(record, arrays, launch_digest(arrays))
    # np.array copies: a view would keep the array from being donated, for as long as it is held.
    self._held[step] = json.dumps(manifest.to_json()), {k: np.array(x) for k, x in arrays.items()}
    for old in self.steps()[: -self._keep]:
      del self._held[old]

  def write_streamed(
    self,
    step: int,
    arrays: Mapping[str, LazyArray],
    record: Record,
    alive: Callable[[str], None] = nothing,
  ) -> None:
    """Copies a step, of which all is in memory anyway."""
    made = {}
    for name, lazy in arrays.items():
      made[name] = jnp.asarray(lazy.make())
      alive(name)
    self.write(step, made, record)

  def read(
    self, step: int, like: Mapping[str, jax.ShapeDtypeStruct], under: str = ""
  ) -> tuple[Arrays, Record]:
    """Returns the arrays and the record of a step, every bit as it was written."""
    manifest, where = self._manifest(step), f"step {step} in {self}"
    held = self._held[step][1]
    check_requested(manifest, like, under, where)
    arrays = {name: jax.device_put(held[name], x.sharding) for name, x in like.items()}
    check_digests(manifest, arrays, where)
    return arrays, manifest.record

  def open_step(self, step: int) -> StepReader:
    """Returns what reads a step array by array."""
    manifest = self._manifest(step)
    return StepReader(manifest, f"step {step} in {self}", self._held[step][1].__getitem__)

  def contents(self, step: int) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns shape and dtype of the arrays of a step by name."""
    return self._manifest(step).shapes()

  def steps(self) -> list[int]:
    """Returns the steps held and not set aside, oldest first."""
    return sorted(self._held)

  def wait(self) -> None:
    """Returns at once: writes are not asynchronous here."""

  def set_aside(self, step: int, why: str, kind: str = DAMAGED) -> None:
    """Moves a step to where it never counts again."""
    self._aside[f"{step}.{kind}.{len(self._aside)}"] = self._held.pop(step)

  def aside(self) -> list[str]:
    """Returns the names of what was set aside as damaged."""
    return [name for name in self._aside if f".{DAMAGED}" in name]

  def unremoved(self) -> dict[int, str]:
    """Returns nothing: memory lets go of what it is told to."""
    return {}

  def close(self) -> None:
    """Forgets everything."""
    self._held.clear()
    self._aside.clear()

  def _manifest(self, step: int) -> Manifest:
    if step not in self._held:
      raise CheckpointError(f"there is no step {step} in {self}, only {self.steps()}")
    return parse_manifest(json.loads(self._held[step][0]), f"step {step} in {self}")
