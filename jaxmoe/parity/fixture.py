"""The small model, batch and parameters that a cell is tried with.

Widths differ from each other, so that no dim can be taken for another, and are large enough for
the norm of all gradients to stand out from rounding; documents are packed and some rows end in
padding; gates are sharp, so that no rounding changes a choice (`margin` says by
how much none does); scales are not one, so that no norm is a copy of another.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxmoe.core.parallel_context import ParallelContext
from jaxmoe.core.rng import Keys
from jaxmoe.core.tokens import Tokens
from jaxmoe.models.attention_base import AttentionBase
from jaxmoe.models.block import BlockConfig
from jaxmoe.models.rope_scaling import DynamicRope
from jaxmoe.models.stack import LayerGroup, Remat
from jaxmoe.models.transformer import Decoder, Params, TransformerConfig
from jaxmoe.moe.balance import LoadBalance, RouterZ
from jaxmoe.moe.dispatch import AllToAll
from jaxmoe.moe.dispatch.capacity import Limited
from jaxmoe.moe.layer import MoEConfig
from jaxmoe.parity.cells import Cell, chooser_of, parts_of
from jaxmoe.train.gradients import Batch

VOCAB, ROWS, LENGTH, DIM = 61, 8, 8, 36
BALANCE = (
  LoadBalance(0.5, "global"), LoadBalance(0.3, "sequence"), LoadBalance(0.2, "micro"),
  RouterZ(0.01),
)  # fmt: skip


def decoder_of(cell: Cell) -> Decoder:
  """Returns the model of a cell's components on one device, with a shared expert.

  It has two layers; of a pipeline five, which no number of stages above one divides.
  """
  parts = parts_of(cell)
  dispatch = parts["dispatch"]
  if isinstance(dispatch, Limited):  # with its usual room it would drop none of so few tokens
    dispatch = dataclasses.replace(dispatch, factor=0.6)
  exchange = parts["exchange"]
  if isinstance(exchange, AllToAll) and exchange.bound is not None:
    exchange = dataclasses.replace(exchange, bound=0.9)
  moe = MoEConfig(
    num_experts=4,
    num_active=parts["router"].fixed_active or 2,
    router=parts["router"],
    experts=parts["experts"],
    dispatch=dispatch,
    exchange=exchange,
    shared_mlp_dim=24,
    balance=BALANCE,
  )
  attention = parts["attention"]
  if isinstance(attention, AttentionBase):
    attention = dataclasses.replace(attention, num_heads=4, num_kv_heads=2, head_dim=4)
  if cell.parallel.context > 1 and cell.attention == "qk_norm":
    # Its angles depend on the length of the row, so that the length of a part would show.
    attention = dataclasses.replace(attention, rope=DynamicRope(original=4))
  if cell.mask != "document":
    attention = dataclasses.replace(attention, mask=parts["mask"])
  block = BlockConfig(attention, moe)
  remat: Remat = "full" if cell.parallel.partition_activations else "none"
  layers = 2 if cell.parallel.pipe == 1 else 5
  model = TransformerConfig(dim=DIM, stack=(LayerGroup((block,), repeats=layers),), remat=remat)
  return Decoder(model, VOCAB, ParallelContext(chooser=chooser_of(cell)))


def params_of(decoder: Decoder, seed: int = 7) -> Params:
  """Returns parameters that depend on their names alone."""

  def at(path: Any, leaf: Any) -> jax.Array:
    name = "/".join(str(piece.key) for piece in path)
    rng = np.random.default_rng([seed, *name.encode()])
    if "/buffers/" in name:
      drawn = np.abs(rng.normal(0.5, 0.1, leaf.shape))
    elif name.endswith("scale"):
      drawn = rng.uniform(0.5, 1.5, leaf.shape)
    else:
      # A stream of about unit size: a norm would multiply the rounding of a smaller one's gradient.
      deviation = {"embed": 1.0, "gate": 2 * DIM**-0.5}
      part = next((piece for piece in name.split("/") if piece in deviation), "")
      drawn = rng.normal(0, deviation.get(part, DIM**-0.5), leaf.shape)
    return jnp.asarray(drawn, leaf.dtype)

  return jax.tree_util.tree_map_with_path(at, decoder.shapes)


def batch_of(seed: int = 0) -> dict[str, np.ndarray]:
  """Returns packed rows, of which one is empty and some end in padding."""
  rng = np.random.default_rng(seed)
  shape = (ROWS, LENGTH)
  segment, position = np.zeros(shape, np.int32), np.zeros(shape, np.int32)
  for row in range(ROWS - 1):
    start, document = 0, 1
    end = LENGTH - int(rng.integers(0, 3))
    while start < end:
      size = min(int(rng.integers(2, LENGTH)), end - start)
      segment[row, start : start + size] = document
      position[row, start : start + size] = np.arange(size)
      start, document = start + size, document + 1
  scored = (segment > 0) & (rng.random(shape) < 0.8)
  labels = np.where(scored, rng.integers(0, VOCAB, shape), -1).astype(np.int32)
  ids = rng.integers(0, VOCAB, shape).astype(np.int32)
  batch = {"ids": ids, "labels": labels, "position": position, "segment": segment}
  return {**batch, "domain": np.zeros(shape, np.int32)}


def margin(decoder: Decoder, params: Params, batch: Batch) -> float:
  """Returns the least difference between the scores of a chosen and an unchosen expert."""
  tokens = dataclasses.replace(Tokens.of_batch(batch), return_routing=True)
  _, _, sums = decoder.hidden(params, tokens, keys=Keys.from_seed(0))
  least = np.inf
  for blocks in sums.values():
    for layer in blocks.values():
      routing = layer.routing
      scores_RTE = np.sort(np.asarray(routing.scores_TE), axis=-1)[..., ::-1]
      active = routing.expert_TA.shape[-1]
      if active < scores_RTE.shape[-1]:
        gap_RT = scores_RTE[..., active - 1] - scores_RTE[..., active]
        valid_RT = np.asarray(routing.valid_TA).any(axis=-1)
        least = min(least, float(gap_RT[valid_RT].min()))
  return least
