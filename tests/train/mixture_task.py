"""All that is written for a task: a mixture of experts classifies points by rules that differ."""

import jax
import jax.numpy as jnp
import numpy as np

from jaxmoe.train.task import Task

EXPERTS, IN, HIDDEN, CLASSES = 4, 6, 16, 3


def collate(examples):
  """Returns points and labels of a list of (point, label)."""
  points, labels = zip(*examples)
  return {"x": np.stack(points), "label": np.array(labels, np.int32)}


def logits(params, x):
  """Returns the scores of classes: two of four experts for each point, and a shared one."""
  weight, chosen = jax.lax.top_k(jax.nn.softmax(x @ params["router"]), 2)
  gate = (jax.nn.one_hot(chosen, EXPERTS) * weight[..., None]).sum(1)
  hidden = jax.nn.relu(jnp.einsum("td,edf->tef", x, params["experts"]["a"]))
  routed = jnp.einsum("tef,efc,te->tc", hidden, params["experts"]["b"], gate)
  shared = jax.nn.relu(x @ params["shared"]["a"] + params["shared"]["bias"][None])
  return routed + shared @ params["shared"]["b"]


def loss(params, batch, key):
  """Returns the mean cross entropy with a tenth of the inputs dropped, and the accuracy."""
  x = batch["x"] * jax.random.bernoulli(key, 0.9, batch["x"].shape)
  scores = logits(params, x)
  picked = jnp.take_along_axis(jax.nn.log_softmax(scores), batch["label"][:, None], 1)
  return -picked.mean(), {"accuracy": (scores.argmax(-1) == batch["label"]).mean()}


def predict(params, batch, key):
  """Returns the most likely class of each point, and how likely it is."""
  chances = jax.nn.softmax(logits(params, batch["x"]))
  return {"class": chances.argmax(-1), "probability": chances.max(-1)}


TASK = Task(collate, loss, predict)


def make_params(seed=0):
  """Returns parameters drawn anew."""
  rng = np.random.default_rng(seed)
  shapes = {"router": (IN, EXPERTS), "experts": {"a": (EXPERTS, IN, HIDDEN)},
            "shared": {"a": (IN, HIDDEN), "b": (HIDDEN, CLASSES), "bias": (HIDDEN,)}}
  shapes["experts"]["b"] = (EXPERTS, HIDDEN, CLASSES)
  draw = lambda shape: jnp.asarray(rng.normal(0, 0.4, shape), jnp.float32)  # noqa: E731
  return jax.tree.map(draw, shapes, is_leaf=lambda node: isinstance(node, tuple))


_RNG = np.random.default_rng(1)
POINTS = _RNG.normal(0, 1, (100, IN)).astype(np.float32)
RULES = np.where(POINTS[:, :1] > 0, POINTS[:, 1:4], -POINTS[:, 3:])
EXAMPLES = list(zip(POINTS, RULES.argmax(1)))
