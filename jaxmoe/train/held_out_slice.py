"""The slice of held-out text that a run scores on the way, and how domains weigh in it.

Of each domain only `Evaluation.max_bytes` are scored on the way, so these bits per byte are another
number than those of all held-out text (`jaxmoe evaluate`, eval.json): tenths apart where documents
differ. Whatever shows them names the slice, and weighs domains by all their held-out bytes, as
eval.json does.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

KEY = "slice"
"""Where the `start` event holds `plain`, under `data`."""


@dataclasses.dataclass(frozen=True)
class HeldOutSlice:
  """How many bytes a domain has that are scored; empty where that is not known.

  Attributes:
    scored: On the way.
    held_out: In all held-out documents.
  """

  scored: Mapping[str, float]
  held_out: Mapping[str, float]

  @property
  def is_whole(self) -> bool:
    """Whether all that is held out is scored on the way."""
    return any(self.held_out.values()) and dict(self.scored) == dict(self.held_out)

  @property
  def title(self) -> str:
    """What charts and tables of its scores are called."""
    return "Held out" if self.is_whole else "Held-out slice"

  @property
  def sizes(self) -> str:
    """How much is scored of how much, '' where that is not known."""
    part, whole = sum(self.scored.values()), sum(self.held_out.values())
    if not part:
      return ""
    if whole < 10_000:
      return f"{part:,.0f} of {whole:,.0f} bytes"
    return f"{part / 1000:,.0f} of {whole / 1000:,.0f} kB"

  @property
  def name(self) -> str:
    """What lines call it."""
    if self.is_whole:
      return "all held-out text"
    return "a slice of held-out text" + (f" ({self.sizes})" if self.sizes else "")

  def overall(
    self, domains: Mapping[str, float | None], bits_per_byte: float | None
  ) -> float | None:
    """Returns the score of all domains together, each by its held-out bytes.

    Args:
      domains: The score of each; None or NaN for one that is not finite.
      bits_per_byte: What the run says, for when the sizes of domains are not known.
    """
    if not all(name in self.held_out for name in domains):
      return bits_per_byte
    empty = {name for name, size in self.scored.items() if not size}
    weights = {name: self.held_out[name] for name in domains if name not in empty}
    if not sum(weights.values()):
      return bits_per_byte
    total = 0.0
    for name, weight in weights.items():
      value = domains[name]
      total += weight * (math.nan if value is None else value)
    return total / sum(weights.values())

  def plain(self) -> dict[str, dict[str, float]]:
    """Returns {domain: {bytes, of}}."""
    return {name: {"bytes": self.scored[name], "of": of} for name, of in self.held_out.items()}


def slice_of(start: Mapping[str, Any], config: Any) -> HeldOutSlice:
  """Returns the slice of a run.

  Args:
    start: Its `start` event, {} if there is none; older ones have the held-out bytes alone.
    config: Its config.json, of which older runs need `evaluation.max_bytes`.
  """
  domains = _object(_object(start.get("data")).get(KEY))
  scored, held_out = ({n: _size(of, key) for n, of in domains.items()} for key in ("bytes", "of"))
  if domains:
    return HeldOutSlice(scored, held_out)
  domains = _object(_object(start.get("data")).get("domains"))
  held_out = {n: _size(_object(of).get("held_out"), "bytes") for n, of in domains.items()}
  most = _size(_object(config).get("evaluation"), "max_bytes")
  is_whole = all(size <= most for size in held_out.values())
  return HeldOutSlice(held_out if is_whole else {}, held_out)


def _object(value: Any) -> dict[str, Any]:
  return value if isinstance(value, dict) else {}


def _size(value: Any, name: str) -> float:
  """Returns a number above 0 of an object, 0 for anything else."""
  size = _object(value).get(name)
  if isinstance(size, bool) or not isinstance(size, int | float):
    return 0
  return size if 0 < size < 2**63 else 0
