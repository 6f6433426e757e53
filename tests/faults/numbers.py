"""Faults in the numbers of a run, each a function of the batches handed out and of nothing else.

So a run that goes back or is started again meets the same fault, and two runs with the same fault
can be compared. A batch with a fault is marked by a position that no document has.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from jaxmoe.data.stream import BatchStream
from jaxmoe.moe.routers.router import RouterModule
from jaxmoe.train import step as train_step

MARK = 1_000_003
# Parameters, and the first index of a number that some token of any batch meets: of the
# embeddings, those of the token that ends a document.
LEAVES = {"embed": 256, "down": 0, "gate": 0}


SWAPPED = []
"""Places and what stood there, newest last."""


def swap(owner, name, make):
  """Puts `make(original)` in the place of a name that must be there."""
  original = getattr(owner, name)
  SWAPPED.append((owner, name, original))
  setattr(owner, name, make(original))


def restore():
  """Takes every fault out again; a forked run ends with its faults instead."""
  while SWAPPED:
    setattr(*SWAPPED.pop())


def on_batches(batches, change):
  """Changes the batches with these numbers, counted from 1 over all restarts."""

  def make(real):
    def changed(self):
      batch = real(self)
      if self.num_batches in batches:
        batch = {name: array.copy() for name, array in batch.items()}
        change(batch)
      return batch

    return changed

  swap(BatchStream, "__next__", make)


def set_mark(batch):
  batch["position"][0, 0] = MARK


def marked(position):
  return jnp.any(position >= MARK)


def nan_in_batch(batches, place, token):
  """A token id that is not in the vocabulary: its embedding is NaN."""

  def change(batch):
    batch["ids"].reshape(-1)[place] = token

  on_batches(batches, change)


def wrap_step(change):
  """Changes the state a step begins with when its batch is marked: `change(path, leaf)`."""

  def wrap(step):
    def faulty(state, batch):
      here = marked(batch["position"])
      batch = {**batch, "position": batch["position"] % MARK}

      def one(path, leaf):
        return jnp.where(here, change(jax.tree_util.keystr(path), leaf), leaf)

      params = jax.tree_util.tree_map_with_path(one, state.params)
      return step(dataclasses.replace(state, params=params), batch)

    return faulty

  swap(train_step, "build_train_step", lambda make: made_by(make, wrap))


def made_by(make, wrap):
  """Returns a maker of functions, each wrapped."""
  return functools.wraps(make)(lambda *args, **options: wrap(make(*args, **options)))


def nan_in_parameter(batches, leaf):
  """One number of one parameter becomes NaN in memory, and stays so."""
  on_batches(batches, set_mark)

  def change(path, x):
    if leaf not in path:
      return x
    return x.at[(LEAVES[leaf], *(0,) * (x.ndim - 1))].set(jnp.nan)

  wrap_step(change)


def huge_parameters(batches, factor):
  """All parameters grow, as after a bad update: the loss spikes until the run goes back."""
  on_batches(batches, set_mark)
  wrap_step(lambda path, x: x * factor)


def nan_in_router_score(batches):
  """The scores of one token become NaN, in every layer."""
  on_batches(batches, set_mark)

  def make(real):
    def call(self, x_TD, tokens, *others):
      routing, carry = real(self, x_TD, tokens, *others)
      poison = jnp.where(marked(tokens.position), jnp.nan, 0.0)
      scores_TE = routing.scores_TE.at[0].add(poison)
      weight_TA = routing.weight_TA.at[0].add(poison)
      return dataclasses.replace(routing, scores_TE=scores_TE, weight_TA=weight_TA), carry

    return call

  swap(RouterModule, "__call__", make)


def loss_spike(batches, factor):
  """Loss and gradient of some batches are many times what they should be."""
  on_batches(batches, set_mark)

  def wrap(gradients):
    def faulty(params, batch, keys):
      scale = jnp.where(marked(batch["position"]), factor, 1.0)
      batch = {**batch, "position": batch["position"] % MARK}
      grads, metrics, statistics = gradients(params, batch, keys)
      loss = dataclasses.replace(metrics["loss"], sum=metrics["loss"].sum * scale)
      grads = jax.tree.map(lambda leaf: leaf * scale, grads)
      return grads, {**metrics, "loss": loss}, statistics

    return faulty

  swap(train_step, "sharded_gradients", lambda make: made_by(make, wrap))


IN_BATCHES = ("nan_in_batch",)
"""Faults that are in what is handed out, and not in the program of a step."""
FAULTS = {
  "nan_in_batch": nan_in_batch,
  "nan_in_parameter": nan_in_parameter,
  "nan_in_router_score": nan_in_router_score,
  "huge_parameters": huge_parameters,
  "loss_spike": loss_spike,
}
