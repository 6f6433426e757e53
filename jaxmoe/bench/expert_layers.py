"""Benchmarks of expert layers and grouped matmuls against a dense layer, and their oracle.

Every contestant computes the same numbers from the same arrays, but for the dense ones, which set
the scale: a product, or a feed-forward layer with separate gate and up, of equal active FLOPs.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxmoe.bench.benchmark import Benchmark
from jaxmoe.core.backends import Backend, Devices, Need
from jaxmoe.core.errors import InputError
from jaxmoe.ops import expert_mlp, grouped_matmul
from jaxmoe.ops.grouped_matmul import GroupedMatmul


@dataclasses.dataclass(frozen=True)
class Shape:
  """One size of the layer; a skew of s chooses expert i with weight i^-s (0 is uniform)."""

  tokens: int = 1024
  dim: int = 512
  mlp_dim: int = 512
  num_experts: int = 8
  num_active: int = 2
  skew: float = 0.0

  def __post_init__(self) -> None:
    for name in ("tokens", "dim", "mlp_dim", "num_experts", "num_active"):
      if getattr(self, name) < 1:
        raise InputError(f"--{name}={getattr(self, name)} must be at least 1")
    if self.num_active > self.num_experts:
      raise InputError(
        f"--num_active={self.num_active} is above --num_experts={self.num_experts}: a token "
        "chooses different experts; lower it"
      )
    if not 0 <= self.skew < float("inf"):
      raise InputError(f"--skew={self.skew} must be 0 (uniform) or a positive exponent")


SHAPES = (
  Shape(mlp_dim=512, num_experts=8, num_active=2),
  Shape(mlp_dim=128, num_experts=64, num_active=8),
  Shape(mlp_dim=128, num_experts=128, num_active=8),
)


def swiglu(pre: jax.Array) -> jax.Array:
  """Returns silu(gate) * up of (..., 2, F)."""
  return jax.nn.silu(pre[..., 0, :]) * pre[..., 1, :]


def choose(shape: Shape) -> np.ndarray:
  """Returns the experts of each token (T, A), all different, by the Gumbel trick."""
  rng = np.random.default_rng(0)
  popularity_E = -shape.skew * np.log(np.arange(1, shape.num_experts + 1))
  score_TE = popularity_E + rng.gumbel(size=(shape.tokens, shape.num_experts))
  return np.argsort(-score_TE, axis=1)[:, : shape.num_active].astype(np.int32)


def matmul_benchmark(shape: Shape, dtype: str) -> Benchmark:
  """Returns the benchmark of one product: rows sorted by expert, times their experts' matrices."""
  rows = shape.tokens * shape.num_active
  sizes_E = np.bincount(choose(shape).ravel(), minlength=shape.num_experts)
  rows_RD = _normal(0, dtype, rows, shape.dim)
  weight_EDF = _normal(1, dtype, shape.num_experts, shape.dim, shape.mlp_dim)
  sizes = jnp.asarray(sizes_E, jnp.int32)
  return Benchmark(
    title=f"grouped matmul ({rows}, {shape.dim}) x ({shape.dim}, {shape.mlp_dim})",
    contestants={name: _with_sizes(f, sizes) for name, f in _matmuls(dtype).items()},
    args=(rows_RD, weight_EDF),
    oracle=_with_sizes(grouped_matmul.loop, sizes),
    dense=lambda rows_RD, weight_DF: rows_RD @ weight_DF,
    dense_args=(rows_RD, weight_EDF[0]),
  )


def _matmuls(dtype: str) -> dict[str, Backend]:
  """Returns the back ends that these devices have, without the oracle."""
  need = Need(Devices.here(), dtype)
  known = {name: each for name, each in grouped_matmul.BACKENDS.items() if name != "loop"}
  return {name: each for name, each in known.items() if each.fits(need) is None}


def layer_benchmark(shape: Shape, dtype: str) -> Benchmark:
  """Returns the benchmark of a whole SwiGLU expert layer, from chosen experts to summed outputs."""
  slot = choose(shape)
  slot_TA = jnp.asarray(slot)
  busiest = int(np.bincount(slot.ravel()).max())
  sizes = shape.num_experts, shape.dim, shape.mlp_dim
  x_TD = _normal(0, dtype, shape.tokens, shape.dim)
  gate_up_EDGF = _normal(1, dtype, sizes[0], sizes[1], 2, sizes[2])
  down_EFD = _normal(2, dtype, sizes[0], sizes[2], sizes[1])
  weight_TA = jax.nn.softmax(_normal(3, "float32", shape.tokens, shape.num_active))

  def fused(*args: jax.Array) -> jax.Array:
    return expert_mlp.fused(args[0], args[1], args[2], slot_TA, args[3], swiglu)

  contestants: dict[str, Callable[..., jax.Array]] = {"fused": fused}
  for name, matmul in _matmuls(dtype).items():
    contestants[f"sort + {name}"] = _sorted_layer(matmul, slot_TA)
  contestants["one-hot einsum"] = _onehot_layer(slot_TA, busiest)
  active = shape.num_active * shape.mlp_dim
  return Benchmark(
    title=f"expert layer, {shape.num_experts} experts top-{shape.num_active}",
    contestants=contestants,
    args=(x_TD, gate_up_EDGF, down_EFD, weight_TA),
    oracle=_slot_by_slot(slot_TA),
    dense=lambda x_TD, gate, up, down: (jax.nn.silu(x_TD @ gate) * (x_TD @ up)) @ down,
    dense_args=(
      x_TD,
      _normal(4, dtype, shape.dim, active),
      _normal(5, dtype, shape.dim, active),
      _normal(6, dtype, active, shape.dim),
    ),
  )


def _normal(seed: int, dtype: str, *shape: int) -> jax.Array:
  """Returns random numbers that keep the size of what they multiply."""
  fan_in = 1 if len(shape) < 3 and seed < 4 else shape[min(1, len(shape) - 2)]
  return (jax.random.normal(jax.random.key(seed), shape) / fan_in**0.5).astype(dtype)


def _with_sizes(matmul: GroupedMatmul, sizes_E: jax.Array) -> Callable[..., jax.Array]:
  return lambda rows_RD, weight_EDF: matmul(rows_RD, weight_EDF, sizes_E)


def _sorted_layer(matmul: GroupedMatmul, slot_TA: jax.Array) -> Callable[..., jax.Array]:
  """Returns the usual dropless layer: sort the choices by expert, two grouped matmuls, unsort."""
  num_active = slot_TA.shape[1]

  def layer(x_TD: jax.Array, gate_up: jax.Array, down: jax.Array, weight_TA: jax.Array) -> Any:
    num_experts, dim, gates, hidden = gate_up.shape
    order_R = jnp.argsort(slot_TA.reshape(-1), stable=True)
    sizes_E = jnp.bincount(slot_TA.reshape(-1), length=num_experts).astype(jnp.int32)
    pre = matmul(x_TD[order_R // num_active], gate_up.reshape(num_experts, dim, -1), sizes_E)
    out_RD = matmul(swiglu(pre.reshape(-1, gates, hidden)), down, sizes_E)
    out_TAD = out_RD[jnp.argsort(order_R)].reshape(*slot_TA.shape, dim)
    return jnp.sum(out_TAD * weight_TA[:, :, None], axis=1).astype(x_TD.dtype)

  return layer


def _onehot_layer(slot_TA: jax.Array, capacity: int) -> Callable[..., jax.Array]:
  """Returns the layer of GShard (Lepikhin et al. 2020): dispatch and combine are einsums.

  Its capacity is the load of the busiest expert, so that it drops nothing and equals the others.
  """

  def layer(x_TD: jax.Array, gate_up: jax.Array, down: jax.Array, weight_TA: jax.Array) -> Any:
    onehot_TAE = jax.nn.one_hot(slot_TA, gate_up.shape[0], dtype=jnp.int32)
    chosen_TE = jnp.sum(onehot_TAE, axis=1)
    place_TE = jnp.cumsum(chosen_TE, axis=0) - chosen_TE
    place_TE = jnp.where(chosen_TE > 0, place_TE, capacity)
    dispatch_TEC = jax.nn.one_hot(place_TE, capacity, dtype=x_TD.dtype)
    weight_TE = jnp.einsum("tae,ta->te", onehot_TAE.astype(weight_TA.dtype), weight_TA)
    combine_TEC = dispatch_TEC * weight_TE.astype(x_TD.dtype)[:, :, None]
    rows_ECD = jnp.einsum("tec,td->ecd", dispatch_TEC, x_TD)
    flat = gate_up.reshape(*gate_up.shape[:2], -1)
    pre = jnp.einsum("ecd,edf->ecf", rows_ECD, flat)
    hidden = swiglu(pre.reshape(*pre.shape[:2], *gate_up.shape[2:]))
    return jnp.einsum("tec,ecd->td", combine_TEC, jnp.einsum("ecf,efd->ecd", hidden, down))

  return layer


def _slot_by_slot(slot_TA: jax.Array) -> Callable[..., jax.Array]:
  """Returns the oracle: the reference layer of one expert at a time, to hold little at once."""

  def layer(x_TD: jax.Array, gate_up: jax.Array, down: jax.Array, weight_TA: jax.Array) -> Any:
    @jax.checkpoint
    def step(y_TD: jax.Array, expert: tuple[jax.Array, ...]) -> tuple[jax.Array, None]:
      index, up, down = expert
      one_TA = jnp.where(slot_TA == index, 0, 1)
      mine_TD = expert_mlp.reference(x_TD, up[None], down[None], one_TA, weight_TA, swiglu)
      return y_TD + mine_TD, None

    experts = jnp.arange(gate_up.shape[0]), gate_up, down
    return jax.lax.scan(step, jnp.zeros_like(x_TD), experts)[0]

  return layer
