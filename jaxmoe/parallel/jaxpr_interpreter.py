"""An abstract interpreter of jaxprs: into calls, branches and the bodies of loops."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
from jax.extend.core import Jaxpr, Literal

from jaxmoe.parallel.called_programs import called_jaxpr, split_scan
from jaxmoe.parallel.dataflow import (
  DATA,
  LAYERS,
  Dataflow,
  Intermediate,
  Rule,
  Value,
  ValueOrigin,
  Values,
  constant,
  merge,
)
from jaxmoe.parallel.dim_factors import Dim, fresh, mark
from jaxmoe.parallel.primitive_rules import ELEMENTWISE, IN_MEMORY, PRIMITIVES, elementwise, opaque


def trace(
  loss: Callable[[Any, Any], Any], params: Any, batch: Any
) -> tuple[Dataflow, list[tuple[Dim, ...]]]:
  """Returns what `loss(params, batch)` does, and the dims of each leaf of `params`.

  Both arguments may be abstract; nothing is computed.
  """
  closed = jax.make_jaxpr(loss)(params, batch)
  leaves = [
    Value(tuple(fresh(leaf.shape)), ValueOrigin.WEIGHT, frozenset([at]))
    for at, leaf in enumerate(jax.tree.leaves(params))
  ]
  rows = [
    Value(tuple(fresh(leaf.shape, DATA)), ValueOrigin.BATCH) for leaf in jax.tree.leaves(batch)
  ]
  dataflow = Dataflow()
  interpret(dataflow, closed.jaxpr, [*leaves, *rows])
  return dataflow, [leaf.dims for leaf in leaves]


def interpret(dataflow: Dataflow, jaxpr: Jaxpr, given: Values) -> Values:
  """Returns the values a jaxpr makes of these; writes into `dataflow` what it does on the way."""
  env: dict[Any, Value] = dict(zip(jaxpr.invars, given, strict=True))
  env.update({var: _constant(var) for var in jaxpr.constvars})

  def read(atom: Any) -> Value:
    return _constant(atom) if isinstance(atom, Literal) else env[atom]

  for eqn in jaxpr.eqns:
    made = _apply(dataflow, eqn, [read(atom) for atom in eqn.invars])
    env.update(zip(eqn.outvars, made, strict=True))
  return [read(atom) for atom in jaxpr.outvars]


def _constant(atom: Any) -> Value:
  return constant(getattr(atom.aval, "shape", ()))


def _apply(dataflow: Dataflow, eqn: Any, given: Values) -> Values:
  name = eqn.primitive.name
  if name in RULES:
    made = RULES[name](dataflow, eqn, given)
    if name in IN_MEMORY and made[0].origin >= ValueOrigin.BATCH:
      dataflow.made[id(eqn)] = Intermediate(made[0].dims, eqn.outvars[0].aval.dtype, eqn)
    return made
  if name in ELEMENTWISE:
    return [elementwise(eqn, given)]
  body = called_jaxpr(eqn)
  return opaque(eqn, given) if body is None else interpret(dataflow, body, given)


def _scan(dataflow: Dataflow, eqn: Any, given: Values) -> Values:
  consts, carry, stacked = split_scan(eqn, given)
  rows = []
  for value in stacked:
    mark(value.dims[0], LAYERS)
    rows.append(dataclasses.replace(value, dims=value.dims[1:]))

  def body(carry: Values) -> Values:
    return interpret(dataflow, eqn.params["jaxpr"].jaxpr, [*consts, *carry, *rows])

  carry, made = _loop(dataflow, body, carry)
  length = fresh([eqn.params["length"]], LAYERS)[0]
  of_rows = made[len(carry) :]
  return [*carry, *(dataclasses.replace(one, dims=(length, *one.dims)) for one in of_rows)]


def _while(dataflow: Dataflow, eqn: Any, given: Values) -> Values:
  of_cond, of_body = eqn.params["cond_nconsts"], eqn.params["body_nconsts"]
  consts, carry = given[of_cond : of_cond + of_body], given[of_cond + of_body :]

  def body(carry: Values) -> Values:
    interpret(dataflow, eqn.params["cond_jaxpr"].jaxpr, [*given[:of_cond], *carry])
    return interpret(dataflow, eqn.params["body_jaxpr"].jaxpr, [*consts, *carry])

  return _loop(dataflow, body, carry)[0]


def _loop(
  dataflow: Dataflow, body: Callable[[Values], Values], carry: Values
) -> tuple[Values, Values]:
  """Walks a body until what is carried is made of the same before and after it."""
  while True:
    before = dataclasses.replace(dataflow, products=list(dataflow.products))
    made = body(carry)
    after = [merge(old, new) for old, new in zip(carry, made)]
    if after == carry:
      return carry, made
    carry, dataflow.products = after, before.products


def _cond(dataflow: Dataflow, eqn: Any, given: Values) -> Values:
  made = [interpret(dataflow, branch.jaxpr, given[1:]) for branch in eqn.params["branches"]]
  first = made[0]
  for other in made[1:]:
    first = [merge(a, b) for a, b in zip(first, other)]
  return first


RULES: dict[str, Rule] = {
  **PRIMITIVES,
  "cond": _cond,
  "scan": _scan,
  "while": _while,
}
