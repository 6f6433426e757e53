import numpy as np

from jaxmoe.optim import AdamW, Constant, Optim, make_optimizer

NAMES = {"w": "layers/0/w", "scale": "final_norm/scale"}
DIMS = {"w": ("embed", "mlp"), "scale": ("embed",)}


def oracle(param, gradients, rates, b1, b2, eps, decay):
  """Adam's two bias-corrected moments; decay beside them, times the rate."""
  first, second = np.zeros_like(param), np.zeros_like(param)
  for t, (gradient, rate) in enumerate(zip(gradients, rates), start=1):
    first = b1 * first + (1 - b1) * gradient
    second = b2 * second + (1 - b2) * gradient**2
    step = (first / (1 - b1**t)) / (np.sqrt(second / (1 - b2**t)) + eps)
    param = param - rate * step - rate * decay * param
    yield param


def test_adamw_equals_the_paper_with_decay_by_name(follow):
  random = np.random.default_rng(0)
  params = {"w": random.normal(size=(3, 5)), "scale": random.normal(size=3)}
  gradients = [
    {"w": random.normal(size=(3, 5)), "scale": random.normal(size=3)} for _ in range(6)
  ]
  optimizer = AdamW(b1=0.8, b2=0.9, eps=1e-3, weight_decay=0.3)
  optim = Optim(optimizer, Constant(warmup_steps=3), learning_rate=0.1, clip_norm=None)
  got = follow(make_optimizer(optim, 6, NAMES, DIMS), params, gradients)
  rates = [0.025, 0.05, 0.075, 0.1, 0.1, 0.1]
  for name, decay in (("w", 0.3), ("scale", 0.0)):
    path = oracle(params[name], [g[name] for g in gradients], rates, 0.8, 0.9, 1e-3, decay)
    for step, want in zip(got, path, strict=True):
      np.testing.assert_allclose(step[name], want, rtol=1e-5, atol=1e-6)
