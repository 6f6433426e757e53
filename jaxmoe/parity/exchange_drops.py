"""The one-device model of a comparison, which drops what exchanges between devices would."""

from __future__ import annotations

import dataclasses

import jax

from jaxmoe.models.block import MLPConfig, MoEConfig
from jaxmoe.models.transformer import TransformerConfig
from jaxmoe.moe.dispatch import AllToAll, Counts, DispatchContext, Dropless
from jaxmoe.moe.dispatch.plan import ExpertFunction
from jaxmoe.moe.routing import Routing


@dataclasses.dataclass(frozen=True)
class ExchangeBounded(Dropless):
  """Without capacity but for the buffers of an exchange between so many devices.

  Attributes:
    exchange: What has the buffers.
    devices: e, over how many devices experts would be spread.
  """

  exchange: AllToAll = AllToAll()
  devices: int = 1

  def run(
    self, x_TD: jax.Array, routing: Routing, experts: ExpertFunction, context: DispatchContext
  ) -> tuple[jax.Array, Counts]:
    """Returns (T, D) and what would have found no room."""
    lost: dict[str, jax.Array] = {}
    if routing.scores_TE.shape[1] % self.devices == 0:  # or they are whole on every device
      routing, lost = self.exchange.admit(routing, self.devices)
    y_TD, counts = super().run(x_TD, routing, experts, context)
    return y_TD, Counts(counts.dropped | lost, counts.spilled)


def with_exchange_drops(model: TransformerConfig, degree: int) -> TransformerConfig:
  """Returns the model of one device that drops what `degree` devices would."""

  def change(ffn: MLPConfig | MoEConfig) -> MLPConfig | MoEConfig:
    if isinstance(ffn, MLPConfig) or not isinstance(ffn.dispatch, Dropless):
      return ffn
    if not isinstance(ffn.exchange, AllToAll) or ffn.exchange.bound is None:
      return ffn
    bounded = ExchangeBounded(ffn.exchange, degree)
    return dataclasses.replace(ffn, dispatch=bounded)

  return model.map_ffns(change)
