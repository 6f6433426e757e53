"""The config.json of a model that came from a checkpoint: what it need not change stays as it came.

Where model and origin agree, every key keeps the origin's value, those that nobody reads and those
that change no number included. Where they differ (after surgery), only keys that say so change.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxmoe.core.errors import InputError
from jaxmoe.models.pretrained.config_reader import INERT, LOSSES, ConfigReader
from jaxmoe.models.pretrained.model_family import ModelFamily, essence
from jaxmoe.models.transformer import TransformerConfig

UNSAID = "architectures", "model_type", *LOSSES
"""Keys that a family writes and that say nothing of what a model computes."""


def with_origin(
  families: Mapping[str, ModelFamily],
  kind: str,
  model: TransformerConfig,
  origin: Mapping[str, Any],
) -> dict[str, Any]:
  """Returns the keys of config.json for a model of a family.

  Args:
    families: Those that are known.
    kind: The `model_type` that is written.
    model: The model, which the family can say.
    origin: The config.json it came with, empty for none; of any `model_type`.
  """
  family = families[kind]
  named = {"architectures": [family.architecture], "model_type": kind}
  own = {**named, **family.write(model)}
  if origin.get("model_type") != kind:
    kept = {key: value for key, value in origin.items() if key in INERT and key not in named}
    return {**kept, **own}
  config = ConfigReader(origin, "config.json")
  try:
    before = family.write(family.read(config))
  except InputError:  # edited since
    return {**origin, **own}
  changed = [key for key in own if key not in UNSAID and own[key] != before.get(key, own)]
  replaced = {other for key in changed for other in config.alike(key)}
  kept = {key: value for key, value in origin.items() if key not in replaced}
  plain = {**own, **kept, **{key: own[key] for key in changed}}
  if not plain["architectures"]:
    plain["architectures"] = named["architectures"]
  if _says(family, plain, model):
    return plain
  kept = {key: origin[key] for key in (*config.unread, *INERT) if key in origin}
  return {**own, **kept, **{key: value for key, value in own.items() if key not in UNSAID}}


def _says(family: ModelFamily, plain: Mapping[str, Any], model: TransformerConfig) -> bool:
  """Whether a config.json describes a model."""
  try:
    return essence(family.read(ConfigReader(plain, "config.json"))) == essence(model)
  except InputError:
    return False
