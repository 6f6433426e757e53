"""Origins of the results of a traced program: the names of arguments that each is made of.

A result of calls, loops and branches is made of what its own operands are made of, and of whatever
decides how often a loop runs or which branch is taken; two results of one loop are told apart.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from jax.extend.core import Jaxpr, Literal

from jaxmoe.parallel.called_programs import called_jaxpr, split_scan

Origins = frozenset[str]
NOTHING: Origins = frozenset()
_ONE_BY_ONE = frozenset(("optimization_barrier", "pmax", "pmin", "psum"))
"""Primitives of several operands, each of whose results is made of the operand in its place."""


def origins_of(program: Jaxpr, given: Sequence[Origins], consts: Sequence[Origins] = ()) -> Any:
  """Returns of each result the names of the arguments that it is made of.

  Args:
    program: Of any size; loops are walked until a round adds nothing.
    given: The names of each argument.
    consts: Of each constant; none has any unless they are given.
  """
  env: dict[Any, Origins] = dict(zip(program.invars, given, strict=True))
  env.update(zip(program.constvars, consts))

  def read(atom: Any) -> Origins:
    return NOTHING if isinstance(atom, Literal) else env.get(atom, NOTHING)

  for equation in program.eqns:
    made = _made(equation, [read(atom) for atom in equation.invars])
    env.update(zip(equation.outvars, made, strict=True))
  return [read(atom) for atom in program.outvars]


def _made(equation: Any, given: list[Origins]) -> list[Origins]:
  """Returns the names of each result of an equation."""
  name, results = equation.primitive.name, len(equation.outvars)
  if name in _ONE_BY_ONE and len(given) == results:
    return given
  if name == "scan":
    consts, carry, rows = split_scan(equation, given)
    body = equation.params["jaxpr"].jaxpr
    return _settled(lambda of: origins_of(body, [*consts, *of, *rows]), carry)
  if name == "while":
    return _while(equation, given)
  if name == "cond":
    found = [origins_of(branch.jaxpr, given[1:]) for branch in equation.params["branches"]]
    return [given[0].union(*of) for of in zip(*found, strict=True)]
  if (body := called_jaxpr(equation)) is not None:
    return origins_of(body, given)
  return [NOTHING.union(*given)] * results


def _while(equation: Any, given: list[Origins]) -> list[Origins]:
  of_cond, of_body = equation.params["cond_nconsts"], equation.params["body_nconsts"]
  asked, consts = given[:of_cond], given[of_cond : of_cond + of_body]
  cond, body = equation.params["cond_jaxpr"].jaxpr, equation.params["body_jaxpr"].jaxpr

  def once(carry: list[Origins]) -> list[Origins]:
    goes_on = origins_of(cond, [*asked, *carry])[0]
    return [goes_on | of for of in origins_of(body, [*consts, *carry])]

  return _settled(once, given[of_cond + of_body :])


def _settled(
  step: Callable[[list[Origins]], list[Origins]], carry: list[Origins]
) -> list[Origins]:
  """Returns the results of a loop whose body is `step`, once a round adds nothing to its carry."""
  while True:
    made = step(carry)
    after = [old | new for old, new in zip(carry, made)]
    if after == carry:
      return [*carry, *made[len(carry) :]]
    carry = after
