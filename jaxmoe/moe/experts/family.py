"""The base of families of experts: which of them take rows, and what surrounds the dispatch.

Most families are one kind of network, E times, and override nothing. A mixed family says by
`groups` which ids are of which kind. A part either takes rows, `part(rows_RD, groups)`, or, being
cheap, is computed for all tokens at once where they are: `part.at_tokens(x_TD, routing)`; then it
takes no rows. An id in no part gives zeros and costs nothing.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from jaxmoe.core.errors import InputError
from jaxmoe.core.renamed import renamed
from jaxmoe.core.weight_formats import token_values
from jaxmoe.moe.routing import Routing


@dataclasses.dataclass(frozen=True)
class Experts:
  """The base of records of experts: `build` gives the module with the weights of all E."""

  mixed: ClassVar[bool] = False
  """Whether experts are of several kinds, which their ids tell; then none can be inactive."""

  def check(self, num_experts: int) -> None:
    """Refuses a number of experts that the family cannot have.

    Raises:
      InputError: what, why and the cure in one line.
    """

  def expert_params(self, dim: int, num_experts: int) -> tuple[int, ...]:
    """Returns each expert's number of parameters."""
    raise NotImplementedError

  def shared_params(self, dim: int) -> int:
    """Returns the number of parameters that are no one expert's, and act on every token."""
    del dim
    return 0

  def active_params(self, dim: int, num_experts: int, num_active: int) -> int:
    """Returns how many parameters act on one token; the mean at perfect balance."""
    total = sum(self.expert_params(dim, num_experts))
    return self.shared_params(dim) + num_active * total // num_experts

  def num_zero_compute(self, num_experts: int) -> int:
    """Returns how many experts, the last ones, compute nothing or next to nothing."""
    del num_experts
    return 0


@dataclasses.dataclass(frozen=True)
class FeedForward(Experts):
  """The base of families of one kind of network with a hidden layer.

  Attributes:
    mlp_dim: F, the width of one expert.
  """

  mlp_dim: int = renamed("hidden")

  matrices: ClassVar[int]
  """How many matrices of D times F an expert has."""

  def __post_init__(self) -> None:
    if self.mlp_dim < 1:
      raise InputError(f"mlp_dim must be at least 1: mlp_dim={self.mlp_dim}")

  def expert_params(self, dim: int, num_experts: int) -> tuple[int, ...]:
    """Returns the same number for every expert."""
    return (self.matrices * dim * self.mlp_dim,) * num_experts


@dataclasses.dataclass(frozen=True)
class ExpertGroup:
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

  def groups(self, num_experts: int) -> tuple[ExpertGroup, ...]:
    """Returns the kinds of experts by their ids, 0..E-1; ids in no part give zeros."""
    return (ExpertGroup(0, num_experts, self),)

  def adjust_weights(self, routing: Routing) -> Routing:
    """Returns the routing whose weights know what kind of expert each choice is."""
    return routing

  def project_in(self, x_TD: jax.Array) -> jax.Array:
    """Returns what is dispatched in place of x."""
    return x_TD

  def project_out(self, y_TD: jax.Array) -> jax.Array:
    """Returns the layer's output of the combined outputs of experts; inverse of `project_in`."""
    return y_TD


class SeveralKinds(ExpertFamily):
  """Experts of several kinds side by side; ids that no kind has compute nothing.

  Each kind is (name, first id, last id + 1, module); one with `at_tokens` takes no rows.
  """

  def __init__(self, *kinds: tuple[str, int, int, nnx.Module]):
    self.kinds = nnx.Dict({name: module for name, _, _, module in kinds})
    self.spans = tuple((name, start, stop) for name, start, stop, _ in kinds)

  def groups(self, num_experts: int) -> tuple[ExpertGroup, ...]:
    """Returns a part for each kind."""
    del num_experts
    modules = [(start, stop, self.kinds[name]) for name, start, stop in self.spans]
    return tuple(ExpertGroup(*part, not hasattr(part[2], "at_tokens")) for part in modules)


def with_values(routing: Routing, values: Mapping[str, jax.Array], module: Any) -> Routing:
  """Returns the routing with what the weights of a module ask of each token.

  Args:
    routing: Of T tokens.
    values: Of `Tokens`, (B, L, ...) by name with B * L = T.
    module: The experts of one kind.

  Raises:
    InputError: a weight asks for a value that nobody gave.
  """
  asked = token_values(nnx.to_pure_dict(nnx.state(module)))
  for name in asked:
    if name not in values:
      raise InputError(
        f"weights of {type(module).__name__} need the value {name!r} of each token: give it in "
        "Tokens.values"
      )
  by_token = {name: values[name].reshape(-1, *values[name].shape[2:]) for name in asked}
  return dataclasses.replace(routing, values=by_token) if asked else routing


def hand_over(routing: Routing, from_TA: jax.Array) -> Routing:
  """Returns the routing in which some choices weigh nothing and the token's others all the more.

  What the choices `from_TA` weighed goes to the others in proportion, so that a token's weights
  keep their sum; where there are no others all weigh nothing.
  """
  from_TA = from_TA & routing.valid_TA
  weight_TA = jnp.where(routing.valid_TA, routing.weight_TA, 0)
  kept_TA = jnp.where(from_TA, 0, weight_TA)
  kept_T1 = jnp.sum(kept_TA, axis=1, keepdims=True)
  some_T1 = kept_T1 > 0
  grown_TA = kept_TA * (jnp.sum(weight_TA, axis=1, keepdims=True) / jnp.where(some_T1, kept_T1, 1))
  # A token without such choices keeps its weights and their gradients bit for bit.
  weight_TA = jnp.where(jnp.any(from_TA, axis=1, keepdims=True) & some_T1, grown_TA, kept_TA)
  return dataclasses.replace(routing, weight_TA=weight_TA)


def gates(routing: Routing) -> jax.Array:
  """Returns (T, E) float32: what each token multiplies each expert's output by, 0 for none."""
  one_hot_TAE = jax.nn.one_hot(routing.expert_TA, routing.scores_TE.shape[1])
  weight_TA = jnp.where(routing.valid_TA, routing.weight_TA, 0)
  return jnp.sum(one_hot_TAE * weight_TA[:, :, None], axis=1)


def runs(values: Iterable[Any]) -> Iterator[tuple[Any, int, int]]:
  """Yields (value, start, stop) of each run of equal values."""
  start = 0
  for value, run in itertools.groupby(values):
    stop = start + len(list(run))
    yield value, start, stop
    start = stop
