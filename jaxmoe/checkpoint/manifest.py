"""The manifest of a checkpoint step: the caller's record and an entry for every array.

A manifest is plain JSON and carries a hash of itself, so it is trusted as a whole or not at all.
Only then does it decide two things: whether the arrays of the checkpoint are the ones a reader
asks for (a mismatch is the reader's mistake), and whether the arrays read are the ones written
(a mismatch is damage).
"""

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from jaxmoe.checkpoint.digest import digest, fetch_words
from jaxmoe.core.errors import CheckpointError, InputError

_SHOWN = 4


class DamagedStepError(CheckpointError):
  """A step is there and not what was written. The message names the array or file, and why."""


@dataclass(frozen=True)
class ArrayEntry:
  """What the manifest says of one array."""

  shape: tuple[int, ...]
  dtype: str
  words: tuple[int, int]


@dataclass(frozen=True)
class Manifest:
  """The record of a step and one entry for every array of it, by name."""

  record: dict[str, Any]
  arrays: dict[str, ArrayEntry]

  def to_json(self) -> dict[str, Any]:
    """Returns the manifest as plain JSON values together with their hash."""
    entries = {
      name: {"shape": list(entry.shape), "dtype": entry.dtype, "digest": list(entry.words)}
      for name, entry in sorted(self.arrays.items())
    }
    content = {"record": self.record, "arrays": entries}
    return {**content, "sha256": _hash(content)}

  def shapes(self) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns shape and dtype of every array by name."""
    return {
      name: jax.ShapeDtypeStruct(entry.shape, jnp.dtype(entry.dtype))
      for name, entry in self.arrays.items()
    }


def make_manifest(
  record: dict[str, Any], arrays: Mapping[str, jax.Array], words: Mapping[str, jax.Array]
) -> Manifest:
  """Returns the manifest of arrays whose digests were started as `words`; blocks until done.

  Raises InputError for a record that JSON would not give back as it is (tuples, keys that are
  not strings, NaN): it must be read exactly as written.
  """
  try:
    # A copy, too: the caller may change the record while it is being written.
    plain = json.loads(json.dumps(record, allow_nan=False))
  except (TypeError, ValueError) as error:
    raise InputError(f"the record of a checkpoint must be plain JSON: {error}") from error
  if plain != record or not isinstance(record, dict):
    raise InputError(
      "the record of a checkpoint must be what JSON gives back: a dict with string keys, lists"
      " instead of tuples"
    )
  values = fetch_words(words)
  entries = {
    name: ArrayEntry(tuple(x.shape), x.dtype.name, values[name]) for name, x in arrays.items()
  }
  return Manifest(plain, entries)


def parse_manifest(sealed: object, where: str | os.PathLike) -> Manifest:
  """Returns the manifest sealed in plain JSON values; `where` names its file in errors.

  Raises DamagedStepError if it is not, in every bit, what `Manifest.to_json` returned.
  """
  if not isinstance(sealed, dict):
    raise DamagedStepError(f"{where}: not a manifest but {type(sealed).__name__}")
  content = {key: value for key, value in sealed.items() if key != "sha256"}
  if sealed.get("sha256") != _hash(content) or set(content) != {"record", "arrays"}:
    raise DamagedStepError(f"{where}: the record does not have the hash written with it")
  entries = {
    name: ArrayEntry(tuple(entry["shape"]), entry["dtype"], tuple(entry["digest"]))
    for name, entry in content["arrays"].items()
  }
  return Manifest(content["record"], entries)


def _hash(content: dict[str, Any]) -> str:
  text = json.dumps(content, sort_keys=True, separators=(",", ":"))
  return hashlib.sha256(text.encode()).hexdigest()


def check_requested(
  manifest: Manifest, like: Mapping[str, jax.ShapeDtypeStruct], under: str, where: str
) -> None:
  """Raises InputError, naming arrays, unless `like` asks for just what lies under `under`."""
  saved = {name for name in manifest.arrays if name.startswith(under)}
  faults = [
    (sorted(like.keys() - saved), "not in the checkpoint"),
    (sorted(saved - like.keys()), "in the checkpoint but not asked for"),
  ]
  differ = []
  for name in sorted(saved & like.keys()):
    entry, want = manifest.arrays[name], like[name]
    if (entry.shape, entry.dtype) != (tuple(want.shape), want.dtype.name):
      has, wants = f"{entry.dtype}{list(entry.shape)}", f"{want.dtype.name}{list(want.shape)}"
      differ.append(f"{name} ({has} there, {wants} asked)")
    elif want.sharding is None:
      raise InputError(f"{name}: `like` must carry a sharding; take it from the layout")
  faults.append((differ, "of another shape or dtype"))
  mismatches = [f"{_some(names)} {what}" for names, what in faults if names]
  if mismatches:
    raise InputError(f"{where} is of another model: {'; '.join(mismatches)}")


def check_digests(manifest: Manifest, arrays: Mapping[str, jax.Array], where: str) -> None:
  """Raises DamagedStepError, naming arrays, unless all have the digests of the manifest."""
  read = digest(arrays)
  wrong = [name for name in sorted(arrays) if read[name] != manifest.arrays[name].words]
  if wrong:
    raise DamagedStepError(f"{where}: other values than were written in {_some(wrong)}")


def _some(names: list[str]) -> str:
  """The first few names, and how many more there are."""
  more = len(names) - _SHOWN
  return ", ".join(names[:_SHOWN]) + (f" and {more} more" if more > 0 else "")
