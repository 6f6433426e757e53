"""A Pallas kernel for TPUs, as all of ours are called, on a chip or by an interpreter anywhere.

The interpreter of plain JAX (True) takes blocks of any size, compiles like any program and is what
quick tests use; that of Mosaic (`pltpu.InterpretParams`) has memories, cores and races.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

Interpret = pltpu.InterpretParams | bool


def call(
  kernel: Callable[..., None],
  grid: tuple[int, ...],
  scalars: Sequence[jax.Array],
  inputs: Sequence[tuple[jax.Array, pl.BlockSpec]],
  outputs: Sequence[tuple[jax.ShapeDtypeStruct, pl.BlockSpec]],
  scratch: Sequence[tuple[int, ...]],
  interpret: Interpret = False,
  memory: int | None = None,
) -> Any:
  """Returns what a kernel makes, step by step along the last dim of the grid.

  Args:
    kernel: Takes refs: scalars, inputs, outputs, scratch.
    grid: Steps; all dims but the last are of blocks that do not know each other.
    scalars: What index maps read.
    inputs: Arrays and their blocks.
    outputs: Shapes and their blocks.
    scratch: Shapes of float32 memory that lasts from step to step.
    interpret: Whether an interpreter runs it, or which.
    memory: Bytes of a core's memory that it may take; None for what it may take unasked.
  """
  spec = pltpu.PrefetchScalarGridSpec(
    num_scalar_prefetch=len(scalars),
    grid=grid,
    in_specs=[block for _, block in inputs],
    out_specs=[block for _, block in outputs],
    scratch_shapes=[pltpu.VMEM(shape, jnp.float32) for shape in scratch],
  )
  order: list[Any] = ["parallel"] * (len(grid) - 1) + ["arbitrary"]
  run = pl.pallas_call(
    kernel,
    grid_spec=spec,
    out_shape=[shape for shape, _ in outputs],
    compiler_params=pltpu.CompilerParams(dimension_semantics=order, vmem_limit_bytes=memory),
    interpret=interpret,
  )
  return run(*scalars, *(array for array, _ in inputs))


def dot(spec: str, one: jax.Array, other: jax.Array) -> jax.Array:
  """Returns the product of two matrices over the letter they share, summed in float32.

  The matrix unit rounds float32 to bfloat16 unless it is told not to.
  """
  left, right = spec.split(",")
  (over,) = set(left) & set(right)
  dims = ((left.index(over),), (right.index(over),)), ((), ())
  exact = jax.lax.Precision.HIGHEST if one.dtype == jnp.float32 else None
  return jax.lax.dot_general(one, other, dims, exact, jnp.float32)
