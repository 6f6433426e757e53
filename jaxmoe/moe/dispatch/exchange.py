"""Expert parallelism (EP): rows reach experts on other devices by all-to-all, in `shard_map`.

An all-to-all exchange wraps the experts: a dispatcher makes rows in order of slot as on one device,
calls experts that happen to be elsewhere, and combines what comes back. So every dispatcher works
with it, routing and drops are decided where the tokens are, and experts that compute nothing, which
have no slot, send no rows.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jaxmoe.core.backends import Chooser
from jaxmoe.core.config_io import added
from jaxmoe.core.decimals import decimal
from jaxmoe.core.errors import InputError
from jaxmoe.core.weight_formats import Groups
from jaxmoe.moe.dispatch import row_exchange
from jaxmoe.moe.dispatch.capacity import Limited
from jaxmoe.moe.dispatch.device_group import DeviceGroup
from jaxmoe.moe.dispatch.dispatcher import Counts, DispatchContext, Dispatcher, TokenTransport
from jaxmoe.moe.dispatch.dropless import Dropless
from jaxmoe.moe.dispatch.plan import ExpertFunction, Uniform, place_choices
from jaxmoe.moe.routing import Routing


@dataclasses.dataclass(frozen=True)
class Exchange(TokenTransport):
  """The base of exchanges; one overrides the call."""

  def __call__(
    self,
    dispatch: Dispatcher,
    x_TD: jax.Array,
    routing: Routing,
    experts: ExpertFunction,
    context: DispatchContext,
    group: DeviceGroup,
  ) -> tuple[jax.Array, Counts]:
    """Returns what `dispatch` would with all experts here, (T, D), and the counts."""
    raise NotImplementedError


@dataclasses.dataclass(frozen=True)
class AllToAll(Exchange):
  """Each row goes to the device of its expert and comes back.

  A dispatcher of capacity sends C rows an expert, whoever they are for. A dropless one sends
  buffers of rows for a device: all its T * A rows would fit unless `bound` says how many may.

  Attributes:
    bound: Rows of one device's tokens for another device, as a multiple of the mean T * A / e; the
      last tokens' choices beyond are dropped and counted as `exchange`. None for no bound: nothing
      is dropped, and buffers are e times the mean.
    chunks: Pieces in which rows travel, so that one can be computed while the next is under way;
      routing is that of the whole batch.
    two_level: Whether to exchange within the innermost axis first, then across the others.
    max_drop_rate: Share of a layer's choices above which drops end the run; 0 allows none.
    exact: As in `Limited`, of `bound`.
  """

  bound: float | None = None
  chunks: int = 1
  two_level: bool = False
  max_drop_rate: float = 1.0
  exact: bool = added(True, before=False)

  def __post_init__(self) -> None:
    if self.bound is not None and self.bound <= 0:
      raise InputError(f"bound must be above 0: bound={self.bound}; or none for no bound")
    if not 0 <= self.max_drop_rate <= 1:
      raise InputError(f"max_drop_rate must lie in [0, 1]: max_drop_rate={self.max_drop_rate}")
    if self.chunks < 1:
      raise InputError(f"chunks must be at least 1: chunks={self.chunks}")

  @property
  def depends_on_shard(self) -> bool:
    """Whether a token's rows differ with the tokens that lie on one device with it."""
    return self.bound is not None

  @property
  def drop_limit(self) -> float:
    """The share of a layer's choices above which drops end the run."""
    return self.max_drop_rate

  def __call__(
    self,
    dispatch: Dispatcher,
    x_TD: jax.Array,
    routing: Routing,
    experts: ExpertFunction,
    context: DispatchContext,
    group: DeviceGroup,
  ) -> tuple[jax.Array, Counts]:
    """As every exchange."""
    num_rows = self.rows_per_device(routing.expert_TA.size, group.size)
    lost: dict[str, jax.Array] = {}
    if isinstance(dispatch, Dropless):
      routing, lost = self.admit(routing, group.size)
    remote = RemoteExperts(
      experts, self, group, num_rows, dispatch, routing.scores_TE.shape[1], context.chooser
    )
    y_TD, counts = dispatch(x_TD, routing, remote, context)
    return y_TD, Counts(counts.dropped | lost, counts.spilled)

  def admit(self, routing: Routing, devices: int) -> tuple[Routing, dict[str, jax.Array]]:
    """Returns the routing of the choices that find room in buffers, and how many do not."""
    num_rows = self.rows_per_device(routing.expert_TA.size, devices)
    if num_rows == routing.expert_TA.size:
      return routing, {}
    admitted, lost = _admit(routing, num_rows, devices)
    return admitted, {"exchange": lost}

  def rows_per_device(self, choices: int, devices: int) -> int:
    """Returns how many rows of `choices` a buffer for another device has."""
    if self.bound is None:
      return choices
    bound = decimal(self.bound) if self.exact else self.bound
    return min(choices, max(1, math.ceil(bound * choices / devices)))


def _admit(routing: Routing, num_rows: int, devices: int) -> tuple[Routing, jax.Array]:
  """Returns the routing of the first `num_rows` choices for each device, and how many it leaves."""
  per_device = routing.scores_TE.shape[1] // devices
  by_device = dataclasses.replace(
    routing,
    expert_TA=routing.expert_TA // per_device,
    scores_TE=routing.scores_TE[:, :devices],
  )
  place_TA, _ = place_choices(by_device)
  # A token may have several choices on a device, which follow each other.
  device_TA = by_device.expert_TA
  earlier_TAA = jnp.tri(device_TA.shape[1], k=-1, dtype=bool)[None] & routing.valid_TA[:, None]
  same_TAA = device_TA[:, :, None] == device_TA[:, None, :]
  place_TA = place_TA + jnp.sum(same_TAA & earlier_TAA, axis=2, dtype=jnp.int32)
  valid_TA = routing.valid_TA & (place_TA < num_rows)
  lost = jnp.sum((routing.valid_TA & ~valid_TA).astype(jnp.float32))
  return dataclasses.replace(routing, valid_TA=valid_TA), lost


@dataclasses.dataclass(frozen=True)
class RemoteExperts:
  """Experts of a group of devices, called like those of one: rows in order of slot, in and out.

  Attributes:
    experts: Those on this device.
    exchange: How rows travel.
    group: The devices.
    num_rows: C, rows of a buffer for another device, where groups are ragged.
    dispatch: What brings rows to experts here, where groups are ragged.
    num_experts: E, of all devices together.
    chooser: What chooses back ends.
  """

  experts: Any
  exchange: AllToAll
  group: DeviceGroup
  num_rows: int
  dispatch: Dispatcher
  num_experts: int
  chooser: Chooser

  def __call__(self, rows_RD: jax.Array, groups: Groups) -> jax.Array:
    """Returns (R, D) for rows in order of their slot."""
    if isinstance(groups, Uniform):
      return self._uniform(rows_RD, groups)
    return self._ragged(rows_RD, groups)

  def _uniform(self, rows_RD: jax.Array, groups: Uniform) -> jax.Array:
    """Sends the C rows of every slot (GShard, Lepikhin et al. 2020, section 3.2)."""
    devices, capacity = self.group.size, groups.rows_per_slot
    rows_eSCD = rows_RD.reshape(devices, -1, capacity, rows_RD.shape[1])
    outs = []
    for start, stop in row_exchange.spans(capacity, self.exchange.chunks):
      with jax.named_scope("send"):
        part_eSCD = self._send(rows_eSCD[:, :, start:stop])
        values = {
          name: self._send(_by_slot(value_R, devices, capacity)[:, :, start:stop])
          for name, value_R in groups.values.items()
        }
      slots, rows = part_eSCD.shape[1:3]
      sizes_S = jnp.full(slots, devices * rows, jnp.int32)
      known = {name: _by_row(value_eSC) for name, value_eSC in values.items()}
      out_RD = self.experts(_by_row(part_eSCD), Uniform(sizes_S, devices * rows, known))
      out_eSCD = out_RD.reshape(slots, devices, rows, -1).swapaxes(0, 1)
      with jax.named_scope("return"):
        outs.append(self._send(out_eSCD))
    return jnp.concatenate(outs, axis=2).reshape(rows_RD.shape[0], -1)

  def _send(self, parts_eF: jax.Array) -> jax.Array:
    """Returns what each device has for this one, of what this one has for each."""
    return self.group.all_to_all(parts_eF, self.exchange.two_level)

  def _ragged(self, rows_RD: jax.Array, groups: Groups) -> jax.Array:
    """Sends what each slot has, at most C rows for each device."""
    exchange, sizes_eS = self.exchange, groups.sizes_S.reshape(self.group.size, -1)
    with jax.named_scope("send"):
      there_eS = self.group.all_to_all(sizes_eS)
    sizes = {"R": rows_RD.shape[0], "D": rows_RD.shape[1], "C": self.num_rows}
    asked = {"pieces": exchange.chunks > 1, "two levels": exchange.two_level}
    features = [name for name, wanted in asked.items() if wanted]
    carry = self.chooser.choose("exchange", row_exchange.BACKENDS, rows_RD.dtype, sizes, features)
    route = row_exchange.Route(
      self.group, self.num_rows, exchange.chunks, exchange.two_level, sizes_eS, there_eS
    )
    return carry(route, rows_RD, groups.values, self.here)

  def here(
    self,
    rows_eCD: jax.Array,
    values: Mapping[str, jax.Array],
    sizes_eS: jax.Array,
    start: int,
  ) -> jax.Array:
    """Returns (e, C, D): what this device's experts make of rows `start`... of every device."""
    devices, capacity = rows_eCD.shape[:2]
    ends_eS = jnp.cumsum(sizes_eS, axis=1)
    place_C = start + jnp.arange(capacity)
    past_eCS = place_C[None, :, None] >= ends_eS[:, None, :]
    slot_R1 = jnp.sum(past_eCS, axis=2, dtype=jnp.int32).reshape(-1, 1)
    valid_R1 = slot_R1 < sizes_eS.shape[1]
    rows_RD = rows_eCD.reshape(devices * capacity, -1)
    ones_R1 = jnp.ones(slot_R1.shape, jnp.float32)
    routing = Routing(
      expert_TA=jnp.where(valid_R1, slot_R1, 0),
      weight_TA=ones_R1,
      valid_TA=valid_R1,
      scores_TE=jnp.zeros((rows_RD.shape[0], sizes_eS.shape[1])),
      log_z_T=ones_R1[:, 0],
      values={name: value.reshape(-1, *value.shape[2:]) for name, value in values.items()},
      among=self.num_experts,  # few of the rows are there: back ends size buffers by it
    )
    context = DispatchContext(chooser=self.chooser)
    y_RD, _ = self.dispatch(rows_RD, routing, self.experts, context)
    return y_RD.reshape(devices, capacity, -1)


def _by_slot(leaf_R: jax.Array, devices: int, capacity: int) -> jax.Array:
  """Returns (e, S, C, ...) of values of rows in order of slot."""
  return leaf_R.reshape(devices, -1, capacity, *leaf_R.shape[1:])


def _by_row(leaf_eSC: jax.Array) -> jax.Array:
  """Returns (S * e * C, ...): values by row, in order of slot, of what e devices sent."""
  leaf_SR = leaf_eSC.swapaxes(0, 1)
  return leaf_SR.reshape(-1, *leaf_SR.shape[3:])


@dataclasses.dataclass(frozen=True)
class AllGather(Exchange):
  """Every device gets the tokens of all and computes its experts' part for each; parts are summed.

  O(e * T * D) bytes whatever the number of choices, and no buffers that overflow: good where A is
  not far below e. A dispatcher of capacity decides by its own device's tokens, as elsewhere.
  """

  def __call__(
    self,
    dispatch: Dispatcher,
    x_TD: jax.Array,
    routing: Routing,
    experts: ExpertFunction,
    context: DispatchContext,
    group: DeviceGroup,
  ) -> tuple[jax.Array, Counts]:
    """As every exchange."""
    admitted, counts = dispatch.admit(routing, context)
    inner = Dropless() if isinstance(dispatch, Limited) else dispatch
    with jax.named_scope("send"):
      x_GD = group.gather(x_TD)
      expert_GA, weight_GA, valid_GA = (
        group.gather(leaf) for leaf in (admitted.expert_TA, admitted.weight_TA, admitted.valid_TA)
      )
      values = {name: group.gather(value_T) for name, value_T in routing.values.items()}
    num_experts = routing.scores_TE.shape[1]
    here = num_experts // group.size
    first = group.index() * here
    valid_GA = valid_GA & (expert_GA >= first) & (expert_GA < first + here)
    chosen = Routing(
      expert_TA=jnp.where(valid_GA, expert_GA - first, 0),
      weight_TA=weight_GA,
      valid_TA=valid_GA,
      scores_TE=jnp.zeros((x_GD.shape[0], here)),
      log_z_T=jnp.zeros(x_GD.shape[0]),
      values=values,
      among=num_experts,
    )
    y_GD, _ = inner(x_GD, chosen, experts, DispatchContext(chooser=context.chooser))
    with jax.named_scope("return"):
      return group.scatter(y_GD), counts
