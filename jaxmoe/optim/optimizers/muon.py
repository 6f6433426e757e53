"""Muon: the momentum of a matrix, made nearly orthogonal (kellerjordan.github.io/posts/muon).

Matrices go by Muon, all else and the named exceptions by Adam. Which dims are the matrix, and which
only count matrices, is read from the logical dims, so layers, experts, gate and up are each their
own matrix, and heads together are one side of one. Every matrix with a momentum moves by the same
amount, however small the momentum: an expert that no token reaches moves on until it underflows.
"""

from __future__ import annotations

import dataclasses
import math
from fnmatch import fnmatchcase
from typing import Any

import jax
import optax
import optax.contrib

from jaxmoe.core.config_io import added
from jaxmoe.core.errors import InputError
from jaxmoe.core.layout import Dims
from jaxmoe.ops.guard import guarded
from jaxmoe.optim.matrices import map_dims, matrix_axes
from jaxmoe.optim.optimizers.checks import check_decay, check_positive, check_rates


@dataclasses.dataclass(frozen=True)
class Muon:
  """Muon's momentum and iterations, and Adam's constants for what is no matrix.

  A matrix (I, O) moves by `update_rms * sqrt(max(I, O))` times its orthogonal direction, which
  gives the rms of an AdamW update: one learning rate and decay serve both (arXiv:2502.16982,
  section 2.2). `adam_names` are glob patterns of matrices that go by Adam: an embedding or a head
  holds one vector per token rather than a map. `single_heads` takes the map to one head, as latent
  attention's rotary key, for the matrix it is; runs of before gave it to Adam.
  """

  beta: float = 0.95
  iterations: int = 5
  update_rms: float = 0.2
  adam_names: tuple[str, ...] = ("embed/*", "head/*")
  adam_b1: float = 0.9
  adam_b2: float = 0.95
  eps: float = 1e-8
  weight_decay: float = 0.1
  single_heads: bool = added(True, before=False)

  def __post_init__(self) -> None:
    check_rates(beta=self.beta, adam_b1=self.adam_b1, adam_b2=self.adam_b2)
    check_positive(update_rms=self.update_rms, eps=self.eps)
    check_decay(self.weight_decay)
    if self.iterations < 1:
      raise InputError(f"muon needs an iteration: iterations={self.iterations}; take 5")

  def direction(self, names: Any, dims: Any) -> optax.GradientTransformationExtraArgs:
    """Returns optax's Muon where there are matrices and optax's Adam elsewhere."""
    axes = map_dims(self._axes, dims, names)
    labels = jax.tree.map(
      lambda axis: "adam" if axis == optax.MaskedNode() else "muon", axes, is_leaf=_is_axes
    )
    muon = optax.contrib.scale_by_muon(
      ns_steps=self.iterations,
      beta=self.beta,
      eps=self.eps,
      weight_dimension_numbers=axes,
    )
    adam = optax.scale_by_adam(b1=self.adam_b1, b2=self.adam_b2, eps=self.eps)
    scaled = optax.chain(muon, optax.stateless(lambda updates, _: self._scale(updates, axes)))
    return guarded(optax.partition({"muon": scaled, "adam": adam}, labels))

  def _axes(self, dims: Dims, name: str) -> optax.contrib.MuonDimensionNumbers | optax.MaskedNode:
    if any(fnmatchcase(name, pattern) for pattern in self.adam_names):
      return optax.MaskedNode()
    sides = matrix_axes(name, dims, self.single_heads)
    return optax.contrib.MuonDimensionNumbers(*sides) if sides else optax.MaskedNode()

  def _scale(self, updates: Any, axes: Any) -> Any:
    def scale(update: jax.Array, axis: optax.contrib.MuonDimensionNumbers) -> jax.Array:
      sizes = (math.prod(update.shape[i] for i in side) for side in axis)
      return update * (self.update_rms * math.sqrt(max(sizes)))

    return jax.tree.map(scale, updates, axes)


def _is_axes(node: Any) -> bool:
  return isinstance(node, (optax.contrib.MuonDimensionNumbers, optax.MaskedNode))
