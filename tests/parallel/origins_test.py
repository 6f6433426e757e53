"""Origins are those that a change of an argument shows: what is not named does not move."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmoe.parallel.origins import origins_of


def loop(a, b, c):
  """A scan whose carry is made of a and b, one of whose rows is of b alone."""
  (x, _), rows = jax.lax.scan(
    lambda carry, row: ((carry[0] + carry[1], carry[1]), (2 * row, carry[0])), (a[0], a[1]), b
  )
  return x, *rows, c


def late(a, b, c):
  """A carry in which b shows after two rounds."""
  return jax.lax.fori_loop(0, 3, lambda _, x: (x[1] + a[0], x[2], b[0]), (a[0], a[1], a[2]))


def counted(a, b, c):
  """How often the loop runs is of b."""
  return jax.lax.while_loop(lambda x: x[0] < b[0], lambda x: (x[0] + 1, x[1] * 2), (c[0], a[0]))


def branches(a, b, c):
  return jax.lax.cond(a[0] > 0, lambda: (b[0], b[1]), lambda: (c[0], b[2]))


def apart(a, b, c):
  return (*jax.lax.optimization_barrier((a, b)), jax.jit(jnp.dot)(b, c))


@pytest.mark.parametrize("function", [loop, late, counted, branches, apart])
def test_each_result_is_made_of_the_arguments_that_can_change_it(function):
  given = [jnp.arange(1.0, 4.0) + 3 * at for at in range(3)]
  program = jax.make_jaxpr(function)(*given)
  names = "abc"
  found = origins_of(program.jaxpr, [frozenset(name) for name in names])
  true = jax.tree.leaves(function(*given))
  moved = [set() for _ in true]
  for at, name in enumerate(names):
    for change in (-20.0, -1.0, 0.5, 7.0):
      other = [leaf + change * (place == at) for place, leaf in enumerate(given)]
      for seen, now, before in zip(moved, jax.tree.leaves(function(*other)), true, strict=True):
        if not np.array_equal(now, before):
          seen.add(name)
  assert all(seen <= of for seen, of in zip(moved, found, strict=True)), (moved, found)
  if function not in (late, branches):  # a loop may forget, a branch not be taken
    assert moved == [set(of) for of in found]
