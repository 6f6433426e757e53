"""Rules by JAX primitive: the dims of its results from those of its operands.

What is in neither table makes new dims, and marks those it was given, so that nothing is concluded
from them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from jaxmoe.parallel.dataflow import (
  CUT,
  INDEXED,
  OPAQUE,
  RANKED,
  REDUCED,
  Dataflow,
  Product,
  Rule,
  Value,
  ValueOrigin,
  Values,
  combine,
  multiply,
)
from jaxmoe.parallel.dim_factors import Dim, fresh, mark, regroup, unify


def elementwise(eqn: Any, given: Values) -> Value:
  """Unites each dim with that of the other operands; one of size 1, or a scalar, has none."""
  shape = _shapes(eqn)[0]
  dims: list[Dim] = [()] * len(shape)
  for value in given:
    for at, dim in enumerate(value.dims):
      if dim and dims[at]:
        unify(dims[at], dim)
      dims[at] = dims[at] or dim
  return combine(given, dims)


def opaque(eqn: Any, given: Values) -> Values:
  """Concludes nothing; what is made of no operands or constants alone may be anything."""
  made = combine(given, ())
  marks = () if made.origin == ValueOrigin.CONSTANT else (OPAQUE,)
  for value in given:
    for dim in value.dims:
      mark(dim, *marks)
  origin = ValueOrigin.DERIVED if made.origin == ValueOrigin.WEIGHT else made.origin
  return [Value(tuple(fresh(shape, *marks)), origin) for shape in _shapes(eqn)]


def _shapes(eqn: Any) -> list[tuple[int, ...]]:
  return [getattr(var.aval, "shape", ()) for var in eqn.outvars]


def _reshape(dataflow: Dataflow, eqn: Any, given: Values) -> Values:
  if eqn.params.get("dimensions") is not None:
    return opaque(eqn, given)
  return [combine(given, regroup(given[0].dims, _shapes(eqn)[0]))]


def _squeeze(dataflow: Dataflow, eqn: Any, given: Values) -> Values:
  gone = eqn.params["dimensions"]
  kept = [dim for at, dim in enumerate(given[0].dims) if at not in gone]
  return [combine(given, kept)]


def _transpose(dataflow: Dataflow, eqn: Any, given: Values) -> Values:
  return [combine(given, [given[0].dims[at] for at in eqn.params["permutation"]])]


def _broadcast(dataflow: Dataflow, eqn: Any, given: Values) -> Values:
  dims = fresh(_shapes(eqn)[0])
  for dim, at in zip(given[0].dims, eqn.params["broadcast_dimensions"]):
    dims[at] = dim or dims[at]
  return [combine(given, dims)]


def _reduce(*marks: str) -> Rule:
  def rule(dataflow: Dataflow, eqn: Any, given: Values) -> Values:
    axes = eqn.params["axes"]
    for value in given:
      for at in axes:
        if at < len(value.dims):
          mark(value.dims[at], *marks)
    kept = [dim for at, dim in enumerate(given[0].dims) if at not in axes]
    return [combine(given, kept) for _ in eqn.outvars]

  return rule


def _along(parameter: str, *marks: str) -> Rule:
  """Returns the rule of what keeps a shape and looks along one dim, such as a cumulative sum."""

  def rule(dataflow: Dataflow, eqn: Any, given: Values) -> Values:
    kept = elementwise(eqn, given)
    mark(kept.dims[eqn.params[parameter]], *marks)
    return [kept for _ in eqn.outvars]

  return rule


def _top_k(dataflow: Dataflow, eqn: Any, given: Values) -> Values:
  axis = eqn.params.get("axis", -1) % len(given[0].dims)
  mark(given[0].dims[axis], RANKED, REDUCED)
  dims = list(given[0].dims)
  dims[axis] = fresh([_shapes(eqn)[0][axis]])[0]
  return [combine(given, dims) for _ in eqn.outvars]


def _window(dataflow: Dataflow, eqn: Any, given: Values) -> Values:
  """A part of an array, or an array that parts were added to: dims that kept their size."""
  old, made = eqn.invars[0].aval.shape, []
  for shape in _shapes(eqn):
    dims = list(fresh(shape, CUT))
    for at, dim in enumerate(given[0].dims):
      if old[at] == shape[at]:
        dims[at] = dim
      else:
        mark(dim, CUT)
    made.append(combine(given, dims))
  return made


def _concatenate(dataflow: Dataflow, eqn: Any, given: Values) -> Values:
  joined = eqn.params["dimension"]
  if len(given) == 1:
    return given
  dims = list(fresh(_shapes(eqn)[0], CUT))
  for at in range(len(dims)):
    if at == joined:
      for value in given:
        mark(value.dims[at], CUT)
    else:
      for value in given[1:]:
        unify(given[0].dims[at], value.dims[at])
      dims[at] = given[0].dims[at]
  return [combine(given, dims)]


def _update_slice(dataflow: Dataflow, eqn: Any, given: Values) -> Values:
  old, new = (eqn.invars[at].aval.shape for at in (0, 1))
  for at, (dim, other) in enumerate(zip(given[0].dims, given[1].dims)):
    if old[at] == new[at]:
      unify(dim, other)
    else:
      mark(dim + other, CUT)
  return [combine(given, given[0].dims)]


def _dot(dataflow: Dataflow, eqn: Any, given: Values) -> Values:
  return [multiply(dataflow, given, eqn.params["dimension_numbers"])]


def _ragged_dot(dataflow: Dataflow, eqn: Any, given: Values) -> Values:
  numbers = eqn.params["ragged_dot_dimension_numbers"]
  groups = tuple(given[1].dims[at] for at in numbers.rhs_group_dimensions)
  if not groups:
    return opaque(eqn, given)
  return [multiply(dataflow, given[:2], numbers.dot_dimension_numbers, groups)]


def _gather(dataflow: Dataflow, eqn: Any, given: Values) -> Values:
  numbers, sizes = eqn.params["dimension_numbers"], eqn.params["slice_sizes"]
  operand, indices = given
  shape = eqn.invars[0].aval.shape
  dropped = (*numbers.collapsed_slice_dims, *numbers.operand_batching_dims)
  for at, other in zip(numbers.operand_batching_dims, numbers.start_indices_batching_dims):
    unify(operand.dims[at], indices.dims[other])
  window = [at for at in range(len(shape)) if at not in dropped]
  dims = fresh(_shapes(eqn)[0], CUT)
  for at, out in zip(window, numbers.offset_dims):
    if sizes[at] == shape[at]:
      dims[out] = operand.dims[at]
    else:
      mark(operand.dims[at], CUT)
  rest = [out for out in range(len(dims)) if out not in numbers.offset_dims]
  for out, dim in zip(rest, indices.dims):
    dims[out] = dim
  return [_looked_up(dataflow, numbers.collapsed_slice_dims, given, dims)]


def _looked_up(dataflow: Dataflow, along: Sequence[int], given: Values, dims: list[Dim]) -> Value:
  """Returns what was looked up, and writes down from which parameters it was."""
  operand, indices = given
  found = tuple(operand.dims[at] for at in along)
  kept = tuple(dim for at, dim in enumerate(operand.dims) if at not in along)
  weight = operand.origin == ValueOrigin.WEIGHT
  lookup = weight and indices.origin == ValueOrigin.BATCH
  for dim in found:
    mark(dim, INDEXED, *([CUT] if weight and not lookup else []))
  if lookup:
    dataflow.products.append(Product(operand.leaves, found, kept, lookup=True))
  elif weight and sum(map(bool, kept)) > 1:
    dataflow.picked.extend(found)
    return Value(tuple(dims), ValueOrigin.WEIGHT, operand.leaves)
  return combine(given, dims)


def _scatter(dataflow: Dataflow, eqn: Any, given: Values) -> Values:
  numbers = eqn.params["dimension_numbers"]
  operand, indices, updates = given
  old, new = eqn.invars[0].aval.shape, eqn.invars[2].aval.shape
  dropped = (*numbers.inserted_window_dims, *numbers.operand_batching_dims)
  for at, other in zip(numbers.operand_batching_dims, numbers.scatter_indices_batching_dims):
    unify(operand.dims[at], indices.dims[other])
  window = [at for at in range(len(old)) if at not in dropped]
  for at, of in zip(window, numbers.update_window_dims):
    if old[at] == new[of]:
      unify(operand.dims[at], updates.dims[of])
    else:
      mark(operand.dims[at] + updates.dims[of], CUT)
  rest = [of for of in range(len(new)) if of not in numbers.update_window_dims]
  for of, dim in zip(rest, indices.dims):
    if updates.dims[of] and dim:
      unify(updates.dims[of], dim)
  for at in numbers.scatter_dims_to_operand_dims:
    mark(operand.dims[at], INDEXED)
  return [combine(given, operand.dims)]


ELEMENTWISE = frozenset((
  "abs", "acos", "add", "add_any", "and", "asin", "atan", "atan2", "cbrt", "ceil", "clamp",
  "convert_element_type", "copy", "copy_p", "cos", "cosh", "custom_lin", "digamma", "div", "eq",
  "erf", "erf_inv", "erfc", "exp", "exp2", "expm1", "floor", "ge", "gt", "integer_pow",
  "is_finite", "le", "lgamma", "log", "log1p", "logistic", "lt", "max", "min", "mul", "name",
  "ne", "neg", "nextafter", "not", "or", "pow", "pvary", "real", "reduce_precision", "rem",
  "round", "rsqrt", "select_n", "sharding_constraint", "shift_left", "shift_right_arithmetic",
  "shift_right_logical", "sign", "sin", "sinh", "sqrt", "square", "stop_gradient", "sub", "tan",
  "tanh", "xor",
))  # fmt: skip

IN_MEMORY = frozenset((
  "all_gather", "all_to_all", "conv_general_dilated", "dot_general", "gather", "pallas_call",
  "pmax", "pmin", "psum", "ragged_all_to_all", "ragged_dot", "ragged_dot_general",
  "reduce_scatter", "scatter", "scatter-add", "sort",
))  # fmt: skip
"""Those whose operands and results are arrays in memory; others may be fused with them."""

PRIMITIVES: dict[str, Rule] = {
  "argmax": _reduce(RANKED, REDUCED),
  "argmin": _reduce(RANKED, REDUCED),
  "broadcast_in_dim": _broadcast,
  "concatenate": _concatenate,
  "cumlogsumexp": _along("axis", REDUCED, CUT),
  "cummax": _along("axis", REDUCED, CUT),
  "cummin": _along("axis", REDUCED, CUT),
  "cumprod": _along("axis", REDUCED, CUT),
  "cumsum": _along("axis", REDUCED, CUT),
  "dot_general": _dot,
  "dynamic_slice": _window,
  "dynamic_update_slice": _update_slice,
  "gather": _gather,
  "optimization_barrier": lambda dataflow, eqn, given: given,
  "pad": _window,
  "ragged_dot_general": _ragged_dot,
  "reduce_and": _reduce(REDUCED),
  "reduce_max": _reduce(RANKED, REDUCED),
  "reduce_min": _reduce(RANKED, REDUCED),
  "reduce_or": _reduce(REDUCED),
  "reduce_prod": _reduce(REDUCED),
  "reduce_sum": _reduce(REDUCED),
  "reshape": _reshape,
  "scatter": _scatter,
  "scatter-add": _scatter,
  "scatter_add": _scatter,
  "scatter_mul": _scatter,
  "slice": _window,
  "sort": _along("dimension", RANKED, REDUCED),
  "split": _window,
  "squeeze": _squeeze,
  "top_k": _top_k,
  "transpose": _transpose,
}
