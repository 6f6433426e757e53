"""The held-out split: a function of each document's key alone.

Order does not matter, and adding a file moves no other. Files that appear in several domains (two
overlapping folders) are held out in all of them if they are in one.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping

from jaxmoe.core.errors import InputError

SplitKey = tuple[str, str]
"""(split key, unit) of a document; see `RawExample`."""


def hash_fraction(key: str) -> float:
  """Returns a number in [0, 1) that depends on `key` alone; below the share means held out."""
  digest = hashlib.blake2b(key.encode("utf-8"), digest_size=8).digest()
  return (int.from_bytes(digest, "big") >> 11) / 2**53


def held_out_units(domains: Mapping[str, Iterable[SplitKey]], share: float) -> set[str]:
  """Returns the units held out in any domain.

  Raises:
    InputError: a domain has no held-out document, or no other; the message has a share that works.
  """
  lists = {domain: list(keys) for domain, keys in domains.items()}
  pairs = {pair for keys in lists.values() for pair in keys}
  held = {unit for key, unit in pairs if hash_fraction(key) < share}
  for domain, keys in lists.items():
    held_here = sum(unit in held for _, unit in keys)
    if 0 < held_here < len(keys):
      continue
    places = sorted({hash_fraction(key) for key, _ in keys})
    none = "none falls into" if not held_here else "all fall into"
    raise InputError(
      f"domain {domain!r}: of {len(keys)} documents {none} the held-out share of {share}; "
      + _cure(places)
    )
  return held


def _cure(places: list[float]) -> str:
  if len(places) < 2:
    return "cut the text into more files, or into the lines of a .jsonl file: some are held out"
  low, high = places[:2]
  return f"add documents or set --config.data.held_out={_between(low, high)}"


def _between(low: float, high: float) -> str:
  """Returns the shortest decimal fraction in (low, high]."""
  for digits in range(1, 18):
    text = f"{low + 10**-digits:.{digits}f}"
    if low < float(text) <= high:
      return text
  return repr(high)
