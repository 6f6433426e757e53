"""A reader of pickles that runs nothing: what a stream says becomes plain data and inert records.

It goes by the opcodes of a stream, which the standard library's `pickletools` decodes, on a stack
of its own. Nothing is imported; a name of a class or function stays a name. Of the calls that a
stream asks for only those of a table given by the caller are made; any other becomes a `Record` of
its name and arguments. So a stream can say what it likes, and is at worst unexpected data.
"""

from __future__ import annotations

import dataclasses
import pickletools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from jaxmoe.core.errors import InputError

Calls = Mapping[str, Callable[..., Any]]
"""What is called for a name such as `collections.OrderedDict`."""


@dataclasses.dataclass(frozen=True)
class Name:
  """The name of a class or function, which is not looked up."""

  module: str
  name: str

  def __str__(self) -> str:
    return f"{self.module}.{self.name}"


@dataclasses.dataclass(eq=False)
class Record:
  """An object that the stream makes by a call that is not made.

  Attributes:
    of: What is called.
    arguments: By place; last, where there are some by keyword, a dict of these.
    state: What its attributes are set to; None for none.
    entries: What is appended or added to it.
    items: What is set in it by key.
  """

  of: Any
  arguments: tuple[Any, ...] = ()
  state: Any = None
  entries: list[Any] = dataclasses.field(default_factory=list)
  items: dict[Any, Any] = dataclasses.field(default_factory=dict)


def read_pickle(
  data: bytes, where: str, calls: Calls, persistent: Callable[[Any], Any] | None = None
) -> Any:
  """Returns what a stream holds.

  Args:
    data: The stream.
    where: Its place, for errors.
    calls: The functions that may be called, by full name; what they raise of ValueError, TypeError
      and LookupError counts as damage.
    persistent: What makes an object of a persistent id; None where there are to be none.

  Raises:
    InputError: One line: the stream is cut, is no pickle, or asks for what no data needs.
  """
  machine = _Machine(calls, persistent)
  try:
    for opcode, argument, _ in pickletools.genops(data):  # of which the last is STOP
      if opcode.name != "STOP":
        machine.do(opcode.name, argument)
    return machine.value()
  except _DAMAGE as error:
    raise InputError(f"{where}: no pickle of plain data ({error}); fetch it again") from None


_DAMAGE = (
  ValueError, TypeError, LookupError, AttributeError, ArithmeticError, RecursionError
)  # fmt: skip


_HASHED = str | bytes | int | float | Name | Record


def as_key(value: Any) -> Any:
  """Returns a key of a dict, or an element of a set.

  Raises:
    ValueError: It is no number, text or record, nor a tuple of such: what is nested is hashed to
      its depth, for which there may be no room on the stack of the processor.
  """
  parts = value if isinstance(value, tuple) else (value,)
  if not all(part is None or isinstance(part, _HASHED) for part in parts):
    raise ValueError(f"a key that is a {type(value).__name__}")
  return value


def as_pairs(elements: Sequence[Any]) -> dict[Any, Any]:
  """Returns a dict of keys and values in turn.

  Raises:
    ValueError: As `as_key`, or a key has no value.
  """
  return dict(zip(map(as_key, elements[::2]), elements[1::2], strict=True))


class _Mark:
  """Where the elements of what comes next begin on the stack."""


_CONSTANTS: dict[str, Any] = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_EMPTY: dict[str, Callable[[], Any]] = {
  "EMPTY_DICT": dict, "EMPTY_LIST": list, "EMPTY_TUPLE": tuple, "EMPTY_SET": set, "MARK": _Mark
}  # fmt: skip
_VALUES = frozenset((
  "INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT", "STRING",
  "BINSTRING", "SHORT_BINSTRING", "UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8",
  "BINBYTES", "SHORT_BINBYTES", "BINBYTES8",
))  # fmt: skip
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


class _Machine:
  """The stack and the memo of one stream."""

  def __init__(self, calls: Calls, persistent: Callable[[Any], Any] | None):
    self.stack: list[Any] = []
    self._memo: dict[int, Any] = {}
    self._calls, self._persistent = calls, persistent

  def do(self, name: str, argument: Any) -> None:
    """Does one opcode.

    Raises:
      ValueError: It is none that data needs, or does not fit what is there.
    """
    stack = self.stack
    if name in ("PROTO", "FRAME"):
      return
    if name in _VALUES:
      stack.append(argument)
    elif name in _CONSTANTS:
      stack.append(_CONSTANTS[name])
    elif name in _EMPTY:
      stack.append(_EMPTY[name]())
    elif name in _TUPLES:
      self._push_tuple(self._pop(_TUPLES[name]))
    elif name in ("TUPLE", "LIST", "DICT", "FROZENSET"):
      self._gather(name)
    elif name in ("PUT", "BINPUT", "LONG_BINPUT"):
      self._memo[argument] = stack[-1]
    elif name == "MEMOIZE":
      self._memo[len(self._memo)] = stack[-1]
    elif name in ("GET", "BINGET", "LONG_BINGET"):
      stack.append(self._memo[argument])
    elif name in ("APPEND", "APPENDS", "SETITEM", "SETITEMS", "ADDITEMS"):
      self._fill(name)
    elif name in ("POP", "DUP", "POP_MARK"):
      self._shuffle(name)
    else:
      self._object(name, argument)

  def value(self) -> Any:
    """Returns what is on the stack, which is one value.

    Raises:
      ValueError: It is not.
    """
    (value,) = self._pop(len(self.stack))
    return value

  def _object(self, name: str, argument: Any) -> None:
    """Does an opcode of names, calls and states."""
    stack = self.stack
    if name == "GLOBAL":
      module, _, attribute = argument.partition(" ")
      stack.append(Name(module, attribute))
    elif name == "STACK_GLOBAL":
      module, attribute = self._pop(2)
      if not (isinstance(module, str) and isinstance(attribute, str)):
        raise ValueError("a name that is no text")
      stack.append(Name(module, attribute))
    elif name in ("REDUCE", "NEWOBJ"):
      of, arguments = self._pop(2)
      stack.append(self._called(of, arguments))
    elif name == "NEWOBJ_EX":
      of, arguments, keywords = self._pop(3)
      stack.append(Record(of, (*arguments, keywords)))
    elif name == "BUILD":
      (state,) = self._pop(1)
      if isinstance(stack[-1], Record):
        stack[-1].state = state
    elif name == "BINPERSID" and self._persistent is not None:
      (given,) = self._pop(1)
      stack.append(self._persistent(given))
    else:
      raise ValueError(f"an opcode {name}")

  def _called(self, of: Any, arguments: Any) -> Any:
    if not isinstance(arguments, tuple):
      raise ValueError("a call whose arguments are no tuple")
    function = self._calls.get(str(of)) if isinstance(of, Name) else None
    return Record(of, arguments) if function is None else function(*arguments)

  def _gather(self, name: str) -> None:
    """Makes one value of all since the last mark."""
    elements = self._since_mark()
    if name == "DICT":
      self.stack.append(as_pairs(elements))
    elif name == "TUPLE":
      self._push_tuple(elements)
    else:
      self.stack.append(elements if name == "LIST" else frozenset(map(as_key, elements)))

  def _push_tuple(self, elements: list[Any]) -> None:
    self.stack.append(tuple(elements))

  def _fill(self, name: str) -> None:
    """Puts elements or pairs into what lies below them."""
    if name in ("APPEND", "SETITEM"):
      elements = self._pop(1 if name == "APPEND" else 2)
    else:
      elements = self._since_mark()
    filled = self.stack[-1]
    if name.startswith("SET"):
      of = filled.items if isinstance(filled, Record) else filled
      if not isinstance(of, dict):
        raise ValueError("items of what has no keys")
      of.update(as_pairs(elements))
    elif isinstance(filled, Record):
      filled.entries.extend(elements)
    elif name == "ADDITEMS" and isinstance(filled, set):
      filled.update(map(as_key, elements))
    elif isinstance(filled, list):
      filled.extend(elements)
    else:
      raise ValueError("elements of what has no place for any")

  def _shuffle(self, name: str) -> None:
    if name == "DUP":
      self.stack.append(self.stack[-1])
    elif name == "POP":
      self._pop(1)
    else:
      self._since_mark()

  def _pop(self, number: int) -> list[Any]:
    """Returns the last values of the stack, of which none is a mark."""
    found = self.stack[len(self.stack) - number :]
    if number > len(self.stack) or any(isinstance(one, _Mark) for one in found):
      raise ValueError("less on the stack than is taken")
    del self.stack[len(self.stack) - number :]
    return found

  def _since_mark(self) -> list[Any]:
    at = len(self.stack) - 1
    while at >= 0 and not isinstance(self.stack[at], _Mark):
      at -= 1
    if at < 0:
      raise ValueError("no mark on the stack")
    found = self.stack[at + 1 :]
    del self.stack[at:]
    return found
