"""A group of devices over which experts are spread, and its collectives (all-to-all,
all-gather)."""

from __future__ import annotations

import dataclasses
import math

import jax


@dataclasses.dataclass(frozen=True)
class DeviceGroup:
  """The devices over which experts are spread: mesh axes, outermost first, and their degrees."""

  axes: tuple[str, ...]
  degrees: tuple[int, ...]

  @property
  def size(self) -> int:
    """e, how many devices there are."""
    return math.prod(self.degrees)

  def index(self) -> jax.Array:
    """Returns which of them this device is."""
    return jax.lax.axis_index(self.axes)

  def all_to_all(self, parts_eF: jax.Array, two_level: bool = False) -> jax.Array:
    """Returns part i of device d as part d of device i; (e, ...) in and out.

    On two levels rows first go to the right place within the innermost axis, then across the
    others: every message between far devices carries what all near ones send there. The same
    bytes leave a device on each level.
    """
    if len(self.axes) == 1 or not two_level:
      return jax.lax.all_to_all(parts_eF, self.axes, split_axis=0, concat_axis=0, tiled=True)
    near, far = self.degrees[-1], self.size // self.degrees[-1]
    parts = parts_eF.reshape(far, near, *parts_eF.shape[1:])
    parts = jax.lax.all_to_all(parts, self.axes[-1], split_axis=1, concat_axis=1, tiled=True)
    parts = jax.lax.all_to_all(parts, self.axes[:-1], split_axis=0, concat_axis=0, tiled=True)
    return parts.reshape(parts_eF.shape)

  def gather(self, x_tF: jax.Array) -> jax.Array:
    """Returns the tokens of all devices."""
    return jax.lax.all_gather(x_tF, self.axes, axis=0, tiled=True)

  def scatter(self, y_TF: jax.Array) -> jax.Array:
    """Returns the sum over devices for this device's own tokens."""
    return jax.lax.psum_scatter(y_TF, self.axes, scatter_dimension=0, tiled=True)
