"""Random keys derived by name, never by call order.

A key depends on the seed, the path of names that leads to it and, where layers are made in one
vectorised call, the layer's index. Adding, removing or reordering parameters therefore changes no
other parameter, and a stack of layers is initialised alike however it is grouped.
"""

from __future__ import annotations

import dataclasses
import hashlib

import jax
import jax.numpy as jnp
import numpy as np

from jaxmoe.core.errors import InputError


def name_hash(name: str) -> int:
  """Returns a 32-bit number that depends on `name` alone, on every machine and run."""
  return int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "little")


def check_seed(seed: int) -> None:
  """Raises InputError for a seed that does not fit 32 bits: JAX would silently drop the rest."""
  if not 0 <= seed < 2**32:
    raise InputError(f"a seed must lie in [0, 2**32): {seed=}")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Keys:
  """A namespace of keys: `(keys / 'attention')('q')` is the key of `attention/q`."""

  root: jax.Array
  path: str = dataclasses.field(default="", metadata={"static": True})

  @classmethod
  def from_seed(cls, seed: int) -> Keys:
    """Returns the namespace of `seed`.

    Raises:
      InputError: the seed does not fit 32 bits.
    """
    check_seed(seed)
    return cls(jax.random.key(np.uint32(seed)))

  def __truediv__(self, name: str) -> Keys:
    return dataclasses.replace(self, path=f"{self.path}/{name}" if self.path else name)

  def at(self, index: jax.Array | int) -> Keys:
    """Returns the namespace of one layer, step or microbatch; `index` may be traced."""
    return Keys(jax.random.fold_in(self("at"), index))

  def __call__(self, name: str) -> jax.Array:
    """Returns the key of `name` in this namespace."""
    return jax.random.fold_in(self.root, jnp.uint32(name_hash((self / name).path)))
