"""Adam's moves (Kingma and Ba 2015, algorithm 1), of moments that stay where a step would harm."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxmoe.ops.guard import keep_unless

Tree = Any


def scale_by_adam(b1: float, b2: float, eps: float) -> optax.GradientTransformationExtraArgs:
  """Returns optax's Adam, bit for bit, guarded; moves are made of the moments that are kept."""

  def update(
    updates: Tree, state: optax.ScaleByAdamState, params: Tree = None, *,
    ok: jax.Array | None = None, **_: Any,
  ) -> tuple[Tree, optax.ScaleByAdamState]:  # fmt: skip
    mu = optax.tree.update_moment(updates, state.mu, b1, 1)
    nu = optax.tree.update_moment_per_elem_norm(updates, state.nu, b2, 2)
    mu, nu = keep_unless(ok, (mu, nu), (state.mu, state.nu))
    count = optax.safe_increment(state.count)
    mean, square = (
      optax.tree.bias_correction(moment, rate, count) for moment, rate in ((mu, b1), (nu, b2))
    )
    moves = jax.tree.map(lambda m, v: m / (jnp.sqrt(v) + eps), mean, square)
    return moves, optax.ScaleByAdamState(keep_unless(ok, count, state.count), mu, nu)

  return optax.GradientTransformationExtraArgs(optax.scale_by_adam().init, update)
