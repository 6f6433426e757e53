"""What the tests of training share: tiny models, uneven batches, quiet displays."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmoe.models.attention import SoftmaxAttention
from jaxmoe.models.block import BlockConfig
from jaxmoe.models.stack import LayerGroup
from jaxmoe.models.transformer import Decoder, TransformerConfig
from jaxmoe.moe.experts import SwiGLU
from jaxmoe.moe.layer import MoEConfig
from jaxmoe.train.observers import Observers
from jaxmoe.train.wall_clock import WallClock

VOCAB = 19


@pytest.fixture(scope="session")
def decoder_of():
  """Returns a function that makes a decoder of two MoE layers from fields of MoEConfig."""

  def make(stack=None, vocab_size=VOCAB, scan=True, tied=False, **fields):
    moe = MoEConfig(**{"num_experts": 4, "experts": SwiGLU(mlp_dim=8), **fields})
    block = BlockConfig(SoftmaxAttention(num_heads=2, num_kv_heads=1, head_dim=4), moe)
    stack = stack(block) if stack else (LayerGroup((block,), repeats=2),)
    return Decoder(TransformerConfig(dim=8, stack=stack, tied=tied, scan=scan), vocab_size)

  return make


@pytest.fixture(scope="session")
def params_of():
  """Returns a function (decoder, seed) -> parameters that stay the same if initialisation changes.

  Norm scales are not all one, and gates are sharp, so that routers have an opinion.
  """

  def make(decoder, seed=0):
    def at(path, leaf):
      name = "/".join(str(piece.key) for piece in path)
      rng = np.random.default_rng([seed, *name.encode()])
      if name.endswith("scale"):
        return jnp.asarray(rng.uniform(0.5, 1.5, leaf.shape), leaf.dtype)
      deviation = 1.0 if name.endswith("gate/weight") else 0.35
      return jnp.asarray(rng.normal(0, deviation, leaf.shape), leaf.dtype)

    return jax.tree_util.tree_map_with_path(at, decoder.shapes)

  return make


@pytest.fixture(scope="session")
def batch_of():
  """Returns a function from the documents' lengths of each row to a batch with some labels."""

  def make(rows, length, vocab_size=VOCAB, seed=0, scored=0.8):
    rng = np.random.default_rng(seed)
    shape = (len(rows), length)
    batch = {name: np.zeros(shape, np.int32) for name in ("position", "segment")}
    for row, lengths in enumerate(rows):
      start = 0
      for document, size in enumerate(lengths, start=1):
        batch["segment"][row, start : start + size] = document
        batch["position"][row, start : start + size] = np.arange(size)
        start += size
    # The rows of a microbatch have letters of their own, so that its experts differ, too.
    low = np.arange(len(rows))[:, None] * vocab_size // (2 * len(rows))
    ids = low + rng.integers(0, vocab_size // 2, shape)
    has_label = (batch["segment"] > 0) & (rng.random(shape) < scored)
    labels = np.where(has_label, rng.integers(0, vocab_size, shape), -1)
    return {"ids": ids.astype(np.int32), "labels": labels.astype(np.int32), **batch}

  return make


@pytest.fixture
def display():
  """Returns a display that keeps what it is told instead of printing it."""
  seen = types.SimpleNamespace(said=[], lines=[])

  class Silent:
    said, lines = seen.said, seen.lines

    def say(self, text):
      seen.said.append(text)

    def phase(self, name, **options):
      seen.said.append(name)
      return _nothing()

    def start(self, step):
      seen.said.append(f"start {step}")

    def step(self, line):
      seen.lines.append(line)

  return Silent()


@pytest.fixture
def observers(display):
  """Returns onlookers that write nothing; events are kept in `observers.log.seen`."""
  log = types.SimpleNamespace(seen=[], sync=lambda: None, step=lambda line: None)
  log.event = lambda kind, time=None, **fields: log.seen.append({"event": kind, **fields})
  watchdog = types.SimpleNamespace(beat=lambda doing: None)
  return Observers(log, display, WallClock(), watchdog)


class _nothing:
  def __enter__(self):
    return None

  def __exit__(self, *error):
    return False
