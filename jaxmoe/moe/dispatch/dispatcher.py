"""Dispatchers' base: a Routing becomes outputs of experts, with every drop counted.

A dispatcher is a frozen record derived from `Dispatcher`. It says by a `plan` which rows the
experts see, or overrides `run` with a form that equals one. Where experts have replicas, a
dispatcher sees slots: each is an expert to it, whose weights are those of the expert it holds.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax

from jaxmoe.core.backends import HERE, Chooser
from jaxmoe.core.errors import InputError
from jaxmoe.core.rng import Keys
from jaxmoe.moe.dispatch.placement import deal, weights_of_slots
from jaxmoe.moe.dispatch.plan import ExpertFunction, Plan, through_rows
from jaxmoe.moe.routing import Routing


@dataclasses.dataclass(frozen=True)
class DispatchContext:
  """What a dispatcher is told beside the routing, whose experts may be a part of the layer's.

  Attributes:
    others: How many slots of other parts take rows too.
    idle: How many experts of the layer take none.
    slots: The expert of each slot; empty where each expert has one, in order.
    keys: Randomness of the forward pass; None where there is none.
    chooser: What chooses back ends.
  """

  others: int = 0
  idle: int = 0
  slots: tuple[int, ...] = ()
  keys: Keys | None = None
  chooser: Chooser = HERE


WHOLE = DispatchContext()
"""A layer of one kind of experts, one slot each, no randomness."""


class Counts(NamedTuple):
  """Float32 numbers of choices, by reason: without a row, and with one of another expert."""

  dropped: dict[str, jax.Array]
  spilled: dict[str, jax.Array]


@dataclasses.dataclass(frozen=True)
class TokenTransport:
  """What hands rows on, to experts or to devices; the base loses none."""

  @property
  def depends_on_shard(self) -> bool:
    """Whether a token's rows differ with the tokens that lie on one device with it."""
    return False

  @property
  def drop_limit(self) -> float:
    """The share of a layer's choices above which drops end the run."""
    return 1.0


@dataclasses.dataclass(frozen=True)
class Dispatcher(TokenTransport):
  """The base of dispatchers; one overrides `plan` or `run`."""

  @property
  def looks_ahead(self) -> bool:
    """Whether a later token may take away the row of an earlier one."""
    return False

  def check_causal(self) -> None:
    """Refuses to serve a causal model where a later token may change an earlier one's rows.

    Raises:
      InputError: what, why and the cure in one line.
    """
    if self.looks_ahead and not getattr(self, "allow_future", False):
      raise InputError(
        f"a causal model cannot drop a token's choice for a later one's when it generates: {self}; "
        "set allow_future=true to train with it all the same, or overflow=position"
      )

  def admit(self, routing: Routing, context: DispatchContext = WHOLE) -> tuple[Routing, Counts]:
    """Returns the routing in which just the choices that get a row are valid, and the counts."""
    del context
    return routing, Counts({}, {})

  def plan(self, routing: Routing, context: DispatchContext = WHOLE) -> Plan:
    """Returns which rows the experts see."""
    raise NotImplementedError

  def run(
    self, x_TD: jax.Array, routing: Routing, experts: ExpertFunction, context: DispatchContext
  ) -> tuple[jax.Array, Counts]:
    """Returns what a call does, over slots."""
    plan = self.plan(routing, context)
    y_TD = through_rows(plan, x_TD, experts, routing.values)
    return y_TD, Counts(plan.dropped, plan.spilled)

  def __call__(
    self,
    x_TD: jax.Array,
    routing: Routing,
    experts: ExpertFunction,
    context: DispatchContext = WHOLE,
  ) -> tuple[jax.Array, Counts]:
    """Returns (T, D), each token's outputs of its experts times their weights, and the counts."""
    if context.slots:
      routing, experts = deal(routing, context.slots), weights_of_slots(experts, context.slots)
    return self.run(x_TD, routing, experts, context)
