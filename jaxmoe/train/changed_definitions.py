"""Definitions that were mended under their old names, of which resumed runs are told.

A change of what a recipe means is a field of it, which older files do not have. What only makes a
name mean what it always said has no field: a checkpoint names the mended definitions under which it
was written, and a run that goes on from one that does not know one it uses is told.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from jaxmoe.models.transformer import Decoder
from jaxmoe.moe.balance import Heterogeneous, LoadBalance, NullAveraged

KEY = "definitions"
"""Where the record of a checkpoint names those it was written under."""


def of_shares(decoder: Decoder) -> str:
  """Returns what changed for balance losses of scores that are no shares of 1; '' without any."""
  pairs = {
    f"{aux_loss.name} of {layer.router.score} scores"
    for layers in decoder.routed_layers().values()
    for layer in layers.values()
    for aux_loss in layer.balance
    if isinstance(aux_loss, LoadBalance | NullAveraged | Heterogeneous)
    and not layer.router.sum_to_1
  }
  if not pairs:
    return ""
  return (
    f"{', '.join(sorted(pairs))}: a token's scores are now divided by their sum over all experts "
    "(1 at perfect balance), which they were not before: values and gradients change"
  )


MENDED: dict[str, Callable[[Decoder], str]] = {"balance_of_shares": of_shares}


def mended(record: Mapping[str, Any], decoder: Decoder) -> dict[str, str]:
  """Returns what changed since a checkpoint with `record`, by name of the definition."""
  known = record.get(KEY, ())
  changed = {name: of(decoder) for name, of in MENDED.items() if name not in known}
  return {name: what for name, what in changed.items() if what}
