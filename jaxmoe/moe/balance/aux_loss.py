"""Auxiliary losses: pure functions of summed counts and scores, each with a scope.

What matters is over which tokens the sums run (Qiu et al. 2025, "Demons in the Detail"):

- `sequence`: each row of the batch by itself; the mean over rows that hold tokens.
- `micro`: the tokens of a microbatch on one data-parallel device, as most code does; the mean.
- `data_parallel`: the tokens of a microbatch on all devices; the mean over microbatches.
- `global`: all tokens of the step. Exact: with accumulation, a forward pass of its own makes the
  sums first (about a third more compute), because no loss but the z-loss adds up.
- `global_running`: the microbatches so far, as if the rest were like them. One pass, but early
  microbatches know little: an approximation, whose error is logged.

Padding never counts, choices count before drops, and counts carry no gradient.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp

from jaxmoe.core.errors import InputError
from jaxmoe.moe.routing import RouterSums

Scope = Literal["sequence", "micro", "data_parallel", "global", "global_running"]


@functools.partial(
  jax.tree_util.register_dataclass,
  data_fields=["tokens", "rows", "whole", "running", "labels"],
  meta_fields=["num_micro", "num_groups"],
)
@dataclasses.dataclass(frozen=True)
class StepTotals:
  """What a microbatch must know of the whole step to add its exact share of a loss.

  Attributes:
    tokens: float32, the number of valid tokens of the whole step.
    rows: float32, the number of rows of the whole step that hold a valid token.
    num_micro: The number of microbatches.
    num_groups: On how many data-parallel devices a microbatch lies, row after row.
    whole: `RouterSums` of a layer over the whole step, or None where no pass made them. Of a model:
      by layer group and place, stacked over repeats.
    running: Those of the earlier microbatches of the step.
    labels: float32, the number of scored labels of the whole step, at least 1.
  """

  tokens: jax.Array
  rows: jax.Array
  num_micro: int
  num_groups: int
  whole: Any
  running: Any
  labels: jax.Array | float = 1.0


@dataclasses.dataclass(frozen=True)
class AuxLoss:
  """The base of balance losses; a loss overrides `loss` and says what it is called.

  Attributes:
    weight: Its factor in the training loss.
    scope: The tokens over which sums run.
    adaptive: Whether its weight is also multiplied by the factor that the router keeps.
  """

  weight: float = 0.01
  scope: Scope = "global"
  adaptive: bool = False

  kind: ClassVar[str] = ""
  """What metrics call the loss, followed by its scope."""
  additive: ClassVar[bool] = False
  """Whether shares of microbatches add up once the number of tokens is known."""

  def __post_init__(self) -> None:
    if self.weight < 0:
      raise InputError(f"weight must not be negative: weight={self.weight}")

  @property
  def name(self) -> str:
    """What metrics call the loss."""
    return f"{self.kind}_{self.scope}"

  @property
  def per_sequence(self) -> bool:
    """Whether shares are of rows, of which each device has its own; else of sums over devices."""
    return self.scope == "sequence"

  @property
  def needs_sequence_totals(self) -> bool:
    """Whether the sums of each row must be made."""
    return self.scope in ("sequence", "micro")

  @property
  def needs_step_totals(self) -> bool:
    """Whether the sums of the whole step must be known before the gradient pass."""
    return self.scope == "global" and not self.additive

  def check(self, layer: Any) -> None:
    """Refuses a layer (`MoEConfig`) that the loss makes no sense for.

    Raises:
      InputError: what, why and the cure in one line.
    """

  def weight_of(self, sums: RouterSums) -> jax.Array | float:
    """Returns the loss's factor in the training loss, from the sums of any tokens of the step."""
    if not self.adaptive:
      return self.weight
    assert sums.adaptive_coefficient is not None, "a layer checks that its router keeps a factor"
    coefficient = sums.adaptive_coefficient / jnp.maximum(sums.tokens, 1)
    return self.weight * jax.lax.stop_gradient(coefficient)

  def loss(self, sums: RouterSums, layer: Any) -> jax.Array:
    """Returns the loss over the tokens that `sums` counts, float32; 0 where there are none."""
    raise NotImplementedError

  def share(
    self, sums: RouterSums, per_sequence: RouterSums | None, totals: StepTotals, layer: Any
  ) -> jax.Array:
    """Returns a microbatch's share of the loss of the step, unweighted, float32.

    Shares of all microbatches sum to the loss of the scope, and their gradients to its gradient.
    """
    if self.scope == "sequence":
      assert per_sequence is not None
      each_B = jax.vmap(lambda row: self.loss(row, layer))(per_sequence)
      return jnp.sum(jnp.where(per_sequence.tokens > 0, each_B, 0)) / jnp.maximum(totals.rows, 1)
    if self.scope == "micro":
      assert per_sequence is not None
      each_G = jax.vmap(lambda group: self.loss(group, layer))(_groups(per_sequence, totals))
      return jnp.mean(each_G) / totals.num_micro
    if self.scope == "data_parallel":
      return self.loss(sums, layer) / totals.num_micro
    if self.additive:
      return self.loss(dataclasses.replace(sums, tokens=totals.tokens), layer)
    value = self.loss(_seen_from(sums, self._estimate(sums, totals)), layer)
    # The gradient of a share is whole as it is; its value is that of its share of the tokens.
    part = sums.tokens / jnp.maximum(totals.tokens, 1)
    return value - jax.lax.stop_gradient(value * (1 - part))

  def _estimate(self, sums: RouterSums, totals: StepTotals) -> RouterSums:
    """Returns the sums of the step as far as a microbatch knows them."""
    if self.scope == "global" and totals.whole is not None:
      return totals.whole
    # Without a weight nobody makes the sums first, and the value is mended afterwards.
    known = totals.num_micro == 1 or self.weight == 0
    assert known or self.scope == "global_running", "the exact scope needs the sums of the step"
    so_far = jax.tree.map(jnp.add, sums, totals.running)
    scale = totals.tokens / jnp.maximum(so_far.tokens, 1)
    return jax.tree.map(lambda leaf: leaf * scale, so_far)


def _seen_from(sums: RouterSums, whole: RouterSums) -> RouterSums:
  """Returns the value of `whole` with the gradient of `sums`, which are a part of it."""
  return jax.tree.map(lambda part, all: part + jax.lax.stop_gradient(all - part), sums, whole)


def _groups(per_sequence: RouterSums, totals: StepTotals) -> RouterSums:
  """Returns the sums of each of `num_groups` equal parts of the rows."""
  groups = totals.num_groups
  return jax.tree.map(
    lambda leaf: jnp.sum(leaf.reshape(groups, -1, *leaf.shape[1:]), axis=1), per_sequence
  )
