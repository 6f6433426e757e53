"""Binary linear attention with more than one key head, which the contract's example has not."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxmoe.core import param_names
from jaxmoe.core.errors import InputError
from jaxmoe.core.init import Init
from jaxmoe.core.rng import Keys
from jaxmoe.core.tokens import Tokens
from jaxmoe.models.binary_linear_attention import BinaryLinear
from jaxmoe.models.cache import NoCache
from jaxmoe.models.masks import WindowMask
from tests.contracts.oracles.attention import binary_linear as oracle

D, L = 6, 7
CONFIG = BinaryLinear(4, 2, 3, conv_width=4)


def test_grouped_heads_equal_the_loop_also_in_what_the_convolution_adds():
  layer = CONFIG.build(Init(Keys.from_seed(0)), D, 1e-6)
  flat = param_names.flatten(nnx.to_pure_dict(nnx.state(layer)))
  x, segment = np.random.default_rng(1).normal(size=(L, D)), np.array([1, 1, 1, 1, 1, 2, 2])
  slot = np.arange(L)[None]
  tokens = Tokens(*(jnp.asarray(f, jnp.int32) for f in (0 * slot, slot, segment[None], slot)))
  y = jax.jit(lambda x: layer(x, tokens, NoCache())[0])(jnp.asarray(x, jnp.float32)[None])
  weights = {path: np.asarray(leaf, np.float64) for path, leaf in flat.items()}
  right = oracle(CONFIG, weights, x, segment)
  assert right.std() > 0.05
  np.testing.assert_allclose(y[0], right, rtol=1e-4, atol=1e-5)
  assert CONFIG.active_params(D) == sum(leaf.size for leaf in flat.values())


@pytest.mark.parametrize(
  "fields, why", [({"conv_width": 1}, "conv_width"), ({"mask": WindowMask(3)}, "document mask")]
)
def test_what_sums_over_keys_cannot_do_is_refused(fields, why):
  with pytest.raises(InputError, match=why):
    BinaryLinear(**fields)
