"""What is said to be alike on several devices is equal there, and what is not said differs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from jaxmoe.parallel import Parallel, Varying, find_replicated, make_mesh

DEGREES = {"data": 2, "expert": 2, "tensor": 2}
X, W = (4, 6), (6, 6)


def psum(x, w):
  return jax.lax.psum(x @ w, "tensor")


def gathered(x, w):
  return jax.lax.all_gather(x, "data", tiled=True)[: len(x)] @ w


def gathered_by_two(x, w):
  return jax.lax.psum(jax.lax.all_gather(x @ w, ("data", "expert"), tiled=True)[:4], "tensor")


def scattered(x, w):
  parts = jax.lax.psum_scatter(jax.lax.psum(x @ w, "tensor"), "tensor", tiled=True)
  return jnp.concatenate([parts, parts])


def exchanged(x, w):
  summed = jax.lax.psum(x @ w, ("expert", "tensor"))
  return jax.lax.all_to_all(summed, "expert", 0, 0, tiled=True)


def sliced_by_place(x, w):
  summed = jax.lax.psum(x @ w, "tensor")
  return jnp.tile(jax.lax.dynamic_slice_in_dim(summed, jax.lax.axis_index("tensor") * 2, 2), (2, 1))


def largest(x, w):
  return jax.lax.pmax(x @ w, "expert")


def carried_round_two(x, w):
  """The second of what is carried varies over `tensor` from the second round on."""

  def body(carry, _):
    first, _ = carry
    return (first @ w, first), None

  start = jax.lax.psum(x, "tensor")
  return jax.lax.scan(body, (start, start), None, length=3)[0][1]


def carried_alike(x, w):
  def body(carry, scale):
    return jax.lax.psum(carry @ w, "tensor") * scale, None

  return jax.lax.scan(body, jax.lax.psum(x, "tensor"), jnp.arange(1.0, 3.0))[0]


def as_often_as_its_place(x, w):
  once = jax.lax.psum(x @ w, "tensor")
  times = jax.lax.axis_index("tensor") + 1
  return jax.lax.while_loop(lambda c: c[0] < times, lambda c: (c[0] + 1, c[1] * 2), (0, once))[1]


def one_of_two(x, w):
  once = jax.lax.psum(x @ w, "tensor")
  first = jax.lax.axis_index("tensor") == 0
  return jax.lax.cond(first, lambda y: y, lambda y: y + 1, once)


def either_alike(x, w):
  once = jax.lax.psum(x @ w, "tensor")
  first = jax.lax.psum(x, ("data", "expert", "tensor")).sum() > 0
  return jax.lax.cond(first, lambda y: y, lambda y: y + 1, once)


@jax.custom_vjp
def _ruled(x):
  return jax.lax.psum(x, "tensor")


_ruled.defvjp(lambda x: (_ruled(x), None), lambda _, g: (g,))


def within_calls(x, w):
  return jax.jit(jax.checkpoint(lambda x: _ruled(x @ w)))(x)


PROGRAMS = [
  psum, gathered, gathered_by_two, scattered, exchanged, sliced_by_place, largest,
  carried_round_two, carried_alike, as_often_as_its_place, one_of_two, either_alike, within_calls,
]  # fmt: skip


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda program: program.__name__)
def test_what_is_alike_is_equal_on_the_devices(program):
  mark = jnp.asarray(np.linspace(0.5, 1.5, X[-1] * 11).reshape(X[-1], 11), jnp.float32)

  def marked(x, w):
    return program(x, w) @ mark  # of a shape that nothing else has

  rng = np.random.default_rng(0)
  x, w = (rng.normal(size=size).astype(np.float32) for size in ((4 * X[0], X[1]), (W[0], 2 * W[1])))
  mesh = make_mesh(Parallel(**DEGREES), jax.devices())
  everywhere = P(None, None, *DEGREES)
  made = jax.jit(jax.shard_map(
    lambda x, w: marked(x, w)[..., None, None, None], mesh=mesh,
    in_specs=(P(("data", "expert")), P(None, "tensor")), out_specs=everywhere, check_vma=False,
  ))(x, w)  # fmt: skip
  made = np.asarray(made)
  equal = tuple(
    axis for at, axis in enumerate(DEGREES)
    if np.array_equal(np.take(made, 0, axis=2 + at), np.take(made, 1, axis=2 + at))
  )  # fmt: skip
  traced = jax.make_jaxpr(marked, axis_env=list(DEGREES.items()))(jnp.ones(X), jnp.ones(W))
  given = [Varying(frozenset({"data", "expert"}), of_batch=True), Varying(frozenset({"tensor"}))]
  said = {one.axes for one in find_replicated(traced, given, DEGREES) if one.shape == (X[0], 11)}
  assert said == ({equal} if equal else set())


def test_only_what_is_of_the_batch_and_in_memory_counts_and_the_largest_comes_first():
  def program(x, w):
    big = jax.lax.psum(x, "tensor")
    wide = jnp.broadcast_to(big[:, None], (4, 100, 6))  # never in memory
    return jnp.tanh(wide).sum(1) @ (w @ w), jax.lax.psum(x[:2] @ w, "tensor")

  traced = jax.make_jaxpr(program, axis_env=list(DEGREES.items()))(jnp.ones(X), jnp.ones(W))
  given = [Varying(frozenset({"data", "expert", "tensor"}), of_batch=True), Varying()]
  found = find_replicated(traced, given, DEGREES)
  assert [(one.shape, one.bytes) for one in found] == [((4, 6), 96), ((2, 6), 48)]
  assert {one.axes for one in found} == {("tensor",)}
  assert str(found[0]) == "(4, 6) float32, alike over tensor"


def test_axes_of_one_device_do_not_count():
  traced = jax.make_jaxpr(psum, axis_env=list(DEGREES.items()))(jnp.ones(X), jnp.ones(W))
  given = [Varying(frozenset({"data", "expert"}), of_batch=True), Varying(frozenset({"tensor"}))]
  assert find_replicated(traced, given, {"data": 2, "expert": 2, "tensor": 1}) == ()
