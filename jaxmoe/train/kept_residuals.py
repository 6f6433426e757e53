"""Residuals of a function for its backward pass, apart from what can be had again for little.

`jax.vjp` gives a function and arrays that it closes over. Those of them that are made of parameters
alone, casts and gathered weights, or of what is known of a microbatch alone, masks and positions,
are made again where the gradient is. The others are kept, each once: no weight is among them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.extend.core import ClosedJaxpr, Literal, jaxpr_as_fun
from jax.interpreters.partial_eval import dce_jaxpr

from jaxmoe.parallel.origins import NOTHING, Origins, origins_of

Function = Callable[[Any, Any, Any, Any], tuple[Any, Any]]
"""From parameters, what is known, what has a gradient and what has none, to results and extras."""
_NAMES = ("parameters", "known", "handed", "given")
_AGAIN: tuple[Origins, ...] = (frozenset(("parameters",)), frozenset(("known",)))
"""A residual that is made of the one or of the other alone is made again."""


@dataclasses.dataclass(frozen=True)
class KeptResiduals:
  """The passes of a function, forward and backward, that keep residuals between them.

  Attributes:
    made: The tree of results and extras.
    back: The tree of the backward function, of residuals.
    place: Of each residual, whether it is kept or made again, and its place there.
    shapes: Of what is kept.
    first: From all arguments' leaves to those of `made`, and what is kept.
    again: From the leaves of parameters and of what is known to what is made again.
  """

  made: Any
  back: Any
  place: Sequence[tuple[bool, int]]
  shapes: Sequence[jax.ShapeDtypeStruct]
  first: Callable[..., list[Any]]
  again: Callable[..., list[Any]]

  @classmethod
  def of(cls, function: Function, *arguments: Any) -> KeptResiduals:
    """Returns the passes of a function of these arguments, which may be abstract; traced once.

    Results have gradients by parameters and by what is `handed`; extras have none. What the
    function closes over counts as known, too.
    """
    trees: dict[str, Any] = {}

    def run(parameters: Any, known: Any, handed: Any, given: Any) -> tuple[Any, list[Any]]:
      results, back, extras = jax.vjp(
        lambda parameters, handed: function(parameters, known, handed, given),
        parameters, handed, has_aux=True,
      )  # fmt: skip
      residuals, trees["back"] = jax.tree.flatten(back)
      made, trees["made"] = jax.tree.flatten((results, extras))
      return made, residuals

    program = jax.make_jaxpr(run)(*arguments)
    names = [name for name, of in zip(_NAMES, arguments, strict=True) for _ in jax.tree.leaves(of)]
    num_made = trees["made"].num_leaves
    place = _places(program, names, num_made)
    at: dict[tuple[bool, int], int] = {}
    for number, where in enumerate(place, start=num_made):
      at.setdefault(where, number)
    kept_at, again_at = ([n for (kept, _), n in at.items() if kept == one] for one in (True, False))
    again, used = _part(program, again_at)
    assert not {name for name, use in zip(names, used) if use} & {"handed", "given"}
    avals = [program.out_avals[number] for number in kept_at]
    return cls(
      made=trees["made"],
      back=trees["back"],
      place=place,
      shapes=[jax.ShapeDtypeStruct(aval.shape, aval.dtype) for aval in avals],
      first=_part(program, [*range(num_made), *kept_at])[0],
      again=again,
    )

  def forward(self, *arguments: Any) -> tuple[Any, Any, list[Any]]:
    """Returns results, extras, and what `backward` will need beside parameters and the known."""
    leaves, number = self.first(*jax.tree.leaves(arguments)), self.made.num_leaves
    results, extras = jax.tree.unflatten(self.made, leaves[:number])
    return results, extras, leaves[number:]

  def backward(self, parameters: Any, known: Any, kept: Sequence[Any], cotangents: Any) -> Any:
    """Returns the gradients by parameters and by what was handed.

    Args:
      parameters: Those of the forward pass, and so is what is known.
      known: Of it.
      kept: By it.
      cotangents: Of its results.
    """
    again = self.again(*jax.tree.leaves((parameters, known)))
    residuals = [(kept if is_kept else again)[number] for is_kept, number in self.place]
    return jax.tree.unflatten(self.back, residuals)(cotangents)


def _places(program: ClosedJaxpr, names: list[str], num_made: int) -> list[tuple[bool, int]]:
  """Returns of each residual whether it is kept, and its place among those that are, or are not.

  The residuals are the results of the program after so many others; one value has one place.
  """
  consts = [
    frozenset(("known",)) if isinstance(const, jax.core.Tracer) else NOTHING
    for const in program.consts
  ]
  given = [frozenset((name,)) for name in names]
  origins = origins_of(program.jaxpr, given, consts)[num_made:]
  numbers: dict[bool, dict[Any, int]] = {True: {}, False: {}}
  place = []
  for value, origin in zip(program.jaxpr.outvars[num_made:], origins, strict=True):
    is_kept = not any(origin <= one for one in _AGAIN)
    key = id(value) if isinstance(value, Literal) else value
    place.append((is_kept, numbers[is_kept].setdefault(key, len(numbers[is_kept]))))
  return place


def _part(program: ClosedJaxpr, wanted: list[int]) -> tuple[Callable[..., list[Any]], list[bool]]:
  """Returns the function that makes these results of a program alone, and which arguments it uses.

  It takes all arguments, or the first of them where the others are not used.
  """
  chosen = set(wanted)
  part, used = dce_jaxpr(program.jaxpr, [at in chosen for at in range(len(program.out_avals))])
  run = jaxpr_as_fun(ClosedJaxpr(part, program.consts))
  return lambda *leaves: run(*(leaf for leaf, use in zip(leaves, used) if use)), used
