"""Experts of unequal cost side by side (ShiftAddViT, You et al. 2023, arXiv:2306.06446).

All but the identity are GELU networks of one width: with full weights, with powers of two, with
8-bit weights, with matrices of low rank. `LatencyAware` sends them tokens in inverse proportion to
what a row costs, which `jaxmoe bench latency` measures.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from jaxmoe.core.errors import InputError
from jaxmoe.core.init import Init
from jaxmoe.core.renamed import renamed
from jaxmoe.core.weight_formats import Groups, grouped_dot
from jaxmoe.moe.experts.family import Experts, SeveralKinds, gates, runs
from jaxmoe.moe.experts.mlp import MLPExperts, gelu
from jaxmoe.moe.experts.power_of_two import integers, powers_of_two
from jaxmoe.moe.routing import Routing

VIEWS: dict[str, Callable[[Any], Any] | None] = {
  "dense": None,
  "shift": powers_of_two,
  "int8": integers,
}
KINDS = (*VIEWS, "low_rank", "identity")


@dataclasses.dataclass(frozen=True)
class Primitives(Experts):
  """Experts of several kinds.

  Attributes:
    mlp_dim: F, the width of all networks.
    kinds: What each expert of the layer is, equal ones next to each other: dense, shift, int8,
      low_rank or, the last ones, identity, which takes no rows.
    rank: r, of the two matrices that stand for one in a low_rank expert.
  """

  mlp_dim: int = renamed("hidden", 128)
  kinds: tuple[str, ...] = ("dense", "shift")
  rank: int = 8

  mixed: ClassVar[bool] = True

  def __post_init__(self) -> None:
    if self.mlp_dim < 1 or self.rank < 1:
      raise InputError(
        f"mlp_dim and rank must be at least 1: mlp_dim={self.mlp_dim}, rank={self.rank}"
      )
    names = [name for name, _, _ in runs(self.kinds)]
    known = set(names) <= set(KINDS) and len(names) == len(set(names))
    if not known or not names or "identity" in (*names[:-1], names[0]):
      raise InputError(
        f"kinds must be of {', '.join(KINDS)}, equal ones next to each other, identity last and "
        f"not alone: kinds={self.kinds}"
      )

  def check(self, num_experts: int) -> None:
    """Refuses another number of kinds than of experts."""
    if len(self.kinds) != num_experts:
      raise InputError(
        f"kinds needs one name an expert: kinds={self.kinds}, num_experts={num_experts}"
      )

  def num_zero_compute(self, num_experts: int) -> int:
    """Returns how many are the identity."""
    return self.kinds.count("identity")

  def expert_params(self, dim: int, num_experts: int) -> tuple[int, ...]:
    """Returns each expert's number, whatever the bits of one."""
    full, low = 2 * dim * self.mlp_dim, 2 * self.rank * (dim + self.mlp_dim)
    return tuple({"low_rank": low, "identity": 0}.get(kind, full) for kind in self.kinds)

  def build(self, init: Init, dim: int, num_experts: int) -> SeveralKinds:
    """Returns the module with the weights of all experts."""
    return SeveralKinds(*(
      (kind, start, stop, self._module(kind, init / kind, dim, stop - start))
      for kind, start, stop in runs(self.kinds)
    ))

  def _module(self, kind: str, init: Init, dim: int, num_experts: int) -> nnx.Module:
    if kind == "identity":
      return Identity()
    if kind == "low_rank":
      return LowRankExperts(init, dim, self.mlp_dim, self.rank, num_experts)
    return MLPExperts(init, dim, self.mlp_dim, num_experts, gelu, VIEWS[kind])


class LowRankExperts(nnx.Module):
  """GELU experts each of whose matrices is a product of two."""

  def __init__(self, init: Init, dim: int, mlp_dim: int, rank: int, num_experts: int):
    def weight(name: str, rows: int, columns: int, dims: tuple[str, str]) -> nnx.Param:
      make = init.residual if name == "down_right" else init.weight
      return make(name, (num_experts, rows, columns), ("expert", *dims), fan_in=rows)

    self.up_left = weight("up_left", dim, rank, ("embed", "rank"))
    self.up_right = weight("up_right", rank, mlp_dim, ("rank", "width"))
    self.down_left = weight("down_left", mlp_dim, rank, ("width", "rank"))
    self.down_right = weight("down_right", rank, dim, ("rank", "embed"))

  def __call__(self, rows_RD: jax.Array, groups: Groups) -> jax.Array:
    """Returns (R, D) in rows.dtype."""
    small = grouped_dot(self.up_left.get_value(), rows_RD, groups)
    pre_RF = grouped_dot(self.up_right.get_value(), small, groups)
    small = grouped_dot(self.down_left.get_value(), gelu(pre_RF[:, None]), groups)
    return grouped_dot(self.down_right.get_value(), small, groups)


class Identity(nnx.Module):
  """Experts that give their input."""

  def at_tokens(self, x_TD: jax.Array, routing: Routing) -> jax.Array:
    """Returns (T, D) in x.dtype: x times the sum of the weights."""
    used_T1 = jnp.any(routing.valid_TA, axis=1, keepdims=True)
    scale_T1 = jnp.sum(gates(routing), axis=1, keepdims=True)
    return (scale_T1 * jnp.where(used_T1, x_TD.astype(jnp.float32), 0)).astype(x_TD.dtype)
