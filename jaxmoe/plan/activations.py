"""Activation memory of one device, and how it grows with the imbalance of experts."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import Literal

from jaxmoe.core import param_names
from jaxmoe.core.layout import Dims, Layout, Role
from jaxmoe.core.rng import Keys
from jaxmoe.core.tokens import Tokens
from jaxmoe.data.batches import NAMES
from jaxmoe.models.transformer import Decoder
from jaxmoe.moe.dispatch.capacity import Limited
from jaxmoe.moe.dispatch.dense import Dense
from jaxmoe.moe.layer import MoEConfig
from jaxmoe.optim import Masters
from jaxmoe.train.experiment import Experiment

LOADS = (1.0, 1.5, 2.0)


@dataclasses.dataclass(frozen=True)
class AtLoad:
  """A MoE layer where the busiest expert has `load` times the mean of rows.

  Attributes:
    load: The largest load over the mean.
    expert_rows: Rows that the busiest expert is sent.
    dropped: Of them, how many find no place.
    device_rows: Rows that the busiest device computes, empty ones of a fixed capacity included.
    dispatch_bytes: Of these rows as they come in, and as they go out.
    hidden_bytes: What its experts make between their products.
  """

  load: float
  expert_rows: int
  dropped: int
  device_rows: int
  dispatch_bytes: int
  hidden_bytes: int


@dataclasses.dataclass(frozen=True)
class ExpertActivations:
  """The MoE layers of one place in a pattern.

  Attributes:
    layers: How many there are.
    where: Layer group and position, `0/0`.
    num_experts: Experts that take rows.
    num_active: Choices of a token.
    dispatch: Its kind.
    experts_here: Experts on one device.
    tokens: Tokens whose rows may come to one device.
    loads: What that means at LOADS.
  """

  layers: int
  where: str
  num_experts: int
  num_active: int
  dispatch: str
  experts_here: int
  tokens: int
  loads: tuple[AtLoad, ...]


@dataclasses.dataclass(frozen=True)
class Activations:
  """What one device makes of its part of a microbatch.

  Attributes:
    rows: Rows of the batch.
    tokens: Tokens.
    stream: Bytes of the residual stream between two blocks.
    kept: Bytes that the forward pass keeps for the backward pass, casts of weights included, if
      heads, hidden units and experts were not spread over devices that see the same tokens.
    logits: Bytes of the logits that exist at a time, float32, by one chunk of the loss.
    experts: The MoE layers.
  """

  rows: int
  tokens: int
  stream: int
  kept: int
  logits: int
  experts: tuple[ExpertActivations, ...]


def activations(experiment: Experiment, decoder: Decoder, layout: Layout) -> Activations:
  """Returns what a step makes on one device, from shapes alone.

  Raises:
    InputError: the rows of a microbatch do not divide by the devices they lie on.
  """
  train, model, length = experiment.train, experiment.model, experiment.data.seq_len
  whole = (train.batch_size // train.num_micro, length, model.dim)
  dims: Dims = ("batch", "length", "embed")
  local = layout.sharding("activations", dims, whole).shard_shape(whole)
  rows, length = local[:2]
  tokens = rows * length
  columns = -(-decoder.vocab_size // _degree(layout, "params", "vocab"))
  return Activations(
    rows=rows,
    tokens=tokens,
    stream=math.prod(local) * decoder.dtype.itemsize,
    kept=kept_bytes(decoder, experiment.masters(decoder), rows, length),
    logits=min(model.loss_chunk, tokens) * columns * 4,
    experts=tuple(
      _experts(decoder, s, j, layout, tokens)
      for s, places in decoder.moe_layers().items()
      for j in places
    ),
  )


def kept_bytes(decoder: Decoder, masters: Masters, rows: int, length: int) -> int:
  """Returns what the backward pass of (rows, length) tokens needs besides parameters and batch."""
  batch = {name: jax.ShapeDtypeStruct((rows, length), jnp.int32) for name in NAMES}

  def kept(params: Any, batch: Any) -> list[jax.Array]:
    def loss(params: Any) -> jax.Array:
      keys = Keys.from_seed(0)
      hidden_BLD, _, _ = decoder.hidden(params, Tokens.of_batch(batch), keys=keys)
      return jnp.sum(decoder.nll(params, hidden_BLD, batch["labels"]))

    return jax.tree.leaves(jax.vjp(loss, params)[1])

  params = masters.shapes(decoder.shapes, decoder.layer_groups)
  traced = jax.make_jaxpr(kept)(params, batch).jaxpr
  given = set(traced.invars)
  made = {var for var in traced.outvars if not isinstance(var, Literal) and var not in given}
  return sum(math.prod(var.aval.shape) * var.aval.dtype.itemsize for var in made)


def hidden_width(decoder: Decoder, s: str, j: str) -> int:
  """Returns how many hidden values a row has in its expert, products before a gate included.

  Of experts of several kinds, the most.
  """
  path = f"stack/{s}/{j}/moe/experts/"
  shapes = param_names.flatten(decoder.shapes)
  widths: dict[str, int] = {}
  for name, dims in param_names.flatten(jax.tree.map(str, decoder.dims, is_leaf=_is_dims)).items():
    if name.startswith(path) and "'expert'" in dims and "'mlp'" in dims and "'embed'" in dims:
      kind = name.rpartition("/")[0]
      outer = shapes[name].shape[0] * shapes[name].shape[1] * decoder.config.dim
      widths[kind] = widths.get(kind, 0) + shapes[name].size // outer
  return max(widths.values(), default=0)


def _is_dims(node: Any) -> bool:
  return isinstance(node, tuple)


@dataclasses.dataclass(frozen=True)
class _Place:
  """A MoE layer on one device: experts in all and here, tokens of a device, devices that send."""

  moe: MoEConfig
  num_experts: int
  here: int
  tokens: int
  groups: int
  row_bytes: int
  hidden_bytes: int

  def at(self, load: float) -> AtLoad:
    """Returns rows and bytes at a load."""
    tokens, dispatch, active = self.tokens * self.groups, self.moe.dispatch, self.moe.num_active
    mean, dropped = tokens * active / self.num_experts, 0
    busiest = min(round(load * mean), tokens)
    if isinstance(dispatch, Limited):
      idle = self.moe.num_routable - self.num_experts
      room = self.groups * dispatch.rows_per_expert(self.tokens, active, self.num_experts, idle)
      rows, dropped = self.here * room, max(busiest - room, 0)
    elif isinstance(dispatch, Dense):
      rows = self.here * tokens
    elif self.here == self.num_experts:
      rows = tokens * active  # however they are spread over the experts
    else:
      rows = min(round(load * mean * self.here), tokens * min(active, self.here))
    return AtLoad(
      load, busiest, dropped, rows, 2 * rows * self.row_bytes, rows * self.hidden_bytes
    )


def _experts(decoder: Decoder, s: str, j: str, layout: Layout, tokens: int) -> ExpertActivations:
  """Returns what is made in the MoE layers of one place in a pattern."""
  group = decoder.config.stack[int(s)]
  moe = decoder.moe_layers()[s][j]
  num_experts = moe.num_routable - moe.experts.num_zero_compute(moe.num_experts)
  spread, size = _axes(layout, "params", "expert"), decoder.dtype.itemsize
  by_tokens = _axes(layout, "activations", "batch") & spread
  place = _Place(
    moe=moe,
    num_experts=num_experts,
    here=-(-num_experts // _product(layout, spread)),
    tokens=tokens,
    groups=_product(layout, by_tokens),
    row_bytes=decoder.config.dim * size,
    hidden_bytes=hidden_width(decoder, s, j) * size // _degree(layout, "params", "mlp"),
  )
  return ExpertActivations(
    layers=group.repeats,
    where=f"{s}/{j}",
    num_experts=num_experts,
    num_active=moe.num_active,
    dispatch=type(moe.dispatch).__name__.lower(),
    experts_here=place.here,
    tokens=tokens * place.groups,
    loads=tuple(place.at(load) for load in LOADS),
  )


def _axes(layout: Layout, role: Role, dim: str) -> set[str]:
  """Returns the mesh axes of a logical dim alone."""
  axes = layout.spec(role, (dim,))[0]
  return {axes} if isinstance(axes, str) else set(axes or ())


def _product(layout: Layout, axes: set[str]) -> int:
  return math.prod(layout.mesh.shape[axis] for axis in axes)


def _degree(layout: Layout, role: Role, dim: str) -> int:
  return _product(layout, _axes(layout, role, dim))
