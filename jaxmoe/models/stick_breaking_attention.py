"""Stick-breaking attention as a kind: no softmax, no positions (ModuleFormer, section 2.2)."""

from __future__ import annotations

import dataclasses
from typing import Literal

from jaxmoe.core.init import Init
from jaxmoe.core.parallel_context import ONE_DEVICE, ParallelContext
from jaxmoe.models.attention_base import AttentionBase, AttentionBaseLayer
from jaxmoe.ops.attention import STICK_BREAKING


@dataclasses.dataclass(frozen=True)
class StickBreaking(AttentionBase):
  """Near keys take their share first; the order of tokens is known from nothing else.

  Attributes:
    backend: `blocks` never holds all scores at once; `reference` does.
  """

  backend: Literal["blocks", "reference"] = "blocks"

  def build(
    self,
    init: Init,
    dim: int,
    eps: float,
    num_experts: int = 0,
    parallel: ParallelContext = ONE_DEVICE,
  ) -> StickBreakingLayer:
    """Returns the module with its weights."""
    del eps, parallel
    return StickBreakingLayer(self, init, dim, num_experts)


class StickBreakingLayer(AttentionBaseLayer):
  """The weights of stick-breaking attention."""

  def __init__(self, config: StickBreaking, init: Init, dim: int, num_experts: int = 0):
    super().__init__(config, init, dim, num_experts)
    self.kernel = STICK_BREAKING[config.backend]
