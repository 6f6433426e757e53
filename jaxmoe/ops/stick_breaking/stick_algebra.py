"""The algebra of parts of a stick: how they merge, and part again for gradients.

With L the log of what nearer parts leave and F what farther ones find together, the total is
e^L (out + e^left F) beside what nearer ones find: so a part's gradient needs L, kept of the forward
pass, and F, which grows from the farthest part. Nothing is subtracted.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from jaxmoe.ops.attention.parts import PartAlgebra
from jaxmoe.ops.stick_breaking.stick_part import StickPart, merge


def _kept(parts: Sequence[StickPart], total: StickPart) -> list[jax.Array]:
  left_BLN, kept = jnp.zeros_like(total.left_BLN), []
  for part in parts:
    kept.append(left_BLN)
    left_BLN = left_BLN + part.left_BLN
  return kept


def _ready(left_BLN: jax.Array, dtotal: StickPart) -> tuple[jax.Array, jax.Array]:
  return left_BLN, dtotal.left_BLN


def _pull(
  part: StickPart, dout_BLNP: jax.Array, ready: tuple[jax.Array, jax.Array], far: StickPart | None
) -> StickPart:
  left_BLN, dleft_BLN = ready
  share_BLN = jnp.exp(left_BLN)
  if far is not None:
    beyond_BLN = jnp.sum(dout_BLNP * far.out_BLNP, axis=-1)
    dleft_BLN = dleft_BLN + share_BLN * jnp.exp(part.left_BLN) * beyond_BLN
  return StickPart(share_BLN[..., None] * dout_BLNP, dleft_BLN)


STICK_PARTS = PartAlgebra(merge, _kept, _ready, _pull, ordered=True)
