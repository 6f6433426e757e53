"""First values: what each leaf's own draw gives, however leaves are drawn and laid out."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jaxmoe.core.first_values import _BLOCK, Declared, drawn_apart, drawn_together
from jaxmoe.core.rng import Keys

LEAVES = (
  Declared((7,), jnp.float32, 0.5, "embed/table"),
  Declared((3, _BLOCK), jnp.float32, 0.02, "head/weight"),  # ends with a block
  Declared((5, 13), jnp.bfloat16, 0.3, "layer/q", layers=(0, 2, 4)),
  Declared((1, 2 * _BLOCK + 1), jnp.float32, 1.7, "layer/up", layers=(1, 4)),
  Declared((4,), jnp.float32, 1.0, layers=(0, 2, 4)),
  Declared((2, 2), jnp.bfloat16, 0.0),
  Declared((3,), jnp.float32, np.array([1, -2, 0.25], np.float32), layers=(3, 1)),
)


OPTIONS = {"xla_backend_optimization_level": 3, "xla_llvm_disable_expensive_passes": False}
"""As commands compile: the level of tests rounds a product before a sum in some programs."""


def drawn(draw, keys, leaves, out_shardings=None):
  """Returns what a program of draws gives."""
  program = jax.jit(lambda keys: draw(keys, leaves), out_shardings=out_shardings)
  return program.lower(keys).compile(OPTIONS)(keys)


def oracle(keys, leaves):
  """Returns what leaves begin as, layer by layer, by the definition."""

  def one(keys, leaf):
    if not leaf.path:
      return jnp.asarray(np.full(leaf.shape, leaf.first), leaf.dtype)
    normal = jax.random.truncated_normal(keys(leaf.path), -2, 2, leaf.shape, jnp.float32)
    return (normal * leaf.first).astype(leaf.dtype)

  def each(keys, leaf):
    if leaf.layers is None:
      return one(keys, leaf)
    return jnp.stack([one(keys.at(layer), leaf) for layer in leaf.layers])

  return drawn(lambda keys, leaves: [each(keys, leaf) for leaf in leaves], keys, leaves)


def same(ours, theirs):
  ours, theirs = np.asarray(ours), np.asarray(theirs)
  return ours.dtype == theirs.dtype and ours.shape == theirs.shape and np.array_equal(ours, theirs)


def test_each_leaf_begins_as_its_own_draw_gives_bit_for_bit():
  keys = Keys.from_seed(11)
  expected = oracle(keys, LEAVES)
  for draw in (drawn_apart, drawn_together):
    for leaf, value, own in zip(LEAVES, drawn(draw, keys, LEAVES), expected, strict=True):
      assert leaf.like.shape == value.shape and leaf.like.dtype == value.dtype
      assert same(value, own), (draw, leaf)


def test_bits_do_not_depend_on_the_devices_a_leaf_lies_on():
  keys, mesh = Keys.from_seed(3), jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
  leaf = Declared((16, 24), jnp.float32, 0.1, "layer/q", layers=(0, 1))
  spread = NamedSharding(mesh, PartitionSpec(None, "data"))
  found = drawn(drawn_apart, keys, [leaf], [spread])[0]
  assert len(found.addressable_shards) == 8
  assert same(found, drawn(drawn_together, keys, [leaf])[0])


def test_keys_that_do_not_count_places_draw_leaf_by_leaf():
  leaf = LEAVES[2]
  with jax.threefry_partitionable(False):
    keys = Keys.from_seed(5)
    assert same(drawn(drawn_together, keys, [leaf])[0], oracle(keys, [leaf])[0])


def test_one_loop_draws_all():
  counts = [
    jax.jit(lambda keys, draw=draw: draw(keys, LEAVES))
    .lower(Keys.from_seed(0))
    .as_text()
    .count("erf_inv")
    for draw in (drawn_together, drawn_apart)
  ]
  assert counts[0] == 1 < counts[1]
