"""FSDP prefetch: a scan over layers that gathers the next layer's weights during this one.

Within `lax.scan` a weight that is gathered where it is used makes its layer wait. Here an
iteration gathers the next layer's weights while it computes this one's, so that the compiler may do
both at once; two layers' weights are there at any time, whatever the depth. Differentiating such
a loop would keep every layer's gathered weights for the backward pass: it has a rule of its own
that keeps the other residuals and gathers weights again, in reverse order (ZeRO stage 3,
Rajbhandari et al. 2020, section 7.3; prefetched as in FSDP, Zhao et al. 2023, section 3.3.2).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

Step = Callable[[Any, Any, jax.Array], tuple[Any, Any]]


def scan_with_prefetch(
  step: Step, gather: Callable[[Any], Any], state: Any, stored: Any, unroll: bool = False
) -> tuple[Any, Any]:
  """Returns what `lax.scan` does of `step(state, gather(stored[i]), i)`, and has its gradient.

  Args:
    step: From a state, a layer's weights and its number to a state and outputs.
    gather: Makes a layer's weights of its stored leaves; linear.
    state: Arrays that have a gradient.
    stored: Leaves of all layers, stacked.
    unroll: Whether layers follow each other without a loop.
  """
  loop = _PrefetchScan(step, gather, jax.tree.leaves(stored)[0].shape[0], unroll)

  @jax.custom_vjp
  def run(state: Any, stored: Any) -> tuple[Any, Any]:
    return loop.forward(state, stored)

  run.defvjp(loop.forward_and_save, loop.backward)
  return run(state, stored)


class _PrefetchScan:
  """The passes of a loop; what tracing one of them finds out the next one uses."""

  def __init__(self, step: Step, gather: Callable[[Any], Any], num: int, unroll: bool):
    self._step, self._gather = step, gather
    self._num, self._unroll = num, unroll
    self._back: Any = None  # the tree of a layer's residuals
    self._given: list[int | None] = []  # for each of them, which weight it is

  def forward(self, state: Any, stored: Any) -> tuple[Any, Any]:
    """Returns the last state and all outputs."""
    state, outputs = self._run(self._step, state, stored)
    return state, outputs

  def forward_and_save(self, state: Any, stored: Any) -> tuple[tuple[Any, Any], Any]:
    """Returns the same, and what the backward pass needs: residuals and stored leaves."""
    state, (outputs, kept) = self._run(self._layer_and_save, state, stored)
    return (state, outputs), (stored, kept)

  def backward(self, kept: Any, cotangents: Any) -> tuple[Any, Any]:
    """Returns the gradients of the first state and of stored leaves."""
    stored, residuals = kept
    d_state, d_outputs = cotangents
    # Not before there is something to do with it, nor as the same value as in the forward pass.
    stored, d_state = jax.lax.optimization_barrier((stored, d_state))
    d_stored = jax.tree.map(jnp.zeros_like, stored)

    def layer(d_state: Any, ready: Any, d_stored: Any, number: Any) -> tuple[Any, Any]:
      d_output = jax.tree.map(lambda leaf: _at(leaf, number), _floats(d_outputs))
      back = self._whole(jax.tree.map(lambda leaf: _at(leaf, number), residuals), ready)
      d_state, d_ready = back((d_state, d_output))
      return d_state, _put(d_stored, self._scatter(d_ready, stored), number)

    def body(carry: Any, number: Any) -> tuple[Any, None]:
      d_state, ready, d_stored = carry
      before = self._gather(_take(stored, number - 1))
      d_state, d_stored = layer(d_state, ready, d_stored, number)
      return (d_state, before, d_stored), None

    carry = d_state, self._gather(_take(stored, self._num - 1)), d_stored
    numbers = jnp.arange(1, self._num)
    carry, _ = jax.lax.scan(body, carry, numbers, reverse=True, unroll=self._unroll)
    d_state, ready, d_stored = carry
    return layer(d_state, ready, d_stored, 0)

  def _run(self, layer: Step, state: Any, stored: Any) -> tuple[Any, Any]:
    first = self._gather(_take(stored, 0))
    shapes = jax.eval_shape(layer, state, first, jnp.int32(0))[1]
    outputs = jax.tree.map(lambda one: jnp.zeros((self._num, *one.shape), one.dtype), shapes)

    def body(carry: Any, number: jax.Array) -> tuple[Any, None]:
      state, ready, outputs = carry
      after = self._gather(_take(stored, number + 1))
      state, output = layer(state, ready, number)
      return (state, after, _put(outputs, output, number)), None

    last = self._num - 1
    carry, _ = jax.lax.scan(body, (state, first, outputs), jnp.arange(last), unroll=self._unroll)
    state, ready, outputs = carry
    # No constant, or the layer's residuals might hold it where those of other layers have theirs.
    number = jax.lax.optimization_barrier(jnp.int32(last))
    state, output = layer(state, ready, number)
    return state, _put(outputs, output, last)

  def _layer_and_save(self, state: Any, ready: Any, number: jax.Array) -> tuple[Any, Any]:
    """Returns a layer's state, its outputs, and the residuals that are no weights."""

    def floats(state: Any, ready: Any) -> tuple[Any, Any]:
      state, output = self._step(state, ready, number)
      return (state, _floats(output)), output

    (state, _), back, output = jax.vjp(floats, state, ready, has_aux=True)
    leaves, self._back = jax.tree.flatten(back)
    weights = [id(leaf) for leaf in jax.tree.leaves(ready)]
    self._given = [weights.index(id(leaf)) if id(leaf) in weights else None for leaf in leaves]
    kept = [leaf for leaf, given in zip(leaves, self._given, strict=True) if given is None]
    return state, (output, kept)

  def _whole(self, kept: list[jax.Array], ready: Any) -> Any:
    """Returns a layer's backward function, of what was kept of it and its weights."""
    rest, weights = iter(kept), jax.tree.leaves(ready)
    leaves = [next(rest) if given is None else weights[given] for given in self._given]
    return jax.tree.unflatten(self._back, leaves)

  def _scatter(self, d_ready: Any, stored: Any) -> Any:
    """Returns the gradient of a layer's stored leaves: the transpose of their gather."""
    return jax.linear_transpose(self._gather, _take(stored, 0))(d_ready)[0]


def _at(leaf: jax.Array, number: Any) -> jax.Array:
  return jax.lax.dynamic_index_in_dim(leaf, number, keepdims=False)


def _take(stored: Any, number: Any) -> Any:
  """Returns the leaves of one layer."""
  return jax.tree.map(lambda leaf: _at(leaf, number), stored)


def _put(stacked: Any, leaves: Any, number: Any) -> Any:
  """Returns the stacked leaves with those of one layer."""
  return jax.tree.map(
    lambda all_of, leaf: jax.lax.dynamic_update_index_in_dim(all_of, leaf, number, 0),
    stacked, leaves,
  )  # fmt: skip


def _floats(tree: Any) -> list[Any]:
  """Returns the leaves that have a gradient."""
  return [leaf for leaf in jax.tree.leaves(tree) if jnp.issubdtype(leaf.dtype, jnp.inexact)]
