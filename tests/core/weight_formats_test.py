import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from jaxmoe.core import weight_formats


@dataclasses.dataclass(frozen=True)
class LoopGroups:
  """Groups with the plainest product: row by row."""

  sizes_S: jax.Array

  def matmul(self, rows_RD, weight_SDF):
    slots = np.repeat(np.arange(len(self.sizes_S)), self.sizes_S)
    return jnp.stack([row @ weight_SDF[slot] for row, slot in zip(rows_RD, slots)])


def test_dot_of_a_plain_array_is_the_einsum_in_the_dtype_of_the_activation():
  x = jax.random.normal(jax.random.key(0), (2, 3, 4), jnp.bfloat16)
  weight = jax.random.normal(jax.random.key(1), (4, 5, 6))
  got = weight_formats.dot(weight, x, "...d,dnh->...nh")
  assert got.dtype == jnp.bfloat16
  expected = np.einsum("bld,dnh->blnh", np.float64(x), np.float64(weight.astype(jnp.bfloat16)))
  np.testing.assert_allclose(np.float64(got), expected, rtol=1e-2, atol=2e-2)


def test_grouped_dot_multiplies_each_row_by_the_matrix_of_its_slot():
  rows = jax.random.normal(jax.random.key(0), (5, 4))
  weight = jax.random.normal(jax.random.key(1), (3, 4, 2, 6))
  got = weight_formats.grouped_dot(weight, rows, LoopGroups(np.array([2, 0, 3])))
  slots = (0, 0, 2, 2, 2)
  expected = np.stack([np.einsum("d,dgf->gf", rows[r], weight[s]) for r, s in enumerate(slots)])
  assert got.shape == (5, 2, 6)
  np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)


def test_another_format_answers_for_itself():
  @jax.tree_util.register_dataclass
  @dataclasses.dataclass(frozen=True)
  class Doubled:
    half: jax.Array

    def dot(self, x, spec):
      return 2 * weight_formats.dot(self.half, x, spec)

    def grouped_dot(self, rows, groups):
      return 2 * weight_formats.grouped_dot(self.half, rows, groups)

  x, weight = jnp.ones((2, 3)), jnp.arange(12.0).reshape(3, 4)
  np.testing.assert_array_equal(
    weight_formats.dot(Doubled(weight), x, "td,df->tf"),
    2 * weight_formats.dot(weight, x, "td,df->tf"),
  )
  assert not weight_formats.is_plain(weight, Doubled(weight))


def test_an_id_outside_a_table_gives_nan_and_never_another_row():
  table = jnp.arange(12.0).reshape(4, 3)
  rows = weight_formats.take_rows(table, jnp.array([[0, 3], [4, -1]]), jnp.float32)
  np.testing.assert_array_equal(rows[0], np.asarray(table)[[0, 3]])
  assert np.isnan(rows[1]).all()


def test_a_large_product_turns_neither_operand_round_on_the_way_back():
  shapes = (1024, 256), (256, 4, 64), (1024, 4, 64)
  x, weight, back = (jax.random.normal(jax.random.key(at), of) for at, of in enumerate(shapes))

  def both_ways(x, weight, back):
    out, pull = jax.vjp(lambda x, w: weight_formats.dot(w, x, "td,dnh->tnh"), x, weight)
    return out, *pull(back)

  step = jax.jit(both_ways).lower(x, weight, back).compile()
  if jax.default_backend() == "cpu":
    turned = [line for line in step.as_text().splitlines() if " transpose(" in line]
    assert not turned
  x64, weight64, back64 = (np.float64(array) for array in (x, weight, back))
  expected = (
    np.einsum("td,dnh->tnh", x64, weight64),
    np.einsum("tnh,dnh->td", back64, weight64),
    np.einsum("td,tnh->dnh", x64, back64),
  )
  for got, right in zip(step(x, weight, back), expected, strict=True):
    np.testing.assert_allclose(got, right, rtol=1e-5, atol=1e-4)  # of sums of 1,024 near 0
