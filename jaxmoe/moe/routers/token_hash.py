"""Hash routing: which experts a token goes to is drawn once for each id of the vocabulary."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from jaxmoe.core.errors import InputError
from jaxmoe.moe.routers.router import Router, RouterInputs, Selection


@dataclasses.dataclass(frozen=True)
class Hash(Router):
  """A distinct experts by id, drawn uniformly, weighed alike (Roller et al. 2021, random hash).

  Nothing is learnt, and the table is none: a hash of seed, id and expert ranks the experts, the
  same in every layer, run and machine. Weights are 1 / A, or 1 without `normalize`.

  Attributes:
    seed: Another one gives other experts.
    by_score: Weights are the gate's scores of the experts instead (DeepSeek-V4's first layers).
  """

  seed: int = 0
  by_score: bool = False

  def __post_init__(self) -> None:
    super().__post_init__()
    if not 0 <= self.seed < 2**32:
      raise InputError(f"seed must fit 32 bits: seed={self.seed}")

  def select(self, inputs: RouterInputs) -> Selection:
    """Routes each token by its id alone."""
    id_T1 = inputs.tokens.id.reshape(-1, 1).astype(jnp.uint32)
    expert_1E = jnp.arange(inputs.scores_TE.shape[1], dtype=jnp.uint32)[None]
    drawn_TE = mix(mix(id_T1 ^ mix(jnp.uint32(self.seed))) + expert_1E)
    # float32 holds 24 bits.
    expert_TA = inputs.top_k((drawn_TE >> 8).astype(jnp.float32), inputs.num_active)
    return Selection(expert_TA, self.combine_weights(inputs.scores_TE, expert_TA))

  def combine_weights(
    self, scores_TE: jax.Array, expert_TA: jax.Array, valid_TA: jax.Array | None = None
  ) -> jax.Array:
    """Returns weights alike, or by score if asked."""
    alike_TE = scores_TE if self.by_score else jnp.ones_like(scores_TE)
    return super().combine_weights(alike_TE, expert_TA, valid_TA)


def mix(number: jax.Array) -> jax.Array:
  """Returns uint32 with all bits mixed, a bijection (the finalizer of MurmurHash3)."""
  number = (number ^ (number >> 16)) * jnp.uint32(0x85EBCA6B)
  number = (number ^ (number >> 13)) * jnp.uint32(0xC2B2AE35)
  return number ^ (number >> 16)
