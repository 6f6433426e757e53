import numpy as np

from jaxmoe.optim import Constant, Lion, Optim, make_optimizer


def oracle(param, gradients, rate, b1, b2, decay):
  """The sign of one average of momentum and gradient; the momentum is another."""
  momentum = np.zeros_like(param)
  for gradient in gradients:
    sign = np.sign(b1 * momentum + (1 - b1) * gradient)
    param = param - rate * (sign + decay * param)
    momentum = b2 * momentum + (1 - b2) * gradient
    yield param


def test_lion_equals_the_paper(follow):
  random = np.random.default_rng(0)
  param = random.normal(size=(3, 5))
  gradients = [random.normal(size=(3, 5)) for _ in range(6)]
  optimizer = Lion(b1=0.7, b2=0.95, weight_decay=0.5)
  optim = Optim(optimizer, Constant(), learning_rate=0.1, clip_norm=None)
  transform = make_optimizer(optim, 6, {"w": "w"}, {"w": ("embed", "mlp")})
  got = follow(transform, {"w": param}, [{"w": gradient} for gradient in gradients])
  for step, want in zip(got, oracle(param, gradients, 0.1, 0.7, 0.95, 0.5), strict=True):
    np.testing.assert_allclose(step["w"], want, rtol=1e-5, atol=1e-6)
