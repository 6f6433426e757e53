"""Big, small and skip: experts of several widths (Duo-LLM, Alizadeh et al. 2024, arXiv:2410.10846).

Section 3: a layer holds a large network, a small one and none at all; what a token meets is the
router's choice, or given (`Tokens.replayed_experts`), as in training with random patterns and in
the search for the best one. A skipped token keeps its stream, bit for bit: the norm before the
layer is skipped with it.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from jaxmoe.core.errors import InputError
from jaxmoe.core.init import Init
from jaxmoe.moe.experts.family import Experts, SeveralKinds, runs
from jaxmoe.moe.experts.swiglu import SwiGLU


@dataclasses.dataclass(frozen=True)
class Duo(Experts):
  """SwiGLU experts of several widths.

  Attributes:
    widths: The hidden width of each expert of the layer, in order; 0, for the last ones, skips.
      Experts of one width next to each other run as one product.
  """

  widths: tuple[int, ...] = (128, 32, 0)

  mixed: ClassVar[bool] = True

  def __post_init__(self) -> None:
    idle = self.num_zero_compute(len(self.widths))
    if len(self.widths) <= idle or min(self.widths[: len(self.widths) - idle]) < 1:
      raise InputError(
        f"widths must be at least 1, or 0 for the last ones, which skip: widths={self.widths}"
      )

  def check(self, num_experts: int) -> None:
    """Refuses another number of widths than of experts."""
    if len(self.widths) != num_experts:
      raise InputError(
        f"widths needs one number an expert: widths={self.widths}, num_experts={num_experts}"
      )

  def num_zero_compute(self, num_experts: int) -> int:
    """Returns how many skip."""
    return self.widths.count(0)

  def expert_params(self, dim: int, num_experts: int) -> tuple[int, ...]:
    """Returns each expert's own number."""
    return tuple(SwiGLU.matrices * dim * width for width in self.widths)

  def build(self, init: Init, dim: int, num_experts: int) -> SeveralKinds:
    """Returns the module with the weights of all experts."""
    kinds = [(f"from_{start}", width, start, stop) for width, start, stop in runs(self.widths)]
    return SeveralKinds(
      *(
        (name, start, stop, SwiGLU(width).build(init / name, dim, stop - start))
        for name, width, start, stop in kinds
        if width
      )
    )
