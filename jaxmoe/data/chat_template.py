"""Conversations as a model was trained on them: the template that came with its tokenizer.

A template may ask what users write, trim it and take it apart, but what it puts down is a mark for
it: the text of a template may spell special tokens, a message never does. Ids are those of
`apply_chat_template` of transformers otherwise. What is learned is what stands in {% generation %}
where a template has that, and elsewhere the text of the assistant up to the end of its turn.
"""

from __future__ import annotations

import datetime
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from jaxmoe.core.errors import InputError
from jaxmoe.data.chat_format import EncodedDocument, TextPiece, unlearnable_error
from jaxmoe.data.message import REASONING, TOOL_CALLS, Conversation, Message
from jaxmoe.data.template_sandbox import TOOLS, RenderedChat, SandboxedTemplate
from jaxmoe.data.tokenizers.subword import SubwordTokenizer
from jaxmoe.data.tokenizers.template_file import TemplateText
from jaxmoe.data.tokenizers.tokenizer import Tokenizer

Span = tuple[int, int]


def encode_chat(
  template: str, tokenizer: SubwordTokenizer, messages: Sequence[tuple[Any, ...]],
  tokens: Mapping[str, str | None],
) -> np.ndarray:
  """Returns the int32 ids of a chat up to where the assistant is to write.

  Args:
    template: Jinja, as chat_template.jinja or `chat_template` of tokenizer_config.json has it.
    tokenizer: Of the model.
    messages: (role, content) of each, in order.
    tokens: What `bos_token` and the like stand for in the template.

  Raises:
    InputError: the extra `chat` is missing, the template fails or refuses the messages, or a
      message is not valid UTF-8.
  """
  known = {name: token for name, token in tokens.items() if token is not None}
  text = TemplateText(template, "the chat template", tokens=known)
  content = Conversation(tuple(Message(*message) for message in messages))
  form = ChatTemplate(text, datetime.datetime.now().strftime)
  try:
    rendered = form.render(content, asks=True)
  except InputError:  # it says what helps
    raise
  except ValueError as error:
    raise InputError(f"the chat template fails ({error}); use --prompt without --chat") from None
  missing = form.not_rendered(content, rendered)
  if missing:
    raise InputError(f"the chat template does not write {missing}; use --prompt")
  return tokenizer.encode_parts([(text, owner is None) for text, owner in rendered.runs])[0]


class ChatTemplate:
  """The format of a chat template.

  Args:
    text: The template.
    now: Gives the date in a form of `strftime`.
  """

  def __init__(self, text: TemplateText, now: Callable[[str], str]):
    self._text, self._now = text, now
    self._programs: dict[str, SandboxedTemplate] = {}
    self._last: tuple[Conversation, RenderedChat] | None = None

  @property
  def plain(self) -> Any:
    """The text, and what it is given."""
    return self._text.plain

  @property
  def name(self) -> str:
    """Where it is from."""
    return f"the template of {self._text.path}"

  def render(self, content: Conversation, asks: bool = False) -> RenderedChat:
    """Returns what the template writes; where it `asks`, up to where the assistant is to write.

    Raises:
      ValueError: it fails or refuses the messages.
      InputError: the extra `chat` is missing, or it is no template.
    """
    last = self._last
    if last is not None and last[0] is content and not asks:
      return last[1]
    values = {
      **self._text.tokens, "tools": content.tools, "documents": None, "add_generation_prompt": asks
    }  # fmt: skip
    messages = [_fields(message) for message in content.messages]
    rendered = self._program(content.tools is not None).render(values, messages)
    if not asks:
      self._last = content, rendered
    return rendered

  def _program(self, with_tools: bool) -> SandboxedTemplate:
    source = (self._text.tool_use if with_tools else None) or self._text.text
    if source not in self._programs:
      try:
        self._programs[source] = SandboxedTemplate(source, self._now)
      except ValueError as error:
        raise InputError(
          f"{self._text.path}: the chat template fails ({error}); mend it, or give messages "
          "another format (data.chat of a recipe)"
        ) from None
    return self._programs[source]

  def not_rendered(self, content: Conversation, rendered: RenderedChat) -> str:
    """Returns what of the messages the template has no place for, or ''."""
    owners = {owner for _, owner in rendered.runs if owner is not None}
    numbers = {number for number, _ in owners}
    for number, message in enumerate(content.messages):
      more = message.more or {}
      if TOOL_CALLS in more and (number, TOOL_CALLS) not in owners:
        return f"the {TOOL_CALLS!r} of message {number + 1}"
      if (message.content or "").strip() and number not in numbers:
        return f"message {number + 1}"
    return "'tools'" if content.tools and TOOLS not in numbers else ""

  def find_error(self, content: Conversation, tokenizer: Tokenizer | None) -> str:
    """Returns why the messages cannot be used, or ''."""
    nothing = unlearnable_error(content, _learns)
    if nothing:
      return nothing
    for message in content.messages:
      thought = next((field for field in REASONING if field in (message.more or {})), None)
      if thought and not any(field in str(self._text.plain) for field in REASONING):
        return f"{thought!r}, for which the chat template has no place"
    try:
      rendered = self.render(content)
    except ValueError as error:
      return f"the chat template fails ({error})"
    missing = self.not_rendered(content, rendered)
    if missing:
      return f"the chat template does not write {missing}"
    return "" if self._learned(content, rendered, tokenizer)[0] else "no answer to learn from"

  def text(self, content: Conversation, tokenizer: Tokenizer | None) -> list[TextPiece]:
    """Returns the text, cut where learning starts or ends; special tokens are no text."""
    rendered = self.render(content)
    whole, pieces, at = rendered.text, list[TextPiece](), 0
    learned, _ = self._learned(content, rendered, tokenizer)
    borders = sorted({0, len(whole), *(end for span in learned for end in span)})
    hidden = [*_specials(rendered, tokenizer), (len(whole), len(whole))]
    for start, end in hidden:
      cuts = [at, *(border for border in borders if at < border < start), start]
      for a, b in itertools.pairwise(cuts):
        if a < b:
          pieces.append((whole[a:b], any(x <= a < y for x, y in learned)))
      at = end
    return pieces

  def encode(self, content: Conversation, tokenizer: Tokenizer) -> EncodedDocument:
    """Returns the ids of the document and which of them and of its end are learned."""
    assert isinstance(tokenizer, SubwordTokenizer)
    rendered = self.render(content)
    learned, ends = self._learned(content, rendered, tokenizer)
    parts = [(text, owner is None) for text, owner in rendered.runs]
    ids, places = tokenizer.encode_parts(parts)
    scored = np.zeros(len(ids) + 1, bool)
    scored[-1] = ends
    for start, end in learned:  # a token that crosses the border is learned whole
      scored[:-1] |= (places[:, 0] < end) & (places[:, 1] > start)
    return ids, scored

  def _learned(
    self, content: Conversation, rendered: RenderedChat, tokenizer: Tokenizer | None
  ) -> tuple[list[Span], bool]:
    """Returns the characters that are learned, and whether the end of the document is.

    It is where the template has no token that ends the last turn.
    """
    places = list(rendered.places())
    specials = _specials(rendered, tokenizer)
    learned, ends = [], False
    for number, message in enumerate(content.messages):
      until = self._until(content, number, rendered)
      mine = [(a, b) for a, b, of in places if of is not None and of[0] == number and a < until]
      within = [span for span in rendered.spans if any(span[0] <= a < span[1] for a, _ in mine)]
      if not mine or not _learns(message):
        ends = ends and not mine
        continue
      first, last = mine[0][0], mine[-1][1]
      others = (a for a, _, owner in places if a >= last and owner is not None)
      limit = next(others, len(rendered.text))
      end = next((b for a, b in specials if last <= a < limit), last)
      ends = end == last
      if within:
        learned += [span for span in within if span not in learned]
      elif not rendered.spans or message.learned:
        reply = rendered.text[slice(*mine[0])]
        whole = not _is_rewritten(message, reply)
        begin = first if whole else self._begin(content, number, rendered, first)
        learned.append((begin, end))
    if all(message.learned is not False for message in content.messages):  # of an empty content
      spans = [span for span in rendered.spans if span not in learned]
      learned += [s for s in spans if not any(s[0] <= a < s[1] for a, _, of in places if of)]
    return learned, ends

  def _until(self, content: Conversation, number: int, rendered: RenderedChat) -> int:
    """Returns where the turn of a message is over: what it called may be named in later ones."""
    if TOOL_CALLS in (content.messages[number].more or {}):
      try:
        so_far = self.render(_first(content, number + 1)).text
      except ValueError:
        so_far = ""
      if so_far and rendered.text.startswith(so_far):
        return len(so_far)
    return len(rendered.text)

  def _begin(self, content: Conversation, number: int, rendered: RenderedChat, first: int) -> int:
    """Returns where the turn of a message begins, behind what the model is given when asked.

    The rest of what stands before its first word, such as <tool_call>, the model has to write.
    """
    whole = rendered.text
    try:
      given = self.render(_first(content, number), asks=True).text
    except ValueError:
      given = ""
    if given and whole.startswith(given) and len(given) <= first:
      return len(given)
    asked = self.render(content, asks=True).text
    prompt = asked[len(whole) :] if asked.startswith(whole) else ""
    before = max((b for _, b, owner in rendered.places() if owner and b <= first), default=0)
    lines = [at + 1 for at, letter in enumerate(prompt) if letter == "\n"]
    for size in [len(prompt), *reversed(lines)] if prompt else []:
      at = whole.rfind(prompt[:size], before, first)
      if at >= 0:
        return at + size
    return first


def _learns(message: Message) -> bool:
  return message.role == "assistant" if message.learned is None else message.learned


def _is_rewritten(message: Message, content: str) -> bool:
  """Whether a template put down more than a content as it is, or took that apart."""
  more = any(field in (message.more or {}) for field in (TOOL_CALLS, *REASONING))
  return more or not (message.content or "").strip().startswith(content.strip())


def _first(content: Conversation, count: int) -> Conversation:
  return Conversation(content.messages[:count], content.tools)


def _specials(rendered: RenderedChat, tokenizer: Tokenizer | None) -> list[Span]:
  """Returns where the template's own special tokens stand."""
  if not isinstance(tokenizer, SubwordTokenizer):
    return []
  return [
    (start + a, start + b)
    for (start, _, owner), (text, _) in zip(rendered.places(), rendered.runs)
    if owner is None
    for a, b in tokenizer.specials(text)
  ]


def _fields(message: Message) -> dict[str, Any]:
  """Returns what a template sees of a message, all of which is said but the role."""
  content = {} if message.content is None else {"content": message.content}
  more = dict(message.more or {})
  thought = next((more[field] for field in REASONING if field in more), None)
  # As transformers has it: under the usual name, and under that of gpt-oss.
  also = {} if thought is None else {"thinking": thought, **more, "reasoning_content": thought}
  return {"role": message.role, **content, **more, **also}
