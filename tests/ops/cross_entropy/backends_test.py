import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmoe.ops.cross_entropy import BACKENDS, VocabShard, chunks, mosaic_tpu
from jaxmoe.ops.cross_entropy.mosaic_tpu import LogitTiles

PLAIN = {name: BACKENDS[name] for name in ("chunks", "reference")}
TILED = functools.partial(mosaic_tpu, tiles=LogitTiles(4, 8, interpret=True))
FORMS = {**PLAIN, "mosaic_tpu": TILED}
backend = pytest.mark.parametrize("loss_of", FORMS.values(), ids=FORMS.keys())
T, D, V = 22, 8, 37
CHUNKS = [1, 4, 5, 11, 21, 22, 100]


def inputs(seed=0):
  rng = np.random.default_rng(seed)
  labels = rng.integers(0, V, T)
  labels[[3, 20, 21]] = -1
  return rng.normal(size=(T, D)), rng.normal(size=(D, V)), labels


def oracle(hidden, head, labels, nll_weight, lse_weight):
  """Returns float64 (nll, lse) and the gradients of their weighted sums by the textbook formula."""
  logits = hidden @ head
  lse = np.log(np.exp(logits).sum(-1))
  scored = labels >= 0
  nll = np.where(scored, lse - logits[np.arange(T), np.maximum(labels, 0)], 0)
  probs = np.exp(logits - lse[:, None])
  onehot = np.eye(V)[np.maximum(labels, 0)]
  grad = nll_weight[:, None] * (probs - onehot) + lse_weight[:, None] * probs
  grad *= scored[:, None]
  return nll, np.where(scored, lse, 0), grad @ head.T, hidden.T @ grad


@backend
@pytest.mark.parametrize("chunk", CHUNKS)
@pytest.mark.parametrize("tied", [False, True])
def test_losses_and_gradients_equal_the_float64_formula(loss_of, chunk, tied):
  hidden, head, labels = inputs()
  nll_weight, lse_weight = np.random.default_rng(1).normal(size=(2, T))
  spec = "td,vd->tv" if tied else "td,dv->tv"

  def loss(hidden, weight):
    nll, lse = loss_of(hidden, weight, spec, jnp.asarray(labels), chunk)
    return jnp.sum(nll * nll_weight) + jnp.sum(lse * lse_weight), (nll, lse)

  weight = jnp.asarray(head.T if tied else head, jnp.float32)
  run = jax.jit(jax.grad(loss, (0, 1), has_aux=True))
  (grad_hidden, grad_weight), (nll, lse) = run(jnp.asarray(hidden, jnp.float32), weight)
  expected = oracle(hidden, head, labels, nll_weight, lse_weight)
  got = nll, lse, grad_hidden, grad_weight.T if tied else grad_weight
  for one, other in zip(got, expected, strict=True):
    assert one.dtype == jnp.float32
    np.testing.assert_allclose(one, other, rtol=1e-5, atol=2e-5)


@backend
def test_tokens_without_label_give_and_get_exact_zeros(loss_of):
  hidden, head, labels = inputs()
  fn = functools.partial(loss_of, spec="td,dv->tv", labels_T=jnp.asarray(labels), chunk=5)
  nll, grads = jax.value_and_grad(lambda *x: jnp.sum(fn(*x)[0]))(
    jnp.asarray(hidden, jnp.float32), jnp.asarray(head, jnp.float32)
  )
  assert nll > 0
  np.testing.assert_array_equal(grads[labels < 0], 0.0)
  assert np.all(np.any(grads[labels >= 0] != 0, axis=-1))
  none = -jnp.ones(T, jnp.int32)
  unscored, _ = loss_of(jnp.asarray(hidden), jnp.asarray(head), "td,dv->tv", none, 5)
  np.testing.assert_array_equal(unscored, 0.0)


@backend
def test_bfloat16_hidden_states_give_float32_losses_of_the_rounded_numbers(loss_of):
  hidden, head, labels = inputs()
  rounded = [jnp.asarray(x, jnp.bfloat16) for x in (hidden, head)]
  nll, _ = jax.jit(lambda *x: loss_of(*x, "td,dv->tv", jnp.asarray(labels), 5))(*rounded)
  assert nll.dtype == jnp.float32
  wide = [np.asarray(x, np.float64) for x in rounded]
  expected = oracle(*wide, labels, np.zeros(T), np.zeros(T))[0]
  np.testing.assert_allclose(nll, expected, rtol=1e-5, atol=1e-5)


@backend
def test_a_label_past_the_vocabulary_is_loud(loss_of):
  nll, _ = loss_of(jnp.ones((2, D)), jnp.ones((D, V)), "td,dv->tv", jnp.asarray([V, 0]), 4)
  assert np.isnan(nll[0]) and np.isfinite(nll[1])


@backend
@pytest.mark.parametrize("devices", [2, 4])
def test_a_head_over_devices_has_the_loss_and_the_gradients_of_one(loss_of, devices):
  hidden, head, labels = inputs()
  labels = jnp.asarray(labels)
  room = -(-V // devices)
  padded = np.pad(head, [(0, 0), (0, devices * room - V)], constant_values=7.0)
  mesh = jax.sharding.Mesh(np.array(jax.devices()[:devices]), ("tensor",))
  hidden = jnp.asarray(hidden, jnp.float32)

  def graded(part, hidden, head):
    def loss(hidden, head):
      return jnp.sum(jnp.sin(sum(loss_of(hidden, head, "td,dv->tv", labels, 5, part))))

    value, (d_hidden, d_head) = jax.value_and_grad(loss, (0, 1))(hidden, head)
    # The cotangent of a sum over devices is that sum's on each of them.
    return (value, jax.lax.psum(d_hidden, "tensor"), d_head) if part else (value, d_hidden, d_head)

  part, columns = VocabShard("tensor", V), jax.P(None, "tensor")
  found = jax.jit(jax.shard_map(
    functools.partial(graded, part), mesh=mesh, in_specs=(jax.P(), columns),
    out_specs=(jax.P(), jax.P(), columns), check_vma=False,
  ))(hidden, jnp.asarray(padded, jnp.float32))  # fmt: skip
  value, d_hidden, d_head = jax.jit(functools.partial(graded, None))(
    hidden, jnp.asarray(head, jnp.float32)
  )
  np.testing.assert_allclose(found[0], value, rtol=1e-5)
  np.testing.assert_allclose(found[1] / devices, d_hidden, rtol=1e-4, atol=1e-5)
  np.testing.assert_allclose(found[2][:, :V] / devices, d_head, rtol=1e-4, atol=1e-5)
  np.testing.assert_array_equal(found[2][:, V:], 0)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Doubled:
  """A weight format with a field that is not differentiable."""

  half: jax.Array
  factor: jax.Array

  def dot(self, x, spec):
    return jnp.einsum(spec, x, self.half) * self.factor.astype(x.dtype)

  def grouped_dot(self, rows_RD, groups):
    raise NotImplementedError


@pytest.mark.parametrize("loss_of", PLAIN.values(), ids=PLAIN.keys())
@pytest.mark.parametrize("chunk", [5, T])
def test_any_weight_format_works_through_its_dot(loss_of, chunk):
  hidden, head, labels = (jnp.asarray(x) for x in inputs())

  def loss(half):
    weight = Doubled(half, jnp.asarray(2))
    return jnp.sum(loss_of(hidden, weight, "td,dv->tv", labels, chunk)[0])

  plain, grad = jax.value_and_grad(
    lambda head: jnp.sum(loss_of(hidden, head, "td,dv->tv", labels, chunk)[0])
  )(head)
  doubled, grad_half = jax.value_and_grad(loss)(head / 2)
  np.testing.assert_allclose(doubled, plain, rtol=1e-6)
  np.testing.assert_allclose(grad_half, 2 * grad, rtol=1e-5, atol=1e-6)


def largest_size(jaxpr):
  """Returns the element count of the largest array made anywhere in a jaxpr."""
  sizes = [0]
  for eqn in jaxpr.eqns:
    sizes += [var.aval.size for var in eqn.outvars]
    for value in jax.tree.leaves(eqn.params, is_leaf=lambda x: hasattr(x, "eqns")):
      inner = getattr(value, "jaxpr", value)
      if hasattr(inner, "eqns"):
        sizes.append(largest_size(inner))
  return max(sizes)


def test_logits_of_all_tokens_never_exist():
  tokens, dim, vocabulary, chunk = 4096, 4, 512, 64

  def loss(hidden, head, labels):
    return jnp.sum(chunks(hidden, head, "td,dv->tv", labels, chunk)[0])

  shapes = [((tokens, dim), "float32"), ((dim, vocabulary), "float32"), ((tokens,), "int32")]
  args = [jax.ShapeDtypeStruct(*shape) for shape in shapes]
  gradient = jax.grad(loss, (0, 1))
  assert chunk * vocabulary <= largest_size(jax.make_jaxpr(gradient)(*args).jaxpr)
  assert largest_size(jax.make_jaxpr(gradient)(*args).jaxpr) < tokens * vocabulary // 16
  compiled = jax.jit(gradient).lower(*args).compile()
  assert compiled.memory_analysis().temp_size_in_bytes < tokens * vocabulary * 4 // 8


def test_a_chunk_below_one_is_refused():
  with pytest.raises(ValueError, match="at least one"):
    chunks(jnp.ones((2, D)), jnp.ones((D, V)), "td,dv->tv", jnp.zeros(2, int), 0)
