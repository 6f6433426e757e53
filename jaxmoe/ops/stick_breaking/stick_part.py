"""A part of a stick: what queries find along it, and how parts are put together."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp


class StickPart(NamedTuple):
  """What queries find among some keys, had no later key taken anything.

  Attributes:
    out_BLNP: float32, values weighted by shares of the stick.
    left_BLN: float32, the log of what these keys leave, at most 0.
  """

  out_BLNP: jax.Array
  left_BLN: jax.Array


def merge(near: StickPart, far: StickPart) -> StickPart:
  """Returns what queries find among the keys of two parts, of which all of `near` come later."""
  left = jnp.exp(near.left_BLN)[..., None]
  return StickPart(near.out_BLNP + left * far.out_BLNP, near.left_BLN + far.left_BLN)
