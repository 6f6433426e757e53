"""A family of public models: its config.json both ways, and the names of its weights."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from jaxmoe.core.config_io import to_plain
from jaxmoe.core.errors import InputError
from jaxmoe.models.block import BlockConfig, MLPConfig
from jaxmoe.models.pretrained.config_reader import ConfigReader
from jaxmoe.models.pretrained.tensor_mapping import ParamMapping
from jaxmoe.models.stack import LayerGroup
from jaxmoe.models.transformer import TransformerConfig
from jaxmoe.moe.dispatch import Dropless
from jaxmoe.moe.layer import MoEConfig

_LONGEST_PATTERN = 8
FREQUENCIES = r".*\.rotary_emb\.inv_freq"
"""Of rotary embeddings, which config.json says as well."""


@dataclasses.dataclass(frozen=True)
class ModelFamily:
  """Models of one `model_type`.

  Attributes:
    architecture: The class of transformers, as config.json names it.
    read: Returns the record that a config.json describes.
    write: Returns the keys of config.json for a record, as transformers 4 and 5 read them. They
      need not describe a model that the family does not have, see `differences`.
    mappings: Where all weights lie that models of the family may have.
    ignored: Patterns of tensors that transformers leaves aside too.
  """

  architecture: str
  read: Callable[[ConfigReader], TransformerConfig]
  write: Callable[[TransformerConfig], dict[str, Any]]
  mappings: tuple[ParamMapping, ...]
  ignored: tuple[str, ...] = (FREQUENCIES,)


def differences(family: ModelFamily, model: TransformerConfig) -> list[str]:
  """Returns what a model has that `family.write` cannot say, in words; empty if it can say all.

  Raises:
    InputError: the model has parts of kinds that the family does not know at all.
  """
  try:
    reread = family.read(ConfigReader(family.write(model), "config.json"))
  except AttributeError as error:
    raise InputError(f"{family.architecture} has no such parts: {error}") from None
  ours, theirs = essence(model), essence(reread)
  nothing = "nothing"
  return [
    f"{path} ({ours.get(path, nothing)!r}, it can have {theirs.get(path, nothing)!r})"
    for path in {**ours, **theirs}
    if ours.get(path, nothing) != theirs.get(path, nothing)
  ]


def essence(model: TransformerConfig) -> dict[str, Any]:
  """Returns what a record says of the numbers a trained model gives, as plain values by path.

  Not what speed and memory depend on, how layers are grouped, or how the model is trained. Whether
  rows are dropped (a dispatcher with capacity) is left out too: a checkpoint cannot say it.
  """
  plain = {f"layers.{depth}": to_plain(_bare(block)) for depth, block in enumerate(blocks(model))}
  others = {
    field.name: to_plain(getattr(model, field.name))
    for field in dataclasses.fields(model)
    if field.name not in ("stack", "dtype", "param_dtype", "scan", "remat", "loss_chunk")
  }
  return _flat({**plain, **others})


def _bare(block: BlockConfig) -> BlockConfig:
  """Returns a block without what training and speed alone depend on."""
  if not isinstance(block.ffn, MoEConfig):
    return block
  moe = dataclasses.replace(
    block.ffn, balance=(), dispatch=Dropless(), exchange=MoEConfig().exchange, placement=(),
  )
  if hasattr(moe.router, "bias_rate"):
    moe = dataclasses.replace(moe, router=dataclasses.replace(moe.router, bias_rate=0.0))
  return dataclasses.replace(block, ffn=moe)


def _flat(plain: Any, path: str = "") -> dict[str, Any]:
  """Returns the scalars of nested values by path."""
  if isinstance(plain, dict):
    pairs = plain.items()
  elif isinstance(plain, list):
    pairs = {str(index): item for index, item in enumerate(plain)}.items()
  else:
    return {path: plain}
  return {
    inner: value
    for key, item in pairs
    for inner, value in _flat(item, f"{path}.{key}" if path else str(key)).items()
  }


def blocks(model: TransformerConfig) -> list[BlockConfig]:
  """Returns the record of each block, by depth."""
  return [
    block for group in model.stack for _ in range(group.repeats) for block in group.pattern
  ]


def stack_of(layers: list[BlockConfig]) -> tuple[LayerGroup, ...]:
  """Returns groups for blocks by depth, as few as can be: the inverse of `blocks`."""
  groups, at = [], 0
  while at < len(layers):
    covered, width = max(
      (_repeats(layers[at:], width) * width, -width)
      for width in range(1, min(_LONGEST_PATTERN, len(layers) - at) + 1)
      if width == 1 or _repeats(layers[at:], width) > 1
    )
    width = -width
    groups.append(LayerGroup(tuple(layers[at : at + width]), covered // width))
    at += covered
  return tuple(groups)


def _repeats(layers: list[BlockConfig], width: int) -> int:
  """Returns how often the first `width` blocks come one after the other."""
  count = 1
  while layers[count * width : (count + 1) * width] == layers[:width]:
    count += 1
  return count


def only_moe(model: TransformerConfig) -> MoEConfig:
  """Returns the record of the experts of the first block that has some.

  Raises:
    InputError: none has.
  """
  found = next((ffn for ffn in model.ffns if isinstance(ffn, MoEConfig)), None)
  if found is None:
    raise InputError("it has no experts")
  return found


def only_mlp(model: TransformerConfig) -> MLPConfig | None:
  """Returns the record of the first dense feed-forward part, None where there is none."""
  return next((ffn for ffn in model.ffns if isinstance(ffn, MLPConfig)), None)
