"""What every kind of attention owes: its paper's numbers, and what a causal model rests on."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxmoe.core import param_names
from jaxmoe.core.init import Init
from jaxmoe.core.rng import Keys
from jaxmoe.core.tokens import Tokens
from jaxmoe.models.block import ATTENTION
from jaxmoe.models.cache import NoCache
from tests.contracts.oracles.attention import ORACLES

D, L = 8, 11
member = pytest.mark.parametrize("name", ATTENTION)
# Two documents and padding at the end; padding between; one document.
SEGMENT = np.array([[1] * 4 + [2] * 5 + [0] * 2, [1] * 3 + [0] * 2 + [2] * 3 + [3] * 3, [1] * L])
SLOT = np.broadcast_to(np.arange(L), SEGMENT.shape)


def tokens_of(segment, slot=SLOT):
  first = np.array([[np.argmax(row == one) for one in row] for row in np.asarray(segment)])
  position = np.where(segment > 0, SLOT[:, : segment.shape[1]] - first, 0)
  fields = (0 * slot, position, segment, slot)
  return Tokens(*(jnp.asarray(field, jnp.int32) for field in fields))


@functools.cache
def built(name):
  layer = ATTENTION[name][1].build(Init(Keys.from_seed(3)), D, 1e-6)
  rng = np.random.default_rng(4)

  def of_use(leaf):
    """What starts at zero is moved, so that a bias that is forgotten shows."""
    drawn = jnp.asarray(rng.normal(size=leaf.shape), leaf.dtype)
    return leaf if np.any(leaf) else drawn

  return nnx.graphdef(layer), jax.tree.map(of_use, nnx.to_pure_dict(nnx.state(layer)))


@functools.partial(jax.jit, static_argnums=0)
def run(graph, state, x, tokens, cache=None):
  y, after, _ = nnx.merge(graph, state)(x, tokens, cache or NoCache())
  return y, None if cache is None else after


def whole(name, x, tokens, dtype=jnp.float32):
  graph, state = built(name)
  return np.asarray(run(graph, state, jnp.asarray(x, dtype), tokens)[0])


def draw(seed=1):
  return np.random.default_rng(seed).normal(size=(*SEGMENT.shape, D)) * 2


def right_of(name, x, segment=SEGMENT):
  _, state = built(name)
  weights = {
    path: np.asarray(leaf, np.float64) for path, leaf in param_names.flatten(state).items()
  }
  rows = zip(x, segment, strict=True)
  return np.stack([ORACLES[name](ATTENTION[name][1], weights, *row) for row in rows])


def test_every_kind_has_an_oracle():
  assert ATTENTION.keys() == ORACLES.keys()


@member
def test_a_kind_equals_its_paper_also_where_documents_are_packed(name):
  y, right, valid = whole(name, draw(), tokens_of(SEGMENT)), right_of(name, draw()), SEGMENT > 0
  assert right[valid].std() > 0.1, "outputs too small to tell anything"
  np.testing.assert_allclose(y[valid], right[valid], rtol=1e-4, atol=2e-5)
  np.testing.assert_array_equal(y[~valid], 0)


@member
def test_bfloat16_keeps_its_type_and_a_small_error(name):
  y = whole(name, draw(), tokens_of(SEGMENT), jnp.bfloat16)
  assert y.dtype == jnp.bfloat16
  error = np.abs(y.astype(np.float64) - right_of(name, draw()))[SEGMENT > 0]
  assert np.median(error) < 2e-2


@member
def test_a_later_token_or_another_document_changes_nothing_bit_for_bit(name):
  x, tokens = draw(), tokens_of(SEGMENT)
  before = whole(name, x, tokens)
  same = SEGMENT[:, :, None] == SEGMENT[:, None, :]
  for at in range(L):
    moved = x.copy()
    moved[:, at] += 1.0
    after = whole(name, moved, tokens)
    # Whom a change of token `at` may reach: what comes after it in its document.
    reach = same[:, :, at] & (np.arange(L) >= at) & (SEGMENT > 0)
    np.testing.assert_array_equal(after[~reach], before[~reach])
    assert (after[:, at] != before[:, at])[SEGMENT[:, at] > 0].any(axis=-1).all()


@member
def test_what_padding_holds_changes_nothing_in_values_or_gradients(name):
  graph, state = built(name)
  tokens = tokens_of(SEGMENT)

  @jax.jit
  def grads(state, x):
    y = lambda state: run(graph, state, x, tokens)[0]  # noqa: E731
    return jax.value_and_grad(lambda state: jnp.sum(jnp.sin(y(state))))(state)

  x = draw()
  moved = np.where((SEGMENT > 0)[..., None], x, 5.0 - x)
  one, two = (grads(state, jnp.asarray(rows, jnp.float32)) for rows in (x, moved))
  jax.tree.map(np.testing.assert_array_equal, one, two)
  assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(one[1]))


@member
@pytest.mark.parametrize("prefill", [1, 7])
def test_token_by_token_with_a_cache_equals_the_whole_row(name, prefill):
  graph, state = built(name)
  lengths = np.array([L, 4, 9])
  x, right = draw(), whole(name, draw(), tokens_of((lengths[:, None] > SLOT).astype(np.int32)))
  cache = ATTENTION[name][1].empty_cache(len(lengths), L, jnp.float32)
  # The third row goes on after a first part that is padded.
  starts, ends = 0 * lengths, np.minimum([prefill, 4, 3], prefill)
  while (starts < ends).any():
    slot = starts[:, None] + np.arange((ends - starts).max())
    valid, here = slot < ends[:, None], np.minimum(slot, L - 1)[:, :, None]
    tokens = Tokens(*(jnp.asarray(field, jnp.int32) for field in (0 * slot, slot, valid, slot)))
    chunk = jnp.asarray(np.take_along_axis(x, here, 1), jnp.float32)
    y, after = run(graph, state, chunk, tokens, cache)
    assert jax.tree.map(jnp.shape, after) == jax.tree.map(jnp.shape, cache)
    cache = after
    # Sums over keys in rows of other lengths.
    np.testing.assert_allclose(
      np.asarray(y)[valid], np.take_along_axis(right, here, 1)[valid], rtol=1e-4, atol=1e-4,
      err_msg=f"{starts}",
    )  # fmt: skip
    starts, ends = ends, np.minimum(ends + 1, lengths)
  assert (starts == lengths).all()


@member
def test_a_row_four_times_as_long_as_any_seen_has_finite_outputs_in_its_own_shape(name):
  long = 4 * L
  x = np.random.default_rng(0).normal(size=(1, long, D))
  tokens = Tokens.of_ids(jnp.zeros((1, long), jnp.int32))
  y = whole(name, x, tokens)
  assert y.shape == x.shape and np.isfinite(y).all()
  # What came later has changed nothing; blocks and chunks are cut elsewhere.
  first = whole(name, x[:, :L], Tokens.of_ids(jnp.zeros((1, L), jnp.int32)))
  np.testing.assert_allclose(y[:, :L], first, rtol=1e-4, atol=1e-4)
