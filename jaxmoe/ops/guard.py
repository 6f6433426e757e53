"""Updates that count for nothing: a step that would do harm leaves an optimizer as it was.

The update of a guarded transform takes `ok`. Where that is False its state keeps every bit,
whatever the gradient holds, and the updates are of no use. The choice is made where an entry is
written, so that it costs no pass over the state.

What goes on from state must go on from the chosen one. On a processor XLA makes one result a loop:
parameters of a moment that nobody keeps would make it again from the old one, which must then be
copied before the chosen one overwrites it.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax

Tree = Any


def keep_unless(ok: jax.Array | bool | None, new: Tree, old: Tree) -> Tree:
  """Returns the tree `new` where `ok`, and `old`, bit for bit, where not; None is True."""
  return new if ok is None else jax.tree.map(functools.partial(jnp.where, ok), new, old)


def guarded(inner: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
  """Returns `inner` whose update takes `ok`, of which it knows nothing."""
  inner = optax.with_extra_args_support(inner)

  def update(
    updates: Tree, state: optax.OptState, params: Tree = None, *,
    ok: jax.Array | None = None, **extra: Any,
  ) -> tuple[Tree, Tree]:  # fmt: skip
    updates, after = inner.update(updates, state, params, **extra)
    return updates, keep_unless(ok, after, state)

  return optax.GradientTransformationExtraArgs(inner.init, update)
