"""The recipe of an optimizer and the one optax transform a training step applies.

clip by global norm -> direction of the optimizer -> weight decay by name -> learning rate. Decay
stands outside the direction and is multiplied by the learning rate, for every optimizer alike.
Everything runs in float32, whatever dtype the parameters have (`optim/masters.py`).
"""

from __future__ import annotations

import dataclasses
from fnmatch import fnmatchcase
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax

from jaxmoe.core.config_io import added, choice
from jaxmoe.core.errors import InputError
from jaxmoe.core.layout import Dims
from jaxmoe.core.renamed import renamed
from jaxmoe.ops.guard import guarded
from jaxmoe.optim.fairness import OnlineFairness
from jaxmoe.optim.matrices import map_dims
from jaxmoe.optim.optimizers import OPTIMIZERS, AdamW, Optimizer
from jaxmoe.optim.schedules import SCHEDULES, Cosine, Schedule


@dataclasses.dataclass(frozen=True)
class Optim:
  """Optimizer, schedule, peak learning rate, clipping, and the names that do not decay.

  `no_decay` are glob patterns over canonical names, in which `*` also crosses `/`. By default
  what is no map does not decay: scales, biases, the logarithm of a cosine gate's temperature and
  the vectors that constant experts give; nor do embeddings: a row gets no gradient while its token
  is absent, so decay shrinks the rare rows, and a norm behind them then blows up their gradient
  (arXiv:2501.00656). An untied head decays; a tied one is the embedding.

  `frozen` are such patterns of what does not move at all, see `optim/freeze.py`.

  `fairness` pulls routers that are trees towards treating the domains of the data alike. It is
  added to the gradient before clipping.

  `master_dtype` is that of what trains, whatever dtype a file has. In bfloat16, which takes half
  the memory, updates are added with stochastic rounding (`optim/rounding.py`).
  """

  optimizer: Optimizer = choice(OPTIMIZERS, AdamW())
  schedule: Schedule = choice(SCHEDULES, Cosine())
  learning_rate: float = 1e-3
  clip_norm: float | None = 1.0
  no_decay: tuple[str, ...] = added(
    ("*scale", "*bias", "embed/*", "*gate/sharpness", "*/local/value"),
    before=("*scale", "*bias", "embed/*"),
  )
  frozen: tuple[str, ...] = ()
  fairness: OnlineFairness = renamed("parity", OnlineFairness())
  master_dtype: Literal["float32", "bfloat16"] = added("float32", before="float32")

  def __post_init__(self) -> None:
    if not self.learning_rate > 0:
      raise InputError(
        f"nothing would be learned: learning_rate={self.learning_rate}; set it above 0"
      )
    if self.clip_norm is not None and not self.clip_norm > 0:
      raise InputError(
        f"every gradient would be clipped to nothing: clip_norm={self.clip_norm}; "
        "set it above 0, or to none for no clipping"
      )


def make_schedule(optim: Optim, num_steps: int) -> optax.Schedule:
  """Returns the learning rate of update `step`, counted from 0, for the transform and metrics.

  Raises:
    InputError: warm-up and decay do not fit into `num_steps`.
  """
  return optim.schedule.schedule(optim.learning_rate, num_steps)


def make_optimizer(
  optim: Optim, num_steps: int, names: Any, dims: Any
) -> optax.GradientTransformationExtraArgs:
  """Returns the transform of `optim` over a run of `num_steps` updates.

  All of it but clipping looks at one leaf at a time. Its `update` takes `norm`, the global norm to
  clip by: with the whole gradient's, a transform over some of the leaves does to them what the one
  over all of them does. It takes `ok`: where that is False, the state stays as it was.

  Args:
    optim: The recipe.
    num_steps: Length of the run, which the schedule needs.
    names: A tree like the parameters of canonical names; a leaf stacked over layers has the name
      in its first layer.
    dims: A tree like the parameters of tuples of logical dims; a stacked leaf has `layer` first.

  Raises:
    InputError: the schedule does not fit, or the optimizer cannot treat a parameter.
  """
  decay = optim.optimizer.weight_decay
  clip = optax.identity() if optim.clip_norm is None else clip_by_norm(optim.clip_norm)
  return _in_float32(
    optax.chain(
      clip,
      optim.optimizer.direction(names, dims),
      optax.add_decayed_weights(decay, decay_mask(names, optim.no_decay)),
      guarded(optax.scale_by_learning_rate(make_schedule(optim, num_steps))),
    ),
    dims,
  )


def clip_by_norm(limit: float) -> optax.GradientTransformationExtraArgs:
  """Returns the clip by global norm: that of the updates or, where they are a part, `norm`."""
  alone = optax.clip_by_global_norm(limit)

  def update(
    updates: Any, state: optax.OptState, params: Any = None, *,
    norm: jax.Array | None = None, **_: Any,
  ) -> tuple[Any, Any]:  # fmt: skip
    if norm is None:
      return alone.update(updates, state, params)
    within = norm < limit

    def clipped(leaf: jax.Array) -> jax.Array:
      return jax.lax.select(within, leaf, (leaf / norm.astype(leaf.dtype)) * limit)

    return jax.tree.map(clipped, updates), state

  return optax.GradientTransformationExtraArgs(alone.init, update)


def decay_mask(names: Any, no_decay: tuple[str, ...]) -> Any:
  """Returns a tree like `names`, True where no pattern of `no_decay` matches the name."""
  return jax.tree.map(
    lambda name: not any(fnmatchcase(name, pattern) for pattern in no_decay), names
  )


def _in_float32(
  inner: optax.GradientTransformation, dims: Any
) -> optax.GradientTransformationExtraArgs:
  """Returns `inner` between casts to float32, with the dims checked against the parameters."""
  inner = optax.with_extra_args_support(inner)

  def init(params: Any) -> optax.OptState:
    map_dims(_check_rank, dims, params)
    return inner.init(optax.tree.cast(params, jnp.float32))

  def update(
    updates: Any, state: optax.OptState, params: Any = None, **extra: Any
  ) -> tuple[Any, Any]:
    updates, params = optax.tree.cast((updates, params), jnp.float32)
    return inner.update(updates, state, params, **extra)

  return optax.GradientTransformationExtraArgs(init, update)


def _check_rank(dims: Dims, param: jax.Array) -> None:
  assert len(dims) == param.ndim, f"one name per dim: {dims=}, {param.shape=}"
  assert "layer" not in dims[1:], f"layer is the first dim or none: {dims=}"
