import numpy as np

from jaxmoe.optim import Constant, Muon, Optim, make_optimizer

SIZES = {"layer": 2, "expert": 3, "embed": 6, "gate": 2, "mlp": 4, "heads": 2, "head": 5}
SIZES["vocab"] = 7
QUINTIC = (3.4445, -4.7750, 2.0315)


def orthogonalize(matrix, iterations=5):
  """Newton-Schulz by the quintic a X + b (X X') X + c (X X')^2 X from unit Frobenius norm."""
  a, b, c = QUINTIC
  x = matrix / (np.linalg.norm(matrix) + 1e-8)
  for _ in range(iterations):
    gram = x @ x.T
    x = a * x + b * gram @ x + c * gram @ gram @ x
  return x


def oracle(param, gradients, rate, beta, decay):
  """Nesterov momentum with bias correction, orthogonalized, at the rms of an AdamW update."""
  momentum = np.zeros_like(param)
  for t, gradient in enumerate(gradients, start=1):
    momentum = beta * momentum + (1 - beta) * gradient
    ahead = beta * momentum / (1 - beta ** (t + 1)) + (1 - beta) * gradient / (1 - beta**t)
    step = 0.2 * np.sqrt(max(param.shape)) * orthogonalize(ahead)
    param = param - rate * (step + decay * param)
    yield param


def run(follow, name, dims, optimizer, steps=4, **fields):
  random = np.random.default_rng(1)
  shape = tuple(SIZES[dim] for dim in dims)
  param, *gradients = random.normal(size=(steps + 1, *shape))
  optim = Optim(optimizer, Constant(), learning_rate=0.1, clip_norm=None, **fields)
  transform = make_optimizer(optim, steps, {"w": name}, {"w": dims})
  got = follow(transform, {"w": param}, [{"w": gradient} for gradient in gradients])
  return param, gradients, [step["w"] for step in got]


def check(got, param, gradients, cut):
  """Compares with the oracle on the matrix that `cut` takes out of a leaf."""
  path = oracle(cut(param), [cut(gradient) for gradient in gradients], 0.1, 0.9, 0.3)
  for step, want in zip(got, path, strict=True):
    np.testing.assert_allclose(cut(step), want, rtol=1e-5, atol=1e-5)


MUON = Muon(beta=0.9, weight_decay=0.3)


def test_gate_and_up_of_every_layer_and_expert_are_matrices_of_their_own(follow):
  dims = ("layer", "expert", "embed", "gate", "mlp")
  param, gradients, got = run(follow, "layers/0/moe/experts/gate_up", dims, MUON)
  for layer, expert, half in np.ndindex(2, 3, 2):
    check(got, param, gradients, lambda x, at=(layer, expert), half=half: x[at][:, half])


def test_the_heads_of_a_query_are_one_side_of_one_matrix(follow):
  dims = ("layer", "embed", "heads", "head")
  param, gradients, got = run(follow, "layers/0/attention/q", dims, MUON)
  for layer in range(2):
    check(got, param, gradients, lambda x, layer=layer: x[layer].reshape(6, 10))


def test_the_heads_of_an_output_are_the_other_side(follow):
  dims = ("layer", "heads", "head", "embed")
  param, gradients, got = run(follow, "layers/0/attention/o", dims, MUON)
  for layer in range(2):
    check(got, param, gradients, lambda x, layer=layer: x[layer].reshape(10, 6))


def test_a_step_turns_the_gradient_into_nearly_the_orthogonal_factor_of_its_svd(follow):
  optimizer = Muon(weight_decay=0.0, update_rms=1.0)
  param, gradients, got = run(follow, "w", ("embed", "mlp"), optimizer, steps=1)
  direction = (param - got[0]) / (0.1 * np.sqrt(6))
  left, _, right = np.linalg.svd(gradients[0], full_matrices=False)
  inner = left.T @ direction @ right.T
  # The quintic maps singular values into about [0.68, 1.14] and keeps the singular vectors.
  assert np.all((np.diag(inner) > 0.65) & (np.diag(inner) < 1.2))
  np.testing.assert_allclose(inner, np.diag(np.diag(inner)), atol=1e-4)


def test_vectors_and_named_matrices_go_by_adam(follow):
  # The first Adam step is the sign of the gradient; a Muon step is not.
  for name, dims in (
    ("layers/0/norm/bias", ("layer", "embed")),
    ("layers/0/attention/k_bias", ("layer", "heads", "head")),
    ("embed/table", ("vocab", "embed")),
    ("head/table", ("embed", "vocab")),
    ("layers/0/moe/router", ("layer", "embed", "expert")),
  ):
    optimizer = Muon(weight_decay=0.0, adam_names=("embed/*", "head/*", "*router"))
    param, gradients, got = run(follow, name, dims, optimizer, steps=1)
    np.testing.assert_allclose(param - got[0], 0.1 * np.sign(gradients[0]), rtol=1e-4)


def test_an_expert_without_gradient_does_not_move(follow):
  dims = ("layer", "expert", "embed", "gate", "mlp")
  random = np.random.default_rng(0)
  param, gradient = random.normal(size=(2, *(SIZES[dim] for dim in dims)))
  gradient[:, 1] = 0.0
  optim = Optim(Muon(weight_decay=0.0), Constant(), learning_rate=0.1)
  transform = make_optimizer(optim, 1, {"w": "w"}, {"w": dims})
  (got,) = follow(transform, {"w": param.astype(np.float32)}, [{"w": gradient}])
  np.testing.assert_array_equal(got["w"][:, 1], param.astype(np.float32)[:, 1])
  assert (got["w"][:, ::2] != param.astype(np.float32)[:, ::2]).all()
