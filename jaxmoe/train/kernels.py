"""Which back end computes each operation: names in the recipe, and what chooses by them."""

from __future__ import annotations

import dataclasses

from jaxmoe.core.backends import AUTO, Backends, ChoiceLog, Chooser, Devices
from jaxmoe.core.config_io import unknown
from jaxmoe.core.layout import Layout
from jaxmoe.core.moved import Moved
from jaxmoe.moe.dispatch import row_exchange
from jaxmoe.ops import (
  attention,
  combine,
  cross_entropy,
  expert_mlp,
  grouped_matmul,
  move,
  stick_breaking,
  top_k,
)

OPERATIONS: dict[str, Backends] = {
  "expert_mlp": expert_mlp.BACKENDS,
  "grouped_matmul": grouped_matmul.BACKENDS,
  "exchange": row_exchange.BACKENDS,
  "cross_entropy": cross_entropy.BACKENDS,
  "attention": attention.BACKENDS,
  "stick_breaking": stick_breaking.BACKENDS,
  "top_k": top_k.BACKENDS,
  "move": move.BACKENDS,
  "combine": combine.BACKENDS,
}
"""The back ends of each operation; a key is a field of `Kernels`."""


@dataclasses.dataclass(frozen=True)
class Kernels:
  """The back end of each operation by name; `auto` is the first that fits devices and shapes.

  They are ways to compute the same: results differ by rounding.

  Attributes:
    expert_mlp: A layer of experts whose weights are plain arrays, without capacity.
    grouped_matmul: Products of rows with the matrices of their experts.
    exchange: How rows of a layer without capacity travel between devices.
    cross_entropy: The loss of the next token.
    attention: Softmax attention, over keys or over latents.
    stick_breaking: Attention by stick-breaking.
    top_k: Which experts have the highest rank.
    move: What experts read, in the order of their rows.
    combine: What experts made of rows, summed by token.
  """

  expert_mlp: str = AUTO
  grouped_matmul: str = AUTO
  exchange: str = AUTO
  cross_entropy: str = AUTO
  attention: str = AUTO
  stick_breaking: str = AUTO
  top_k: str = AUTO
  move: str = AUTO
  combine: str = AUTO

  def __post_init__(self) -> None:
    for operation, name in self._pairs():
      if name not in (AUTO, *OPERATIONS[operation]):
        raise unknown(f"kernels.{operation}", "back end", name, (AUTO, *OPERATIONS[operation]))

  @property
  def asked(self) -> tuple[tuple[str, str], ...]:
    """Pairs of an operation and the back end that is asked for."""
    return tuple((operation, name) for operation, name in self._pairs() if name != AUTO)

  def chooser(
    self, layout: Layout | None = None, strict: bool = True, log: ChoiceLog | None = None
  ) -> Chooser:
    """Returns what chooses for programs.

    Args:
      layout: Of the devices that they are for; None for those of this process.
      strict: Whether what is asked for and does not fit is refused.
      log: Where choices are told.
    """
    devices = None if layout is None else Devices.of(layout.mesh.devices.flat)
    return Chooser(devices, self.asked, strict, log)

  def _pairs(self) -> list[tuple[str, str]]:
    return [(field.name, getattr(self, field.name)) for field in dataclasses.fields(self)]


def references() -> Chooser:
  """Returns what takes the back ends that are written to be read, the oracles, on one device."""
  known = tuple((name, "reference") for name in ("expert_mlp", "attention", "stick_breaking"))
  known += (("grouped_matmul", "loop"),)
  return Chooser(names=known, strict=False)


_BY_ROWS = {"kernels.expert_mlp": "rows"}
MOVED = (
  Moved(
    "Dropless",
    "model.stack.*.pattern.*.ffn.dispatch.backend",
    {
      "fused": {"kernels.expert_mlp": "fused"},
      "blocks": _BY_ROWS | {"kernels.grouped_matmul": "blocks"},
      "ragged": _BY_ROWS | {"kernels.grouped_matmul": "ragged"},
      "loop": _BY_ROWS | {"kernels.grouped_matmul": "loop"},
    },
  ),
  Moved(
    "AllToAll",
    "model.stack.*.pattern.*.ffn.exchange.ragged",
    {"always": {"kernels.exchange": "ragged"}},
  ),
  *(
    Moved(
      "StickBreaking",
      f"model.stack.*.pattern.*.attention.{place}backend",
      {"reference": {"kernels.stick_breaking": "reference"}},
    )
    for place in ("", "heads.")
  ),
)
"""Where records deep in a recipe named back ends before."""
