"""Rows of a dropless plan to the devices of their experts and back: what goes over the wire.

A back end is `(route, rows_RD, values, here) -> out_RD`: rows in order of slot, and what is known
of the token of each by name; `here(rows_eCD, values, sizes_eS, start)` is what this device's
experts make of rows `start`... of every device.

Sizes of a need: R, D and C, the rows of a buffer for a device; features: `pieces`, `two levels`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp

from jaxmoe.core.backends import Backend, limited
from jaxmoe.moe.dispatch.device_group import DeviceGroup

Here = Callable[[jax.Array, Mapping[str, jax.Array], jax.Array, int], jax.Array]


@dataclasses.dataclass(frozen=True)
class Route:
  """Which rows go where.

  Attributes:
    group: The devices.
    num_rows: C, rows of a buffer for another device.
    chunks: Pieces in which rows travel.
    two_level: Whether they go within the innermost axis first.
    sizes_eS: int32, the rows that this device has for the slots of each.
    there_eS: int32, those that each device has for the slots of this one.
  """

  group: DeviceGroup
  num_rows: int
  chunks: int
  two_level: bool
  sizes_eS: jax.Array
  there_eS: jax.Array

  @property
  def count_e(self) -> jax.Array:
    """int32, the rows that this device has for each."""
    return jnp.sum(self.sizes_eS, axis=1)

  @property
  def first_e(self) -> jax.Array:
    """int32, the first of them."""
    return jnp.cumsum(self.count_e) - self.count_e


def padded(
  route: Route, rows_RD: jax.Array, values: Mapping[str, jax.Array], here: Here
) -> jax.Array:
  """Sends a buffer of C rows for each device, whatever is in it."""
  devices, capacity = route.group.size, route.num_rows
  count_e, first_e = route.count_e, route.first_e
  place_C = jnp.arange(capacity)
  used_eC = place_C[None] < count_e[:, None]
  row_eC = jnp.where(used_eC, first_e[:, None] + place_C[None], rows_RD.shape[0])

  def sent(leaf_RF: jax.Array, at_eC: jax.Array) -> jax.Array:
    part_eCF = leaf_RF.at[at_eC].get(mode="fill", fill_value=0)
    return route.group.all_to_all(part_eCF, route.two_level)

  outs = []
  for start, stop in spans(capacity, route.chunks):
    at_eC = row_eC[:, start:stop]
    with jax.named_scope("send"):
      rows_eCD = sent(rows_RD, at_eC)
      known = {name: sent(value_R, at_eC) for name, value_R in values.items()}
    out_eCD = here(rows_eCD, known, route.there_eS, start)
    with jax.named_scope("return"):
      outs.append(route.group.all_to_all(out_eCD, route.two_level))
  out_FD = jnp.concatenate(outs, axis=1).reshape(devices * capacity, -1)
  row_R = jnp.arange(rows_RD.shape[0])
  device_R = jnp.searchsorted(jnp.cumsum(count_e), row_R, side="right")
  at_R = device_R * capacity + row_R - first_e[jnp.minimum(device_R, devices - 1)]
  at_R = jnp.where(device_R < devices, at_R, devices * capacity)
  return out_FD.at[at_R].get(mode="fill", fill_value=0)


def ragged(
  route: Route, rows_RD: jax.Array, values: Mapping[str, jax.Array], here: Here
) -> jax.Array:
  """Does what `padded` does with buffers of which only used rows travel."""
  group, capacity = route.group, route.num_rows
  devices, count_e, first_e = group.size, route.count_e, route.first_e
  mine_e = jnp.full(devices, group.index() * capacity, jnp.int32)
  come_e = jnp.sum(route.there_eS, axis=1)

  def sent(leaf_RF: jax.Array) -> jax.Array:
    buffer_F = jnp.zeros((devices * capacity, *leaf_RF.shape[1:]), leaf_RF.dtype)
    leaf_F = jax.lax.ragged_all_to_all(
      leaf_RF, buffer_F, first_e, count_e, mine_e, come_e, axis_name=group.axes
    )
    return leaf_F.reshape(devices, capacity, *leaf_RF.shape[1:])

  with jax.named_scope("send"):
    rows_eCD, known = sent(rows_RD), {name: sent(value_R) for name, value_R in values.items()}
  out_eCD = here(rows_eCD, known, route.there_eS, 0)
  start_e = jnp.arange(devices, dtype=jnp.int32) * capacity
  with jax.named_scope("return"):
    back_e = group.all_to_all(first_e)  # where each device wants its rows back
    return jax.lax.ragged_all_to_all(
      out_eCD.reshape(devices * capacity, -1),
      jnp.zeros_like(rows_RD),
      start_e,
      come_e,
      back_e,
      count_e,
      axis_name=group.axes,
    )


def spans(size: int, chunks: int) -> list[tuple[int, int]]:
  """Returns (start, stop) of at most `chunks` pieces of `size`, the last ones maybe shorter."""
  step = -(-size // chunks)
  return [(start, min(start + step, size)) for start in range(0, size, step)]


BACKENDS: dict[str, Backend] = {
  "padded": Backend(padded),
  # XLA has no such collective for CPUs.
  "ragged": Backend(ragged, limited(("tpu", "gpu"), features=())),
}
