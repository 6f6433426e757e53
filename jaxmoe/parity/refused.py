"""Layouts and components that are refused together, each with the line a user gets."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from jaxmoe.core.errors import InputError
from jaxmoe.models.attention_experts import AttentionExperts
from jaxmoe.models.block import BlockConfig
from jaxmoe.models.stack import LayerGroup
from jaxmoe.models.transformer import TransformerConfig
from jaxmoe.moe.dispatch import AllToAll, Capacity
from jaxmoe.moe.layer import MoEConfig
from jaxmoe.parallel import Parallel
from jaxmoe.train.divisibility import check_divisibility


def refused() -> list[dict[str, str]]:
  """Returns {pair, reason} of everything that is refused, by trying it."""
  rows = []
  for pair, parallel, block in _pairs():
    model = TransformerConfig(stack=(LayerGroup((block,)),))
    try:
      check_divisibility(parallel, model, batch_size=24, num_micro=1, seq_len=8)
    except InputError as error:
      rows.append({"pair": pair, "reason": str(error)})
    else:
      raise AssertionError(f"{pair} is not refused any more")
  return rows


def _pairs() -> Iterator[tuple[str, Parallel, BlockConfig]]:
  tensor, expert = Parallel(tensor=2), Parallel(expert=2)
  block, moe = BlockConfig(), MoEConfig()
  folded = Parallel(expert=2, tensor=2, fold=("tensor",))
  yield "tensor x attention experts", tensor, dataclasses.replace(
    block, attention=AttentionExperts()
  )
  yield "fold=tensor x capacity", folded, dataclasses.replace(
    block, ffn=dataclasses.replace(moe, dispatch=Capacity())
  )
  yield "expert x closed experts", expert, dataclasses.replace(
    block, ffn=dataclasses.replace(moe, num_inactive=2)
  )
  yield "expert x placement", expert, dataclasses.replace(
    block, ffn=dataclasses.replace(moe, placement=tuple(range(8)))
  )
  yield "one expert axis x two levels", expert, dataclasses.replace(
    block, ffn=dataclasses.replace(moe, exchange=AllToAll(two_level=True))
  )
  parted = Parallel(tensor=2, partition_activations=True)
  yield "partition_activations x layers not made again whole", parted, block
  yield "degree x experts that do not divide", Parallel(expert=3), block
  yield "degree x heads that do not divide", Parallel(tensor=3), block
