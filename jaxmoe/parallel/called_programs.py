"""Programs inside equations of traced programs (jaxprs): what a call calls, what a scan takes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from jax.extend.core import ClosedJaxpr, Jaxpr


def called_jaxpr(eqn: Any) -> Jaxpr | None:
  """Returns the jaxpr that a call calls with its own arguments."""
  if eqn.primitive.name in ("shard_map", "pallas_call"):
    return None
  for name in ("jaxpr", "call_jaxpr", "fun_jaxpr"):
    body = eqn.params.get(name)
    body = body.jaxpr if isinstance(body, ClosedJaxpr) else body
    if isinstance(body, Jaxpr) and len(body.invars) == len(eqn.invars):
      return body
  return None


def split_scan(eqn: Any, given: Sequence[Any]) -> tuple[list[Any], list[Any], list[Any]]:
  """Returns what a scan is given: constants, what it carries, what it takes row by row."""
  if "ft_in" in eqn.params:  # since jax 0.11, which keeps the trees
    num_consts, num_carry, _ = (len(tree) for tree in eqn.params["ft_in"].unpack())
  else:
    num_consts, num_carry = eqn.params["num_consts"], eqn.params["num_carry"]
  first = num_consts + num_carry
  return list(given[:num_consts]), list(given[num_consts:first]), list(given[first:])
