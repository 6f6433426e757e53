"""Sizes of latent attention; its numbers are in the contract test, and beside transformers'."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from jaxmoe.core.init import Init
from jaxmoe.core.rng import Keys
from jaxmoe.models.latent_attention import LatentAttention
from jaxmoe.models.rope_scaling import Yarn

SMALL = LatentAttention(3, head_dim=6, rope_dim=4, value_dim=5, latent_dim=7, query_dim=8)


@pytest.mark.parametrize("query_dim", [None, 8])
def test_the_stated_number_of_parameters_is_that_of_the_matrices(query_dim):
  config = dataclasses.replace(SMALL, query_dim=query_dim)
  shapes = nnx.eval_shape(lambda: nnx.state(config.build(Init(Keys.from_seed(0)), 12, 1e-6)))
  matrices = [leaf.size for leaf in jax.tree.leaves(shapes) if leaf.ndim > 1]
  assert sum(matrices) == config.active_params(12)


def test_what_is_cached_of_a_token_does_not_grow_with_the_heads():
  for heads in (1, 128):
    config = dataclasses.replace(SMALL, num_heads=heads)
    cache = jax.eval_shape(lambda c=config: c.empty_cache(2, 9, jnp.bfloat16))
    numbers = [leaf for leaf in jax.tree.leaves(cache) if leaf.dtype == jnp.bfloat16]
    assert sum(leaf.size for leaf in numbers) == 2 * 9 * (7 + 4)


def test_yarn_raises_the_scores_by_the_square_of_its_magnitude():
  stretched = dataclasses.replace(SMALL, rope=Yarn(40.0, mscale=1.0, mscale_all=1.0))
  # 0.1 log(40) + 1 = 1.3689, DeepSeek-V3's.
  assert stretched.scale / SMALL.scale == pytest.approx(1.36888794541**2, rel=1e-9)
