"""What a layer asks of its experts: which of them take rows, and what surrounds the dispatch.

Most families are one kind of network, E times, and override nothing. A mixed family says by
`parts` which ids are of which kind. A part either takes rows, `part(rows_RD, groups)`, or, being
cheap, is computed for all tokens at once where they are: `part.at_tokens(x_TD, routing)`; then it
takes no rows.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
from flax import nnx

from jaxmoe.moe.routing import Routing


@dataclasses.dataclass(frozen=True)
class Experts:
  """The base of records of experts: `build` gives the module with the weights of all E."""

  def check(self, num_experts: int) -> None:
    """Refuses a number of experts that the family cannot have.

    Raises:
      InputError: what, why and the cure in one line.
    """

  def num_params(self, dim: int) -> int:
    """Returns the number of parameters of one expert."""
    raise NotImplementedError

  def active_params(self, dim: int, num_experts: int, num_active: int) -> int:
    """Returns how many parameters act on one token, under perfect balance if that decides."""
    del num_experts
    return num_active * self.num_params(dim)

  def num_idle(self, num_experts: int) -> int:
    """Returns how many experts, the last ones, compute nothing or next to nothing."""
    del num_experts
    return 0


@dataclasses.dataclass(frozen=True)
class Part:
  """Experts start..stop-1 of a layer, which are of one kind.

  Attributes:
    module: Called with (rows_RD, groups), or has `at_tokens` if not `takes_rows`.
    takes_rows: Whether tokens are moved to these experts.
  """

  start: int
  stop: int
  module: Any
  takes_rows: bool = True


class ExpertFamily(nnx.Module):
  """The base of modules of experts."""

  def parts(self, num_experts: int) -> tuple[Part, ...]:
    """Returns the kinds of experts, which together are 0..E-1."""
    return (Part(0, num_experts, self),)

  def reweigh(self, routing: Routing) -> Routing:
    """Returns the routing whose weights know what kind of expert each choice is."""
    return routing

  def enter(self, x_TD: jax.Array) -> jax.Array:
    """Returns what is dispatched in place of x."""
    return x_TD

  def leave(self, y_TD: jax.Array) -> jax.Array:
    """Returns the layer's output of the combined outputs of experts; inverse of `enter`'s dims."""
    return y_TD
