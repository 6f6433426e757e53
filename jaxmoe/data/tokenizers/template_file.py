"""The chat template that came with a tokenizer.json: a file beside it, or a field of one."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping
from typing import Any

from jaxmoe.core.errors import InputError

CONFIG, NAMES, OWN = "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja"
_NOW = "strftime_now"


@dataclasses.dataclass(frozen=True)
class TemplateText:
  """A chat template, not yet run.

  Attributes:
    text: Jinja.
    path: The file it is from.
    tool_use: The one for conversations with tools, where it is another.
    tokens: What `bos_token` and the like stand for in it.
  """

  text: str
  path: str
  tool_use: str | None = None
  tokens: Mapping[str, str] = dataclasses.field(default_factory=dict)

  @property
  def plain(self) -> Any:
    """All that ids depend on, as JSON has it."""
    return {"template": self.text, "tool_use": self.tool_use, "tokens": dict(self.tokens)}

  @property
  def asks_the_date(self) -> bool:
    """Whether what it writes depends on the day."""
    return _NOW in self.text or _NOW in (self.tool_use or "")


def find_template(folder: str | os.PathLike[str]) -> TemplateText | None:
  """Returns the template in the folder of a tokenizer.json, None where there is none.

  Raises:
    InputError: a file is there and cannot be read.
  """
  config = _object(os.path.join(folder, CONFIG))
  path, own = os.path.join(folder, OWN), None
  if os.path.isfile(path):
    own = _read(path)
  found = config.get("chat_template") if own is None else own
  tool_use = None
  if isinstance(found, list):  # several by name
    named = {item.get("name"): item.get("template") for item in found if isinstance(item, dict)}
    found, tool_use = named.get("default"), named.get("tool_use")
  if not isinstance(found, str):
    return None
  tokens = {}
  for name, value in {**_object(os.path.join(folder, NAMES)), **config}.items():
    value = value.get("content") if isinstance(value, dict) else value
    if name.endswith("_token") and isinstance(value, str):
      tokens[name] = value
  where = path if own is not None else os.path.join(folder, CONFIG)
  return TemplateText(found, where, tool_use if isinstance(tool_use, str) else None, tokens)


def _object(path: str) -> dict[str, Any]:
  """Returns a JSON object of a file, an empty one where there is no file."""
  if not os.path.isfile(path):
    return {}
  try:
    plain = json.loads(_read(path).removeprefix("\ufeff"))
  except ValueError as error:
    raise InputError(f"{path}: cannot be read ({error}); restore the file") from None
  if not isinstance(plain, dict):
    raise InputError(f"{path}: holds no object; restore the file")
  return plain


def _read(path: str) -> str:
  try:
    with open(path, encoding="utf-8") as file:
      return file.read()
  except (OSError, UnicodeDecodeError) as error:
    raise InputError(f"{path}: cannot be read ({error}); restore the file") from None
