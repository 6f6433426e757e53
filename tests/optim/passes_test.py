import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxmoe.hlo.traffic import movements
from jaxmoe.optim import Constant, Optim, make_optimizer

NAMES = {"w": "layers/0/w", "table": "embed/table"}
DIMS = {"w": ("embed", "mlp"), "table": ("vocab", "embed")}
SIZES = {"w": (96, 64), "table": (128, 32)}


def run(update):
  """Returns the compiled step `(params, state), gradients -> (params, state)` of an update."""
  transform = make_optimizer(Optim(schedule=Constant()), 9, NAMES, DIMS)

  def step(moving, gradients):
    norm = optax.tree.norm(gradients)
    ok = jnp.isfinite(norm)
    params, state = moving
    updates, state = update(transform, gradients, state, params, ok)
    moved = optax.apply_updates(params, updates)
    return jax.tree.map(functools.partial(jnp.where, ok), moved, params), state

  params = {name: jax.ShapeDtypeStruct(size, jnp.float32) for name, size in SIZES.items()}
  moving = params, jax.eval_shape(transform.init, params)
  return transform, jax.jit(step, donate_argnums=0).lower(moving, params).compile()


def guarded(transform, gradients, state, params, ok):
  return transform.update(gradients, state, params, ok=ok)


def chosen_after(transform, gradients, state, params, ok):
  """The definition: an update as if nothing could go wrong, and a choice of the whole state."""
  updates, after = transform.update(gradients, state, params)
  return updates, jax.tree.map(functools.partial(jnp.where, ok), after, state)


def test_a_guarded_step_of_adamw_reads_and_writes_each_leaf_fifteen_times():
  """The norm reads the gradient, and the clip, which writes; each moment reads both; no copies."""
  _, step = run(guarded)
  leaves = sum(4 * np.prod(size) for size in SIZES.values())
  moved = sum(one.total for one in movements(step))
  assert 15 * leaves <= moved < 15.1 * leaves


def test_a_guarded_update_equals_a_choice_between_before_and_after():
  found = []
  for update in (guarded, chosen_after):
    transform, step = run(update)
    random = np.random.default_rng(0)
    draw = lambda: {n: random.normal(size=s).astype(np.float32) for n, s in SIZES.items()}  # noqa: E731, B023
    params = jax.tree.map(jnp.asarray, draw())
    moving = params, transform.init(params)
    for at in range(5):
      gradients = jax.tree.map(lambda leaf, at=at: leaf * 10.0 ** (-2 * (at % 2)), draw())
      if at == 2:
        gradients["w"][3, 3] = np.nan
      before = jax.device_get(moving)
      moving = step(moving, gradients)
      if at == 2:
        jax.tree.map(np.testing.assert_array_equal, before, jax.device_get(moving))
    found.append(jax.device_get(moving))
  jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=2e-6, atol=1e-7), *found)
