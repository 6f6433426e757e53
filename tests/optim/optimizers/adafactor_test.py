import jax
import numpy as np
import pytest

from jaxmoe.optim import Adafactor, Constant, Optim, make_optimizer


def rms(x):
  return np.sqrt(np.mean(x**2))


def oracle(param, gradients, rate, clip, factored, scaled):
  """Algorithms 4 (matrices) and 5 (vectors) with the relative step of algorithm 6."""
  rows = columns = second = 0.0
  for t, gradient in enumerate(gradients, start=1):
    beta = 1 - t**-0.8
    square = gradient**2 + 1e-30
    if factored:
      rows = beta * rows + (1 - beta) * square.sum(axis=1)
      columns = beta * columns + (1 - beta) * square.sum(axis=0)
      second = np.outer(rows, columns) / rows.sum()
    else:
      second = beta * second + (1 - beta) * square
    direction = gradient / np.sqrt(second)
    direction = direction / max(1.0, rms(direction) / clip)
    param = param - rate * (max(1e-3, rms(param)) if scaled else 1.0) * direction
    yield param


@pytest.mark.parametrize("scaled", [True, False])
@pytest.mark.parametrize("factored", [True, False])
def test_adafactor_equals_the_paper_in_every_layer_and_expert(follow, factored, scaled):
  random = np.random.default_rng(0)
  shape = (2, 3, 4, 5)
  # Blocks of very different size: joint statistics, clipping or scaling would show at once.
  size = 10.0 ** random.uniform(-2, 2, size=(2, 3, 1, 1))
  param = random.normal(size=shape) * size
  gradients = [random.normal(size=shape) ** 3 * size[::-1, ::-1] for _ in range(5)]
  optimizer = Adafactor(
    clip_rms=0.8, scale_by_parameter=scaled, min_dim_size_to_factor=2 if factored else 128
  )
  optim = Optim(optimizer, Constant(), learning_rate=0.1, clip_norm=None)
  dims = {"w": ("layer", "expert", "mlp", "embed")}
  transform = make_optimizer(optim, 5, {"w": "layers/0/moe/experts/down"}, dims)
  got = follow(transform, {"w": param}, [{"w": gradient} for gradient in gradients])
  for block in np.ndindex(2, 3):
    path = oracle(param[block], [g[block] for g in gradients], 0.1, 0.8, factored, scaled)
    for step, want in zip(got, path, strict=True):
      np.testing.assert_allclose(step["w"][block], want, rtol=1e-5, atol=1e-5 * abs(want).max())


def test_a_vector_keeps_its_full_second_moment(follow):
  random = np.random.default_rng(0)
  param, gradients = random.normal(size=6), [random.normal(size=6) for _ in range(5)]
  optim = Optim(Adafactor(), Constant(), learning_rate=0.1, clip_norm=None)
  transform = make_optimizer(optim, 5, {"b": "b"}, {"b": ("embed",)})
  got = follow(transform, {"b": param}, [{"b": gradient} for gradient in gradients])
  for step, want in zip(got, oracle(param, gradients, 0.1, 1.0, False, True), strict=True):
    np.testing.assert_allclose(step["b"], want, rtol=1e-5, atol=1e-6)


def test_factored_moments_are_as_large_as_rows_and_columns():
  optim = Optim(Adafactor(min_dim_size_to_factor=8), Constant())
  names, dims = {"w": "w"}, {"w": ("layer", "expert", "embed", "mlp")}
  params = {"w": jax.ShapeDtypeStruct((2, 3, 8, 16), np.float32)}
  state = jax.eval_shape(make_optimizer(optim, 5, names, dims).init, params)
  sizes = sorted(leaf.size for leaf in jax.tree.leaves(state) if leaf.size > 1)
  assert sizes == [6, 2 * 3 * 8, 2 * 3 * 16]
