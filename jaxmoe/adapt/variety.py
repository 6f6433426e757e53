"""Symmetry breaking between experts that begin as copies of one network (upcycling)."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np

from jaxmoe.core.decimals import decimal
from jaxmoe.core.errors import InputError
from jaxmoe.core.rng import Keys


@dataclasses.dataclass(frozen=True)
class Variety:
  """What is done to each copy of a SwiGLU network; nothing by default, and outputs stay.

  Attributes:
    noise: Deviation of the normal noise that every entry gets, as a multiple of the deviation of
      its matrix.
    drop: r, the share of hidden units, other ones in each expert, that are drawn anew: from a
      normal distribution with the mean and deviation that their entries had in each matrix
      (Drop-Upcycling, Nakamura et al. 2025, arXiv:2502.19261, section 3). Outputs change with it.
  """

  noise: float = 0.0
  drop: float = 0.0

  def __post_init__(self) -> None:
    if self.noise < 0:
      raise InputError(f"noise must not be negative: noise={self.noise}; 0.01 is little")
    if not 0 <= self.drop <= 1:
      raise InputError(f"drop must lie between 0 and 1: drop={self.drop}; 0.5 is usual")

  def apply(
    self, gate_up_EDGF: np.ndarray, down_EFD: np.ndarray, keys: Keys
  ) -> tuple[np.ndarray, np.ndarray]:
    """Returns both matrices of a layer's experts, in their dtypes, drawn from `keys`."""
    num_experts, hidden = down_EFD.shape[:2]
    count = int(decimal(self.drop) * hidden)
    matrices = []
    for name, x, axis in (("gate", gate_up_EDGF[:, :, 0], 1), ("up", gate_up_EDGF[:, :, 1], 1),
                          ("down", down_EFD, 0)):  # fmt: skip
      varied = []
      for expert in range(num_experts):
        here = keys / str(expert)
        of = x[expert].astype(np.float32)
        drawn = np.asarray(jax.random.normal((here / name)("noise"), of.shape))
        new = of + self.noise * of.std() * drawn
        if count:
          units = np.asarray(jax.random.permutation(here("units"), hidden))[:count]
          at = (slice(None), units) if axis else units
          old = of[at]
          fresh = np.asarray(jax.random.normal((here / name)("drop"), old.shape))
          new[at] = old.mean() + old.std() * fresh
        varied.append(new)
      matrices.append(np.stack(varied).astype(x.dtype))
    return np.stack(matrices[:2], axis=2), matrices[2]
