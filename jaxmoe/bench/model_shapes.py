"""The models that whole steps, decoding and starts are measured at, as recipes.

`quickstart` and `tiny` are the recipes of that name. `small8` and `small64` are as large as a
processor still trains: 38M parameters with 8 experts top-2, 18M with 64 top-8. All of them are
models of the Qwen3-MoE family, so that rivals can load their weights.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from jaxmoe.core.errors import InputError
from jaxmoe.data.mixture import Data, MixturePart
from jaxmoe.data.sources import Synthetic
from jaxmoe.data.tokenizers.bpe import Bpe
from jaxmoe.models.attention import SoftmaxAttention
from jaxmoe.models.block import BlockConfig
from jaxmoe.models.stack import LayerGroup
from jaxmoe.models.transformer import TransformerConfig
from jaxmoe.moe.experts import SwiGLU
from jaxmoe.moe.layer import MoEConfig
from jaxmoe.recipes import quickstart, tiny
from jaxmoe.train.experiment import Experiment, Train


def small(dim: int, num_experts: int, num_active: int, mlp_dim: int, layers: int = 4) -> Experiment:
  """Returns a recipe of a vocabulary of 8,192, heads of 64, and 4 rows of 256 tokens."""
  heads = dim // 64
  moe = MoEConfig(num_experts, num_active, experts=SwiGLU(mlp_dim=mlp_dim))
  block = BlockConfig(SoftmaxAttention(heads, heads, head_dim=64, qk_norm="head"), moe)
  return Experiment(
    data=Data(
      parts=(MixturePart(Synthetic(task="copy", num_documents=400)),),
      tokenizer=Bpe(vocab_size=8192),
      seq_len=256,
    ),
    model=TransformerConfig(dim=dim, stack=(LayerGroup((block,), repeats=layers),)),
    train=Train(batch_size=4),
  )


def _tiny() -> Experiment:
  """Returns the recipe `tiny` with the norm of queries and keys that its family has."""
  experiment = tiny.get_config()
  (group,) = experiment.model.stack
  (block,) = group.pattern
  attention = dataclasses.replace(block.attention, qk_norm="head")
  group = dataclasses.replace(group, pattern=(dataclasses.replace(block, attention=attention),))
  return dataclasses.replace(
    experiment, model=dataclasses.replace(experiment.model, stack=(group,))
  )


SHAPES: dict[str, Callable[[], Experiment]] = {
  "quickstart": quickstart.get_config,
  "small8": lambda: small(512, 8, 2, 512),
  "small64": lambda: small(256, 64, 8, 64),
  "tiny": _tiny,
}


def experiment_of(name: str) -> Experiment:
  """Returns the recipe of a shape.

  Raises:
    InputError: there is no such shape.
  """
  if name not in SHAPES:
    raise InputError(f"--shape={name}: no such shape; there are: {', '.join(SHAPES)}")
  return SHAPES[name]()
