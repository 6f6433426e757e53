"""The structure of a tree as JSON, for what outlives its process; no pickle.

Containers are dicts, lists, tuples, named tuples and dataclasses that JAX knows as trees. A class
is a name, and is looked up only in packages whose classes a program of ours returns.
"""

from __future__ import annotations

import dataclasses
import importlib
from typing import Any

import jax

PACKAGES = ("jaxmoe", "optax", "flax")
"""Where classes of trees may come from."""

_LEAF = 0


class _Leaf:
  """What stands for a leaf while a structure is written or read."""


def to_json(tree: Any) -> Any:
  """Returns what JSON can hold of a tree: its structure, without leaves.

  Raises:
    ValueError: a container is of a kind that JSON cannot hold here.
  """
  treedef: Any = jax.tree.structure(tree)
  plain = _write(jax.tree.unflatten(treedef, [_Leaf() for _ in range(treedef.num_leaves)]))
  if from_json(plain) != treedef:
    raise ValueError(f"{treedef} is not what is read back of it")
  return plain


def from_json(plain: Any) -> Any:
  """Returns the structure that `to_json` wrote.

  Raises:
    ValueError: it is none.
  """
  try:
    return jax.tree.structure(_read(plain))
  except (KeyError, TypeError, AttributeError, ImportError) as error:
    raise ValueError(f"not the structure of a tree: {error}") from error


def _write(node: Any) -> Any:
  if isinstance(node, _Leaf):
    return _LEAF
  if node is None:
    return None
  if type(node) is dict and all(isinstance(name, str) for name in node):
    return {"dict": {name: _write(child) for name, child in node.items()}}
  if type(node) in (list, tuple):
    return {type(node).__name__: [_write(child) for child in node]}
  if isinstance(node, tuple) and hasattr(node, "_fields"):
    fields = {name: _write(child) for name, child in zip(node._fields, node)}
    return {"class": _name(type(node)), "fields": fields}
  if dataclasses.is_dataclass(node):
    fields = {field.name: getattr(node, field.name) for field in dataclasses.fields(node)}
    return {"class": _name(type(node)), "fields": {k: _field(v) for k, v in fields.items()}}
  raise ValueError(f"a {type(node).__name__} in a tree cannot be kept as JSON")


def _field(value: Any) -> Any:
  """Writes what is a part of a dataclass's tree, or a plain value that its structure has."""
  if isinstance(value, str | int | float):
    return {"plain": value}
  return _write(value)


def _name(cls: type) -> str:
  name = f"{cls.__module__}:{cls.__qualname__}"
  if _class(name) is not cls:
    raise ValueError(f"{name} is not the name of its class")
  return name


def _class(name: str) -> Any:
  module, _, path = name.partition(":")
  if module.partition(".")[0] not in PACKAGES:
    raise ValueError(f"{name}: classes of trees come from {', '.join(PACKAGES)}")
  found: Any = importlib.import_module(module)
  for part in path.split("."):
    found = getattr(found, part)
  known = hasattr(found, "_fields") or dataclasses.is_dataclass(found)
  if not (isinstance(found, type) and known):
    raise ValueError(f"{name} is no class of a tree")
  return found


def _read(plain: Any) -> Any:
  if plain is None:
    return None
  if plain == _LEAF:
    return _Leaf()
  if "plain" in plain:
    return plain["plain"]
  if "dict" in plain:
    return {name: _read(child) for name, child in plain["dict"].items()}
  if "list" in plain:
    return [_read(child) for child in plain["list"]]
  if "tuple" in plain:
    return tuple(_read(child) for child in plain["tuple"])
  fields = {name: _read(child) for name, child in plain["fields"].items()}
  return _class(plain["class"])(**fields)
