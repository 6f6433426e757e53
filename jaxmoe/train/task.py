"""Another task on any layout: `collate`, `loss` and `predict` are all that is written for it.

The three functions are those of Redco (Tan et al. 2023, arXiv:2310.16355); they know nothing of
devices. Where parameters lie follows from the traced loss (`parallel/automatic.py`), rows of a
batch lie over the data axes, and the compiler (GSPMD) puts in what has to be exchanged. Numbers
depend on the seed, not on the devices: every process is given all examples and makes every batch,
of which it passes its own rows on.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from jaxmoe.checkpoint import Store
from jaxmoe.checkpoint.store import read_latest
from jaxmoe.core import multihost, param_names
from jaxmoe.core.errors import InputError, NotFiniteError
from jaxmoe.core.rng import Keys, name_hash
from jaxmoe.optim import Masters, Optim, make_optimizer, state_dims
from jaxmoe.optim.freeze import freeze, frozen_masks
from jaxmoe.parallel import (
  GIB,
  AutomaticLayout,
  Parallel,
  automatic_layout,
  make_layout,
  make_mesh,
  share_of_rows,
)
from jaxmoe.train.step import ParamUpdate
from jaxmoe.train.train_state import as_stored

Batch = Mapping[str, Any]
Line = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Task:
  """What is to be learned.

  Attributes:
    collate: Makes a batch of a list of examples: NumPy arrays by name, a row for each example.
    loss: Of (parameters, batch, key): a scalar, or a scalar and a dict of metrics.
    predict: Of (parameters, batch, key): a tree of arrays with a row for each row of the batch.
  """

  collate: Callable[[list[Any]], Mapping[str, np.ndarray]]
  loss: Callable[[Any, Batch, jax.Array], Any]
  predict: Callable[[Any, Batch, jax.Array], Any]


@dataclasses.dataclass(frozen=True)
class TaskRecipe:
  """How it is learned.

  Attributes:
    optim: The optimizer.
    parallel: The degrees; experts, heads and hidden units are found in the traced loss.
    num_steps: Length of the run, which the schedule needs.
    batch_size: Rows of a batch, on all devices together.
    seed: Of the order of examples and of keys.
    save_every: After so many steps, and at the end of a `fit`, the state is saved if there is a
      store; 0 for the end alone.
  """

  optim: Optim = Optim()
  parallel: Parallel = Parallel()
  num_steps: int = 1000
  batch_size: int = 8
  seed: int = 0
  save_every: int = 0

  def __post_init__(self) -> None:
    for name in ("num_steps", "batch_size"):
      if getattr(self, name) < 1:
        raise InputError(f"{name} must be at least 1: {name}={getattr(self, name)}")
    for name in ("sequence", "partition_activations"):
      if getattr(self.parallel, name):
        raise InputError(
          f"a task's activations are laid out by the compiler: parallel.{name}=True; set False"
        )
    for axis in ("context", "pipe"):
      if (degree := getattr(self.parallel, axis)) > 1:
        raise InputError(
          f"a task's rows and layers stay whole: parallel.{axis}={degree}; set it to 1, and data, "
          "fsdp, expert or tensor above 1"
        )
    if weight := self.optim.fairness.weight:
      raise InputError(
        f"a task has no domains to treat alike: optim.fairness.weight={weight}; set it to 0"
      )


class TaskRun:
  """A task with its parameters on devices; called by all processes alike.

  Attributes:
    step: Steps made so far, those of the checkpoint it went on from included.
    params: The parameters in `optim.master_dtype`, as they lie on the devices; `loss` and `predict`
      are given them in the dtypes they came in.
    layout: Where everything lies.
    automatic: Where parameters lie over `tensor` and `expert`, and why: `automatic.table()`.
  """

  def __init__(
    self,
    task: Task,
    params: Any,
    sample: Sequence[Any],
    recipe: TaskRecipe,
    devices: Sequence[jax.Device] | None = None,
    store: Store | None = None,
  ):
    """Places the parameters, or those of the newest checkpoint.

    Args:
      task: The three functions.
      params: Any tree of arrays.
      sample: Some examples, by whose batch the loss is traced.
      recipe: The rest.
      devices: Those to use; all by default.
      store: Where the state is saved and read from.

    Raises:
      InputError: degrees, batch size and examples do not fit each other, or a pattern of
        `optim.frozen` names nothing.
    """
    self.task, self.recipe, self.step = task, recipe, 0
    self.params: Any = None
    self._moments: Any = None
    self.layout = make_layout(recipe.parallel, devices)
    self._share = share_of_rows(self.layout, recipe.batch_size)
    self._keys, self._store = Keys.from_seed(recipe.seed), store
    self._moves = ParamUpdate(masters=Masters(recipe.optim.master_dtype), layer_groups=None)
    shapes = jax.eval_shape(lambda: params)
    rows = [sample[row % len(sample)] for row in range(recipe.batch_size)] if len(sample) else []
    batch = self._collate(rows)
    self.automatic = self._placed(shapes, batch, self.layout.mesh)
    self._check_replication(shapes, batch)
    paths = param_names.unflatten(shapes, {path: path for path in param_names.flatten(shapes)})
    dims = self.automatic.dims
    self._came, shapes = shapes, jax.tree.map(self._kept, shapes)
    frozen = frozen_masks(recipe.optim.frozen, shapes, dims, layer_groups=None)
    self._transform = freeze(make_optimizer(recipe.optim, recipe.num_steps, paths, dims), frozen)
    moments = jax.eval_shape(self._transform.init, shapes)
    lies, of_moments = self.layout.shardings, state_dims(moments, shapes, dims)
    self._shardings = {
      "params": lies("params", dims, shapes), "optimizer": lies("optimizer", of_moments, moments)
    }
    self._grads = lies("grads", dims, shapes)
    self._shapes = {"params": shapes, "optimizer": moments}
    self._begin(params)
    self._jit()

  def fit(self, examples: Sequence[Any], steps: int | None = None) -> list[Line]:
    """Makes steps, to the end of the run by default; returns loss and metrics of each.

    Examples come in an order that depends on the seed, all of them before any comes again.

    Raises:
      InputError: there are no examples, or more steps than the run has.
      NotFiniteError: a loss is not finite.
    """
    last = self.recipe.num_steps if steps is None else self.step + steps
    if last > self.recipe.num_steps:
      raise InputError(
        f"a run of num_steps={self.recipe.num_steps} cannot go on to step {last}; set it higher"
      )
    lines = []
    while self.step < last:
      batch = self._put(self._draw(examples))
      self.params, self._moments, made = self._step(
        self.params, self._moments, batch, np.int32(self.step)
      )
      self.step += 1
      lines.append(jax.device_get(made))
      if not np.isfinite(lines[-1]["loss"]):
        raise NotFiniteError(
          f"the loss of step {self.step} is {lines[-1]['loss']}; lower optim.learning_rate"
        )
      if self.recipe.save_every and self.step % self.recipe.save_every == 0:
        self._save()
    self._save()
    if self._store is not None:
      self._store.wait()
    return lines

  def predictions(self, examples: Sequence[Any]) -> Any:
    """Returns what `predict` makes of examples, in their order, as NumPy arrays.

    The last batch is filled up with copies of the last example, whose outputs are dropped.

    Raises:
      InputError: there are no examples, or an output has not a row for each.
    """
    size, parts = self.recipe.batch_size, []
    for start in range(0, max(len(examples), 1), size):
      rows = [examples[at] for at in range(start, min(start + size, len(examples)))]
      filled = rows + rows[-1:] * (size - len(rows))
      batch = self._put(self._collate(filled))
      made = jax.device_get(self._predict(self.params, batch, np.int32(start // size)))
      for path, leaf in param_names.flatten(made).items():
        if np.shape(leaf)[:1] != (size,):
          raise InputError(
            f"output {path!r} of predict must have {size} rows, as the batch has: "
            f"shape={np.shape(leaf)}; return what belongs to each row"
          )
      parts.append(made)
    return jax.tree.map(lambda *leaves: np.concatenate(leaves)[: len(examples)], *parts)

  def _placed(self, shapes: Any, batch: Batch, mesh: Mesh) -> AutomaticLayout:
    """Returns where parameters would lie on a mesh."""
    loss = self.task.loss
    axes = self.recipe.parallel.expert_axes
    return automatic_layout(
      lambda p, b: loss(p, b, jax.random.key(0)), shapes, batch, mesh, axes
    )

  def _check_replication(self, shapes: Any, batch: Batch) -> None:
    """Refuses to have each tensor device hold the same large activation."""
    parallel, replicated = self.recipe.parallel, self.automatic.replicated
    limit = parallel.max_replicated_gib * GIB

    def works(tensor: int) -> bool:
      fewer = dataclasses.replace(parallel, tensor=tensor)
      mesh = make_mesh(fewer, list(self.layout.mesh.devices.flat))
      found = self._placed(shapes, batch, mesh).replicated
      return found is not None and found.bytes <= limit

    if replicated is None or replicated.bytes <= limit:
      return
    less = next((degree for degree in range(parallel.tensor - 1, 1, -1) if works(degree)), None)
    raise InputError(
      f"{replicated.too_large(parallel.tensor, parallel.max_replicated_gib)}"
      f"{self.automatic.why and ', for ' + self.automatic.why}; "
      + (f"set parallel.tensor={less}" if less else "make batches smaller")
      + ", or set parallel.max_replicated_gib higher"
    )

  def _begin(self, params: Any) -> None:
    """Sets parameters, moments and step: those of the newest checkpoint, or the first."""
    found, store = None, self._store
    if store is not None:
      shardings = param_names.flatten(self._shardings)
      like = {
        path: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=shardings[path])
        for path, leaf in param_names.flatten(self._shapes).items()
      }
      found = read_latest(
        store, lambda step: as_stored(like, store.contents(step)),
        lambda step, why: warnings.warn(why, stacklevel=2),
      )  # fmt: skip
    if found is None:
      # Copies: what a step is given it may overwrite.
      copies = jax.tree.map(lambda x, kept: np.array(x, kept.dtype), params, self._shapes["params"])
      self.params = multihost.put_on_mesh(copies, self._shardings["params"])
      init = jax.jit(self._transform.init, out_shardings=self._shardings["optimizer"])
      self._moments = init(self.params)
      return
    self.step, arrays, record = found
    if record["recipe"] != self._identity:
      raise InputError(
        f"the checkpoint in {self._store} was made with {record['recipe']}, not "
        f"{self._identity}; use another store, or the same recipe"
      )
    state = jax.tree.map(
      lambda x, kept: x.astype(kept.dtype),
      param_names.unflatten(self._shapes, arrays),
      self._shapes,
    )
    self.params, self._moments = state["params"], state["optimizer"]

  def _jit(self) -> None:
    """Makes the two programs; they are compiled at their first call."""
    whole, of_loss = self.layout.replicated, self.task.loss

    def loss(params: Any, batch: Batch, key: jax.Array) -> tuple[jax.Array, Line]:
      made = of_loss(self._as_came(params), batch, key)
      value, metrics = made if isinstance(made, tuple) else (made, {})
      return value, {**metrics, "loss": value}

    def step(params: Any, moments: Any, batch: Batch, index: jax.Array) -> Any:
      key = (self._keys / "forward").at(index)("loss")
      grads, line = jax.grad(loss, has_aux=True)(params, batch, key)
      # Of what ZeRO spreads each device updates its own part.
      grads, mine = jax.lax.with_sharding_constraint((grads, params), (self._grads,) * 2)
      updates, moments = self._transform.update(grads, moments, mine)
      return self._moves.apply(mine, updates, self.recipe.seed, index), moments, line

    def predict(params: Any, batch: Batch, index: jax.Array) -> Any:
      key = (self._keys / "predict").at(index)("predict")
      return self.task.predict(self._as_came(params), batch, key)

    state = (self._shardings["params"], self._shardings["optimizer"])
    self._step = jax.jit(step, donate_argnums=(0, 1), out_shardings=(*state, whole))
    self._predict = jax.jit(predict, out_shardings=whole)

  def _kept(self, leaf: Any) -> jax.ShapeDtypeStruct:
    """Returns the shape of a parameter in the dtype that it trains in."""
    trains = jnp.issubdtype(leaf.dtype, jnp.floating)
    return jax.ShapeDtypeStruct(leaf.shape, self._moves.masters.dtype if trains else leaf.dtype)

  def _as_came(self, params: Any) -> Any:
    return jax.tree.map(lambda leaf, came: leaf.astype(came.dtype), params, self._came)

  def _draw(self, examples: Sequence[Any]) -> Mapping[str, np.ndarray]:
    """Returns the batch of the next step."""
    count, size = len(examples), self.recipe.batch_size
    if not count:
      raise InputError("there are no examples to fit; give at least one")
    at = range(self.step * size, (self.step + 1) * size)
    orders = {
      epoch: np.random.default_rng([self.recipe.seed, name_hash("order"), epoch]).permutation(count)
      for epoch in {place // count for place in at}
    }
    return self._collate([examples[int(orders[place // count][place % count])] for place in at])

  def _collate(self, rows: list[Any]) -> Mapping[str, np.ndarray]:
    if not rows:
      raise InputError("there are no examples; give at least one")
    batch = {name: np.asarray(array) for name, array in self.task.collate(rows).items()}
    for name, array in batch.items():
      if array.shape[:1] != (len(rows),):
        raise InputError(
          f"array {name!r} of a batch must have a row for each of {len(rows)} examples: "
          f"shape={array.shape}; let collate stack along dim 0"
        )
    return batch

  def _put(self, batch: Mapping[str, np.ndarray]) -> dict[str, jax.Array]:
    """Returns the rows of this process as parts of arrays on the devices of all."""
    index, count = self._share
    spec = self.layout.spec("activations", ("batch",))
    sharding = NamedSharding(self.layout.mesh, spec)
    return {
      name: jax.make_array_from_process_local_data(
        sharding, np.split(array, count)[index], array.shape
      )
      for name, array in batch.items()
    }

  @property
  def _identity(self) -> dict[str, int]:
    """What must be the same for a run to go on as it would have."""
    return {name: getattr(self.recipe, name) for name in ("seed", "batch_size", "num_steps")}

  def _save(self) -> None:
    if self._store is None or self.step in self._store.steps():
      return
    arrays = param_names.flatten({"params": self.params, "optimizer": self._moments})
    self._store.write(self.step, arrays, {"step": self.step, "recipe": self._identity})
