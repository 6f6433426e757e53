"""Replicated activations: which ones several devices hold alike, from the traced program.

Every value of the program varies along some axes of the mesh and is the same along the others. A
sum or a gather over an axis makes its result the same along it; a scatter, an exchange or the
device's place on the axis makes it differ; everything else varies as what it is made of.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from jax.extend.core import ClosedJaxpr, Jaxpr, Literal

from jaxmoe.parallel.called_programs import called_jaxpr, split_scan
from jaxmoe.parallel.primitive_rules import IN_MEMORY

Axes = frozenset[str]
GIB = 2**30

_REPLICATING = ("all_gather", "pmax", "pmin", "psum")
_VARYING = ("all_to_all", "axis_index", "ragged_all_to_all", "reduce_scatter")


@dataclasses.dataclass(frozen=True)
class Replicated:
  """An activation that devices hold alike.

  Attributes:
    axes: The axes along which it is the same, in the order of the mesh.
    shape: On one device.
    dtype: Its name.
    bytes: Of one copy.
    scope: The named scopes it is made or used in, such as `moe/experts`.
  """

  axes: tuple[str, ...]
  shape: tuple[int, ...]
  dtype: str
  bytes: int
  scope: str

  @classmethod
  def of(cls, axes: tuple[str, ...], shape: Sequence[int], dtype: Any, eqn: Any) -> Replicated:
    """Returns the record of an operand or a result of an equation of a jaxpr."""
    size, scope = math.prod(shape) * dtype.itemsize, str(eqn.source_info.name_stack)
    return cls(axes, tuple(shape), str(dtype), size, scope)

  def too_large(self, devices: int, limit_gib: float) -> str:
    """Returns what is said of so many devices, where copies may have at most so many GiB."""
    return (
      f"each of {devices} devices would hold the same activation, {self}: "
      f"{self.bytes / GIB:.3g} GiB of max_replicated_gib={limit_gib:g}"
    )

  def __str__(self) -> str:
    """Returns `(8, 128, 64) bfloat16 in moe/experts, alike over tensor`."""
    shape = ", ".join(map(str, self.shape))
    where = f" in {self.scope}" if self.scope else ""
    return f"({shape}) {self.dtype}{where}, alike over {' and '.join(self.axes)}"


@dataclasses.dataclass(frozen=True)
class Varying:
  """What is known of a value: the axes along which it varies, and whether the batch is in it."""

  varies: Axes = frozenset()
  of_batch: bool = False


def find_replicated(
  program: ClosedJaxpr, given: Sequence[Varying], degrees: Mapping[str, int]
) -> tuple[Replicated, ...]:
  """Returns the activations that are the same along an axis, the largest first.

  Args:
    program: What one device does, traced with the mesh axes bound.
    given: Of each of its arguments.
    degrees: Of the mesh axes; those of one device do not count.
  """
  found = _ReplicationFinder([axis for axis, degree in degrees.items() if degree > 1])
  found.walk(program.jaxpr, list(given))
  return tuple(sorted(found.copies, key=lambda one: (-one.bytes, one.scope, one.axes)))


class _ReplicationFinder:
  """The walk over a program, and what it has found."""

  def __init__(self, axes: Sequence[str]):
    self._axes = axes
    self.copies: dict[Replicated, None] = {}

  def walk(self, jaxpr: Jaxpr, given: list[Varying]) -> list[Varying]:
    """Returns what a jaxpr makes of these, and writes down what is alike on the way."""
    env: dict[Any, Varying] = dict(zip(jaxpr.invars, given, strict=True))

    def read(atom: Any) -> Varying:
      return Varying() if isinstance(atom, Literal) else env.get(atom, Varying())

    for eqn in jaxpr.eqns:
      of = [read(atom) for atom in eqn.invars]
      made = self._apply(eqn, of)
      env.update(zip(eqn.outvars, made, strict=True))
      if eqn.primitive.name in IN_MEMORY:
        self._note(eqn, zip((*eqn.invars, *eqn.outvars), (*of, *made)))
    return [read(atom) for atom in jaxpr.outvars]

  def _apply(self, eqn: Any, given: list[Varying]) -> list[Varying]:
    name, made = eqn.primitive.name, _join(given)
    if name in _REPLICATING:
      made = dataclasses.replace(made, varies=made.varies - _axes_of(eqn))
    elif name in _VARYING:
      made = dataclasses.replace(made, varies=made.varies | _axes_of(eqn))
    elif name == "scan":
      return self._scan(eqn, given)
    elif name == "while":
      return self._while(eqn, given)
    elif name == "cond":
      branches = [self.walk(branch.jaxpr, given[1:]) for branch in eqn.params["branches"]]
      return [_join([given[0], *results]) for results in zip(*branches)]
    elif (body := called_jaxpr(eqn)) is not None:
      return self.walk(body, given)
    return [made] * len(eqn.outvars)

  def _scan(self, eqn: Any, given: list[Varying]) -> list[Varying]:
    consts, carry, rows = split_scan(eqn, given)
    body = eqn.params["jaxpr"].jaxpr
    carry = _fixed_point(
      lambda of: _ReplicationFinder(self._axes).walk(body, [*consts, *of, *rows]), carry
    )
    return self.walk(body, [*consts, *carry, *rows])

  def _while(self, eqn: Any, given: list[Varying]) -> list[Varying]:
    of_cond, of_body = eqn.params["cond_nconsts"], eqn.params["body_nconsts"]
    asked, consts = given[:of_cond], given[of_cond : of_cond + of_body]
    cond, body = eqn.params["cond_jaxpr"].jaxpr, eqn.params["body_jaxpr"].jaxpr

    def once(carry: list[Varying], copies: _ReplicationFinder) -> list[Varying]:
      goes_on = copies.walk(cond, [*asked, *carry])
      return [_join([*goes_on, made]) for made in copies.walk(body, [*consts, *carry])]

    carry = _fixed_point(
      lambda of: once(of, _ReplicationFinder(self._axes)), given[of_cond + of_body :]
    )
    return once(carry, self)

  def _note(self, eqn: Any, values: Iterable[tuple[Any, Varying]]) -> None:
    for atom, of in values:
      same = tuple(axis for axis in self._axes if axis not in of.varies)
      if of.of_batch and same:
        self.copies[Replicated.of(same, atom.aval.shape, atom.aval.dtype, eqn)] = None


def _fixed_point(step: Any, carry: list[Varying]) -> list[Varying]:
  """Returns what is carried by a loop, once another round adds nothing to it."""
  while True:
    after = [_join(pair) for pair in zip(carry, step(carry))]
    if after == carry:
      return carry
    carry = after


def _join(given: Iterable[Varying]) -> Varying:
  """Returns what is known of a value made of these."""
  given = list(given)
  varies = frozenset[str]().union(*(one.varies for one in given))
  return Varying(varies, any(one.of_batch for one in given))


def _axes_of(eqn: Any) -> Axes:
  """Returns the mesh axes of a collective."""
  named = eqn.params.get("axes", eqn.params.get("axis_name", ()))
  return frozenset([named] if isinstance(named, str) else named)
