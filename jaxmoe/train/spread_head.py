"""Embedding and head over the devices of all stages (vocabulary parallelism, Yeung et al. 2024).

Every device has V / n rows of the embedding and columns of the head. What the last stage hands on
goes to all devices as a sum in which all others have zeros, so that the gradient comes back the
same way; likewise with what the first stage takes. Logits stay where they are made: a microbatch
sends O(T D) numbers to the devices, and O(T) to make one softmax of all shares.

Algorithm 2 makes logits and the gradient of the head's input in `S`, and leaves for `T`, which may
come late, what the gradient of the head's weight is made of: that of logits, (T, V / n) in float32.
Algorithm 1 finds in `S` only the loss, keeps the head's input, and makes in `T` logits once more
and both gradients, in chunks of tokens, as one device does. The paper's barriers are sums here that
all devices make in one tick, one after another: of the head's input, of the softmax (maximum, then
mass and right logit), and of the gradient. Its algorithm 2 multiplies by the weight before the
softmax is known, to have one sum in the place of the last two; here they are two.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from jaxmoe.core.deferred_products import (
  ProductRecord,
  Tapped,
  Watched,
  empty_taps,
  weight_gradients,
)
from jaxmoe.core.metrics import Mean
from jaxmoe.core.tokens import Tokens
from jaxmoe.models.loss_pieces import LossPieces
from jaxmoe.models.stack import Handed
from jaxmoe.models.transformer import Params
from jaxmoe.parallel.pipelines import Vocabulary

STREAM_SUMS = {1: 5, 2: 4}
"""Sums of a microbatch's residual stream over all devices, by algorithm: what the first stage takes
and its gradient, what the last hands on (of algorithm 1 again in `T`) and its gradient."""


@dataclasses.dataclass(frozen=True)
class SpreadHead:
  """The functions of a vocabulary that lies over all devices of a pipeline.

  Attributes:
    pieces: Of the model's loss.
    vocabulary: The algorithm.
    axis: The mesh axis of the stages.
    device: Of the last stage.
    share: By how many devices a loss is told that all of them find.
  """

  pieces: LossPieces
  vocabulary: Vocabulary
  axis: str
  device: int
  share: int

  def outer(self, params: Params) -> Params:
    """Returns the parameters that the head reads."""
    names = ("embed",) if self.pieces.decoder.config.tied else ()
    return {name: params[name] for name in (*names, "final_norm", "head") if name in params}

  def embed(self, params: Params, tokens: Tokens) -> Handed:
    """Returns what the first stage takes, on every device."""
    ready = self.pieces.decoder.parallel.gather_params({"embed": params["embed"]})
    return self.pieces.embed(ready, tokens)

  def unembed(self, params: Params, tokens: Tokens, gradient: Handed) -> Params:
    """Returns the gradient of this device's part of the embedding.

    Args:
      params: Of the device.
      tokens: Of a microbatch.
      gradient: Of what `embed` gave, zeros on all devices but that of the first stage.
    """
    table = {"embed": params["embed"]}
    return jax.vjp(lambda table: self.embed(table, tokens), table)[1](gradient)[0]

  def loss(
    self, outer: Params, handed: Handed, labels_BL: jax.Array, labels: jax.Array | float
  ) -> tuple[jax.Array, Mean]:
    """Returns this device's share of a microbatch's loss, and the sum that all of them find.

    Args:
      outer: The parameters of `outer`.
      handed: By the last stage, on its device.
      labels_BL: Of the microbatch.
      labels: How many the step has.
    """
    here = jax.lax.axis_index(self.axis) == self.device
    x_BLD = jax.lax.psum(jnp.where(here, handed[0], jnp.zeros((), handed[0].dtype)), self.axis)
    ready = self.pieces.decoder.parallel.gather_params(outer)
    at_once = max(1, labels_BL.size) if self.vocabulary.algorithm == 2 else None
    nll = self.pieces.head(ready, x_BLD, labels_BL, chunk=at_once)
    return nll.sum / labels / self.share, nll

  def leaves(self, outer: Params, labels_BL: jax.Array, message: Handed) -> Any:
    """Returns the shapes of what `S` leaves of a microbatch for `T`, of that of `message`."""
    if self.vocabulary.algorithm == 1:
      return message[0]
    return jax.eval_shape(functools.partial(self._taps, outer, labels_BL), message)

  def forward(
    self, outer: Params, handed: Handed, labels_BL: jax.Array, labels: jax.Array | float
  ) -> tuple[Mean, Any, Params, Handed | None]:
    """Does `S`.

    Returns:
      The loss, what is left for `T`, and of algorithm 2 the gradients of parameters beside the
      head's weight and of what was handed; of 1 none.
    """
    if self.vocabulary.algorithm == 1:
      return self.loss(outer, handed, labels_BL, labels)[1], handed[0], {}, None
    part, name = self._weight
    weight = jax.lax.stop_gradient(outer[part][name])
    rest = {
      key: {leaf: of for leaf, of in params.items() if (key, leaf) != (part, name)}
      for key, params in outer.items()
    }

    def loss(rest: Params, taps: Any, handed: Handed) -> tuple[jax.Array, Mean]:
      return self.loss(self._with(rest, Tapped(weight, taps)), handed, labels_BL, labels)

    taps = self._taps(outer, labels_BL, handed)
    share, back, nll = jax.vjp(loss, rest, taps, handed, has_aux=True)
    d_outer, d_taps, d_handed = back(jnp.ones_like(share))
    return nll, d_taps, d_outer, d_handed

  def backward(
    self, outer: Params, left: Any, handed: Handed, labels_BL: jax.Array, labels: jax.Array | float
  ) -> tuple[Params, Handed | None]:
    """Does `T`.

    Returns:
      Gradients of parameters and of what was handed; of algorithm 2 the head's weight's alone.

    Args:
      outer: The parameters of `outer`.
      left: By `S`.
      handed: Of the shapes of what the last stage hands on.
      labels_BL: Of the microbatch.
      labels: How many the step has.
    """
    if self.vocabulary.algorithm == 1:
      given = left, *jax.tree.map(jnp.zeros_like, handed[1:])
      share, back, _ = jax.vjp(
        lambda outer, handed: self.loss(outer, handed, labels_BL, labels), outer, given,
        has_aux=True,
      )  # fmt: skip
      d_outer, d_handed = back(jnp.ones_like(share))
      return d_outer, d_handed
    part, name = self._weight
    gather = self.pieces.decoder.parallel.gather_params
    ready, back = jax.vjp(gather, {part: {name: outer[part][name]}})
    record = self._record(outer, handed, labels_BL)
    return back({part: weight_gradients(record, ready[part], {name: left})})[0], None

  @property
  def _weight(self) -> tuple[str, str]:
    """The part and the name of the head's weight."""
    return ("embed", "table") if self.pieces.decoder.config.tied else ("head", "weight")

  def _with(self, outer: Params, weight: Any) -> Params:
    """Returns the parameters with another thing in the place of the head's weight."""
    part, name = self._weight
    return {**outer, part: {**outer[part], name: weight}}

  def _record(self, outer: Params, handed: Handed, labels_BL: jax.Array) -> ProductRecord:
    """Returns the product by the head's weight, whose gradient is put off."""
    record, (part, name) = ProductRecord(), self._weight
    watched = self._with(outer, Watched(outer[part][name], name, record))
    jax.eval_shape(lambda handed: self.loss(watched, handed, labels_BL, jnp.ones(())), handed)
    return record

  def _taps(self, outer: Params, labels_BL: jax.Array, handed: Handed) -> Any:
    """Returns the taps of the head's weight, whose gradients `S` leaves."""
    record, (_, name) = self._record(outer, handed, labels_BL), self._weight
    return jax.tree.map(lambda tap: tap[0], empty_taps(record, name, 1))
