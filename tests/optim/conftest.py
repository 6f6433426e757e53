"""What the optimizer tests share: running a transform over given gradients."""

import jax
import numpy as np
import optax
import pytest


@pytest.fixture
def follow():
  """Returns a function from (transform, parameters, gradients) to the parameters after each."""

  def run(transform, params, gradients):
    state, update, path = transform.init(params), jax.jit(transform.update), []
    for gradient in gradients:
      updates, state = update(gradient, state, params)
      params = optax.apply_updates(params, updates)
      path.append(jax.tree.map(np.asarray, params))
    return path

  return run
