"""A reader of a checkpoint's config.json, key by key.

Each value is asked for by every name that releases of transformers have given it. What is never
asked for is told to the user, unless it is known to change no number; what cannot be done is
refused by name.
"""

from __future__ import annotations

import json
import os
import pathlib
from collections.abc import Mapping
from typing import Any

from jaxmoe.core.errors import InputError

REQUIRED: Any = object()
INERT = (
  "_name_or_path", "architectures", "attention_dropout", "bos_token_id", "chunk_size_feed_forward",
  "dtype", "embd_pdrop", "eos_token_id", "hidden_dropout", "id2label", "initializer_range",
  "input_jitter_noise", "is_decoder", "label2id", "max_position_embeddings", "output_attentions",
  "output_hidden_states", "output_router_logits", "pad_token_id", "pretraining_tp", "problem_type",
  "resid_pdrop", "return_dict", "router_aux_loss_coef", "router_jitter_noise", "torch_dtype",
  "transformers_version", "use_cache", "vocab_size",
)  # fmt: skip
"""Keys that change no logit, or that are read elsewhere."""
LOSSES = "aux_loss_alpha", "router_aux_loss_coef"
"""Keys that a family reads, of how a model is trained; they change no logit."""
ROPE = "rope_parameters", "rope_scaling", "rope_theta"


class ConfigReader:
  """The values of a config.json.

  Args:
    plain: Its content.
    where: Its path, for errors.
  """

  def __init__(self, plain: Mapping[str, Any], where: str):
    self._plain, self.where = plain, where
    self._asked: set[str] = set(INERT)
    self._alike: list[tuple[str, ...]] = [ROPE]

  def get(self, kind: type, *names: str, default: Any = REQUIRED) -> Any:
    """Returns the value of the first of `names` that is there and not null.

    Raises:
      InputError: it is of another kind, or none is there and there is no default.
    """
    self._asked.update(names)
    self._alike.append(names)
    for name in names:
      value = self._plain.get(name)
      if value is None:
        continue
      fits = isinstance(value, (int, float)) if kind is float else isinstance(value, kind)
      if not fits or (isinstance(value, bool) and kind is not bool):
        raise InputError(f"{self.where}: {name}={value!r} is no {kind.__name__}; mend the file")
      return float(value) if kind is float else value
    if default is REQUIRED:
      raise InputError(f"{self.where}: has no {' or '.join(names)}; is the file whole?")
    return default

  def only(self, name: str, *allowed: Any, default: Any = REQUIRED) -> None:
    """Refuses a value that is none of those allowed.

    Args:
      name: The key.
      allowed: The values that are understood; null and nothing count as `default`, or the first.
      default: What stands for nothing.
    """
    self._asked.add(name)
    value = self._plain.get(name)
    if value is None:
      value = allowed[0] if default is REQUIRED else default
    if value not in allowed:
      known = ", ".join(map(repr, allowed))
      raise InputError(
        f"{self.where}: {name}={value!r} is not known here, only {known}; "
        "such a model cannot be converted"
      )

  def skip(self, *names: str) -> None:
    """Says that some keys are known to change no number here."""
    self._asked.update(names)

  def alike(self, name: str) -> set[str]:
    """Returns the names under which what a key says was asked for, its own included."""
    return {name}.union(*(names for names in self._alike if name in names))

  @property
  def unread(self) -> list[str]:
    """The keys nobody asked for."""
    return sorted(name for name in self._plain if name not in self._asked)

  def rope(self, default: float) -> tuple[float, dict[str, Any]]:
    """Returns the base of the angles and what scales them, in the names of transformers 5."""
    new = self.get(dict, "rope_parameters", default={})
    old = self.get(dict, "rope_scaling", default={})
    scaling = {**old, **new}
    theta = scaling.pop("rope_theta", None) or self.get(float, "rope_theta", default=default)
    self.skip(*ROPE)
    kind = scaling.pop("rope_type", None) or scaling.pop("type", None) or "default"
    scaling.pop("type", None)
    return float(theta), {"rope_type": kind, **scaling}


def read_config(folder: str | os.PathLike[str]) -> tuple[dict[str, Any], ConfigReader]:
  """Returns what config.json of a checkpoint's folder holds, plain and to be read by key.

  Raises:
    InputError: there is none, it is no JSON object, or it asks for what is never done: code of its
      own, or weights in a quantized form.
  """
  path = pathlib.Path(folder) / "config.json"
  try:
    plain = json.loads(path.read_text(encoding="utf-8-sig"))
  except FileNotFoundError:
    raise InputError(f"{path}: no such file; give the folder of a checkpoint") from None
  except (OSError, ValueError) as error:
    raise InputError(f"{path}: cannot be read ({error}); restore the file") from None
  if not isinstance(plain, dict):
    raise InputError(f"{path}: holds no object; restore the file")
  if plain.get("auto_map"):
    raise InputError(
      f"{path}: auto_map names code that comes with the checkpoint, which is never run; if the "
      "model is the plain one of its model_type, remove auto_map"
    )
  if plain.get("quantization_config"):
    method = plain["quantization_config"]
    method = method.get("quant_method", method) if isinstance(method, dict) else method
    raise InputError(
      f"{path}: quantization_config ({method}) is not handled; save the checkpoint dequantized, in "
      "bfloat16 or float32"
    )
  return plain, ConfigReader(plain, str(path))
