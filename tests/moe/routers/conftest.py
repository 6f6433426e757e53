"""What the tests of rules share: what a rule sees, without a gate."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxmoe.core.rng import Keys
from jaxmoe.core.tokens import Tokens
from jaxmoe.moe.routers import RouterInputs
from jaxmoe.moe.routers.scores import SCORES


@pytest.fixture(scope="session")
def seen_of():
  """Returns a function from a router and logits (T, E) to what the rule sees in training."""

  def make(router, logits, num_active=2, valid=None, ids=None, buffers=None, seed=0, **fields):
    length = len(logits)
    slot = jnp.arange(length, dtype=jnp.int32)[None]
    segment = jnp.ones_like(slot) if valid is None else jnp.asarray(valid, jnp.int32)[None]
    tokens = Tokens(slot if ids is None else jnp.asarray(ids, jnp.int32)[None], slot, segment, slot)
    logits = jnp.asarray(logits, jnp.float32)
    start = router.buffers(logits.shape[1]) if buffers is None else buffers
    keys = None if seed is None else Keys.from_seed(seed)
    rest = {"x_TD": jnp.zeros((length, 1)), "parameters": {}, **fields}
    scores = SCORES[router.score](logits)
    return RouterInputs(logits, scores, tokens, num_active, start, keys, **rest)

  return make


@pytest.fixture(scope="session")
def skewed():
  """Logits (400, 8) of which most tokens like the same experts best."""
  rng = np.random.default_rng(0)
  return (rng.normal(size=(400, 8)) + np.linspace(2, -2, 8)).astype(np.float32)
