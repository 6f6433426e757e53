"""The embedding table."""

from __future__ import annotations

from flax import nnx

from jaxmoe.core.init import Init


class Embed(nnx.Module):
  """The embedding table; a row a token id."""

  def __init__(self, init: Init, vocab_size: int, dim: int, tied: bool):
    # Unit variance, like what norms make of the stream; a tied table is also the head, whose
    # logits start near uniform only if its rows have about unit length.
    fan_in = dim if tied else 1
    self.table = init.weight("table", (vocab_size, dim), ("vocab", "embed"), fan_in)
