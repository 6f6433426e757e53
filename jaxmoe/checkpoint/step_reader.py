"""A step that is read array by array on the host, without a layout and one at a time in memory."""

import dataclasses
from collections.abc import Callable

import jax.numpy as jnp
import numpy as np

from jaxmoe.checkpoint.digest import digest
from jaxmoe.checkpoint.manifest import DamagedStepError, Manifest


@dataclasses.dataclass(frozen=True)
class StepReader:
  """What a step holds, and its arrays one by one.

  Attributes:
    manifest: Its record, and shape, dtype and digest of every array.
    where: The step, in errors.
    fetch: Returns an array as it lies in the store; raises as `Store.read` does.
  """

  manifest: Manifest
  where: str
  fetch: Callable[[str], np.ndarray]

  def read(self, name: str) -> np.ndarray:
    """Returns an array, every bit as it was written.

    Raises:
      DamagedStepError: it is missing, cannot be read, or has another digest than was written.
      CheckpointError: it cannot be read at present.
    """
    entry = self.manifest.arrays[name]
    shape, dtype = entry.shape, jnp.dtype(entry.dtype)
    array = self.fetch(name) if np.prod(shape) else np.zeros(shape, dtype)
    if (array.shape, array.dtype) != (shape, dtype):
      found, written = f"{array.dtype}{list(array.shape)}", f"{dtype}{list(shape)}"
      raise DamagedStepError(f"{self.where}: {name} is {found}, {written} was written")
    if digest({name: jnp.asarray(array)})[name] != entry.words:
      raise DamagedStepError(f"{self.where}: other values than were written in {name}")
    return array
