"""Latency of experts alone, kind by kind, at one number of rows each.

What a row costs depends on how many there are, so the rows are those of the working point: T * A
over E for every expert. Each kind runs its rows through the grouped matmul of dropless dispatch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxmoe.core.config_io import component
from jaxmoe.core.errors import InputError
from jaxmoe.core.init import Init
from jaxmoe.core.rng import Keys
from jaxmoe.moe.dispatch.plan import Ragged
from jaxmoe.moe.experts import EXPERTS
from jaxmoe.moe.experts.family import ExpertGroup
from jaxmoe.moe.experts.mixed_primitives import Primitives
from jaxmoe.moe.routing import Routing
from jaxmoe.ops.grouped_matmul import blocks

Timer = Callable[[Callable[[], Any]], float]


def family_of(name: str, mlp_dim: int, num_experts: int) -> Any:
  """Returns the experts that a name stands for, of a width where they have one.

  A name is one of EXPERTS, or kinds of primitive experts, one for each: `dense,shift,shift`.
  """
  if name in EXPERTS:
    family = component(EXPERTS, "experts", name)
    plain = {"mlp_dim": mlp_dim} if hasattr(family, "mlp_dim") else {}
    family = type(family)(**{**vars(family), **plain})
  else:
    family = Primitives(mlp_dim, tuple(name.split(",")))
  family.check(num_experts)
  return family


def latencies(
  family: Any, tokens: int, dim: int, num_experts: int, num_active: int, repeats: int, timer: Timer
) -> tuple[float, ...]:
  """Returns microseconds a row of each expert, forward and backward, the median of rounds.

  Kinds take turns, so that a busy machine slows all alike. An expert without code costs the least.

  Raises:
    InputError: fewer than one row an expert.
  """
  rows = tokens * num_active // num_experts
  if rows < 1:
    raise InputError(f"--tokens={tokens} leaves no row for an expert; raise it")
  module = family.build(Init(Keys.from_seed(0)), dim, num_experts)
  x_TD = module.project_in(jax.random.normal(jax.random.key(0), (rows * num_experts, dim)))
  parts = module.groups(num_experts)
  runs = [_run(part, x_TD[: rows * (part.stop - part.start)], rows) for part in parts]
  seconds = np.empty((len(runs), repeats))
  for round_index in range(-1, repeats):  # Round -1 compiles.
    for index, run in enumerate(runs):
      seconds[index, max(round_index, 0)] = timer(run)
  micros = np.full(num_experts, np.nan)
  for part, median in zip(parts, np.median(seconds, axis=1), strict=True):
    micros[part.start : part.stop] = 1e6 * median / (rows * (part.stop - part.start))
  return tuple(float(f"{cost:.3g}") for cost in np.nan_to_num(micros, nan=np.nanmin(micros)))


def _run(part: ExpertGroup, rows_RD: jax.Array, rows: int) -> Callable[[], Any]:
  """Returns what runs the experts of a part, each on as many rows."""
  graph, state = nnx.split(part.module)
  num_experts = part.stop - part.start

  def forward(state: Any, rows_RD: jax.Array) -> jax.Array:
    module = nnx.merge(graph, state)
    if part.takes_rows:
      return module(rows_RD, Ragged(jnp.full(num_experts, rows, jnp.int32), blocks))
    expert_T1 = jnp.arange(rows_RD.shape[0], dtype=jnp.int32)[:, None] // rows
    ones = jnp.ones((rows_RD.shape[0], 1), jnp.float32)
    scores_TE = jnp.ones((rows_RD.shape[0], num_experts))
    routing = Routing(expert_T1, ones, ones > 0, scores_TE, ones[:, 0])
    return module.at_tokens(rows_RD, routing)

  @jax.jit
  def both(state: Any, rows_RD: jax.Array) -> Any:
    out, vjp = jax.vjp(forward, state, rows_RD)
    return out, vjp(jnp.ones_like(out))

  return lambda: both(state, rows_RD)
