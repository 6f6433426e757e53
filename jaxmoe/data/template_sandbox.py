"""A chat template in a sandbox: Jinja from a stranger, run over marked text.

It can change nothing and reaches no attribute that is not plain data. What users wrote is
`UntrustedStr` to it, and stays that through macros, blocks, joins and JSON; what it puts down is a
mark for it.
"""

from __future__ import annotations

import dataclasses
import json
import re
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from jaxmoe.core.errors import InputError
from jaxmoe.data.untrusted_text import (
  MARK,
  OwnedText,
  Owner,
  UntrustedStr,
  map_pieces,
  plain,
  split_by_owner,
)

BEGIN, END = "\ue002", "\ue003"
"""Around what stands in {% generation %}."""

TOOLS = -1
"""The owner of tools, in the place of the number of a message."""

_ENDS = re.compile(f"([{BEGIN}{END}])")
_DAMAGED = re.compile("[\ue000\ue001]")


@dataclasses.dataclass(frozen=True)
class RenderedChat:
  """What a template wrote.

  Attributes:
    runs: Its text in pieces, each with the owner of its words; None for the template's own.
    spans: Start and end, in characters, of what it calls the assistant's own.
  """

  runs: list[OwnedText]
  spans: list[tuple[int, int]]

  @property
  def text(self) -> str:
    """The whole."""
    return "".join(text for text, _ in self.runs)

  def places(self) -> Iterable[tuple[int, int, Owner | None]]:
    """Yields start, end and owner of each run."""
    at = 0
    for text, owner in self.runs:
      yield at, at + len(text), owner
      at += len(text)


class SandboxedTemplate:
  """A compiled template.

  Args:
    text: The template.
    now: Gives the time in a form of `strftime`.

  Raises:
    ValueError: it is no template.
    InputError: the extra `chat` is missing.
  """

  def __init__(self, text: str, now: Callable[[str], str]):
    self._lock, self._known = threading.Lock(), list[OwnedText]()
    environment = _environment(self._join, self._to_json)
    environment.globals["strftime_now"] = now
    try:
      self._template = environment.from_string(text)
    except Exception as error:  # whatever a compiler raises
      raise ValueError(_line(error)) from None

  def render(
    self, values: Mapping[str, Any], messages: Sequence[Mapping[str, Any]]
  ) -> RenderedChat:
    """Returns what it writes.

    Args:
      values: What it is given as it is, and `tools`, whose strings are users'.
      messages: Plain JSON whose strings are users', too, but for roles.

    Raises:
      ValueError: it fails or refuses; the message says why.
      InputError: as what it is given raises it.
    """
    with self._lock:
      self._known.clear()
      marked = [
        {name: value if name == "role" else self._marked(value, (number, name))
         for name, value in message.items()}
        for number, message in enumerate(messages)
      ]  # fmt: skip
      tools = self._marked(values["tools"], (TOOLS, "tools"))
      try:
        text = self._template.render({**values, "messages": marked, "tools": tools})
      except InputError:
        raise
      except Exception as error:  # a template is a program: it may raise anything
        raise ValueError(_line(error)) from None
      return _rendered(text, self._known)

  def _marked(self, value: Any, owner: Owner) -> Any:
    if isinstance(value, str):
      return UntrustedStr([(value, owner)], self._known)
    if isinstance(value, list):
      return [self._marked(item, owner) for item in value]
    if isinstance(value, dict):
      return {
        self._marked(key, owner): self._marked(item, owner) for key, item in value.items()
      }
    return value

  def _join(self, pieces: Iterable[str]) -> str:
    """Joins pieces, in which what was said stays so."""
    text = "".join(pieces)
    if not MARK.search(text):
      return text
    return UntrustedStr(split_by_owner(text, self._known), self._known)

  def _to_json(
    self, value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None,
    sort_keys: bool = False,
  ) -> str:  # fmt: skip
    def escaped(value: Any) -> Any:
      if isinstance(value, UntrustedStr):
        return map_pieces(value, lambda text: json.dumps(text, ensure_ascii=ensure_ascii)[1:-1])
      if isinstance(value, (list, tuple)):
        return [escaped(item) for item in value]
      if isinstance(value, dict):
        keys = sorted(value, key=plain) if sort_keys else value
        return {escaped(key): escaped(value[key]) for key in keys}
      return value

    # Marks are kept as they are; a template's own words are escaped here.
    ours = json.dumps(escaped(value), ensure_ascii=False, indent=indent, separators=separators)
    return self._join([ours])


def _environment(join: Callable[..., str], to_json: Callable[..., str]) -> Any:
  try:
    from jinja2 import TemplateError, nodes, pass_eval_context
    from jinja2.compiler import CodeGenerator
    from jinja2.ext import Extension
    from jinja2.sandbox import ImmutableSandboxedEnvironment
  except ImportError:
    raise InputError("a chat template needs jinja2; pip install 'jaxmoe[chat]'") from None

  class Generation(Extension):
    """What stands in it the assistant wrote, for those who train on that alone."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Any) -> Any:
      line = next(parser.stream).lineno
      body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
      return nodes.CallBlock(self.call_method("_enclose"), [], [], body).set_lineno(line)

    def _enclose(self, caller: Callable[[], str]) -> str:
      return join([BEGIN, caller(), END])

  class Generator(CodeGenerator):
    """Joins by `~` as everything else is joined."""

    def visit_Concat(self, node: Any, frame: Any) -> None:
      self.write("concat(map(str, (")
      for item in node.nodes:
        self.visit(item, frame)
        self.write(", ")
      self.write(")))")

  def refuse(why: str) -> None:
    raise TemplateError(why)

  environment = ImmutableSandboxedEnvironment(
    trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", Generation]
  )
  environment.code_generator_class = Generator
  environment.concat = join  # type: ignore[method-assign]
  own = environment.filters["join"]

  @pass_eval_context
  def joined(context: Any, *arguments: Any, **named: Any) -> str:
    return join([own(context, *arguments, **named)])

  environment.filters |= {"tojson": to_json, "join": joined}
  environment.globals["raise_exception"] = refuse
  return environment


def _rendered(text: str, known: list[OwnedText]) -> RenderedChat:
  runs: list[OwnedText] = []
  spans, begun, at = [], 0, 0
  for run, owner in split_by_owner(text, known):
    if owner is None and _DAMAGED.search(run):
      raise ValueError("it takes what was said apart in a way that is not known here")
    for piece in [run] if owner is not None else _ENDS.split(run):
      if owner is None and piece == BEGIN:
        begun = at
      elif owner is None and piece == END:
        spans.append((begun, at))
      elif piece:
        runs.append((piece, owner))
        at += len(piece)
  return RenderedChat(runs, spans)


def _line(error: Exception) -> str:
  return " ".join(f"{type(error).__name__}: {error}".split())[:200]
