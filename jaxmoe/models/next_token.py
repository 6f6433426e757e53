"""The draw of a next token: the likeliest, or by temperature and nucleus from a key of its own."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxmoe.core.rng import Keys, check_seed


class Chance(NamedTuple):
  """What a draw depends on besides logits.

  Attributes:
    temperature: Float32, above 0.
    top_p: Float32.
    root: The seed, uint32; as programs have it, `rooted`, the key of all draws.
  """

  temperature: Any
  top_p: Any
  root: Any

  @classmethod
  def of(cls, temperature: float, top_p: float, seed: int) -> Chance:
    """Returns that of a seed."""
    check_seed(seed)
    # Logits over less than this overflow float32, and what is drawn would not change any more.
    return cls(np.float32(max(temperature, 1e-6)), np.float32(top_p), np.uint32(seed))

  def rooted(self) -> Chance:
    """Returns it with the key of its seed."""
    return self._replace(root=Keys(jax.random.key(self.root))("sample"))


def draw(
  logits_BV: jax.Array, slot_B: jax.Array, alive_B: jax.Array, chance: Chance, greedy: bool
) -> tuple[jax.Array, jax.Array]:
  """Returns the id after the slots of each row, int32, and whether all logits are finite.

  A draw depends on its row's number, the slot and the seed; logits of rows that are not alive may
  be anything.
  """
  finite = jnp.all(jnp.isfinite(logits_BV) | ~alive_B[:, None])
  if greedy:
    return jnp.argmax(logits_BV, axis=-1).astype(jnp.int32), finite

  def of_row(row: jax.Array, slot: jax.Array, logits_V: jax.Array) -> jax.Array:
    key = Keys(chance.root).at(row).at(slot)("draw")
    return jax.random.categorical(key, nucleus(logits_V / chance.temperature, chance.top_p))

  ids_B = jax.vmap(of_row)(jnp.arange(slot_B.shape[0]), slot_B, logits_BV)
  return ids_B.astype(jnp.int32), finite


def nucleus(logits_V: jax.Array, top_p: jax.Array) -> jax.Array:
  """Returns the logits with -inf outside the smallest set that holds `top_p` probability."""
  order_V = jnp.argsort(-logits_V)
  sorted_V = jax.nn.softmax(logits_V[order_V])
  # The likeliest token is always in the set: nothing comes before it.
  inside_V = jnp.cumsum(sorted_V) - sorted_V < top_p
  keep_V = jnp.zeros_like(inside_V).at[order_V].set(inside_V)
  return jnp.where(keep_V | (top_p >= 1), logits_V, -jnp.inf)
