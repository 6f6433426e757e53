"""tokamax as a side of races of single operations: what it chooses for the devices it finds."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from jaxmoe.bench.sides.protocol import clocked, serve


def _attention(given: Any) -> Callable[..., Any]:
  """Returns causal attention of (B, L, N, H) arrays."""
  import tokamax

  del given
  return lambda q, k, v: tokamax.dot_product_attention(q, k, v, is_causal=True)


def _grouped_matmul(given: Any) -> Callable[..., Any]:
  """Returns rows (R, D) sorted by group times matrices (S, D, F)."""
  import tokamax

  counts_S = given["counts"]
  return lambda rows_RD, weight_SDF: tokamax.ragged_dot(rows_RD, weight_SDF, counts_S)


def _cross_entropy(given: Any) -> Callable[..., Any]:
  """Returns the loss of each of T tokens, of hidden states (T, D) and a head (D, V)."""
  import tokamax

  labels_T = given["labels"]
  return lambda hidden_TD, head_DV: tokamax.linear_softmax_cross_entropy_loss(
    hidden_TD, labels_T, head_DV, reduction="none"
  )


OPERATIONS = {
  "attention": _attention,
  "grouped_matmul": _grouped_matmul,
  "cross_entropy": _cross_entropy,
}


class TokamaxOperation:
  """One of `OPERATIONS`, forward and backward."""

  def __init__(self, kind: str, path: str, dtype: str = "float32"):
    import jax
    import jax.numpy as jnp
    import numpy as np

    given = {name: jnp.asarray(array) for name, array in np.load(path).items()}
    function = OPERATIONS[kind](given)

    def both(args: Any, cotangent: Any) -> Any:
      out, vjp = jax.vjp(function, *args)
      return out, vjp(cotangent)

    number, cotangent = sum(name.isdigit() for name in given), given["cotangent"].astype(dtype)
    args = [given[str(at)].astype(dtype) for at in range(number)]
    compiled = jax.jit(both)
    self._run = lambda: jax.block_until_ready(compiled(args, cotangent))

  def values(self, path: str) -> dict[str, Any]:
    """Writes the output and the gradients."""
    import numpy as np

    out, grads = self._run()
    found = {"out": out, **{str(at): grad for at, grad in enumerate(grads)}}
    plain: dict[str, Any] = {name: np.asarray(one, np.float32) for name, one in found.items()}
    np.savez(path, **plain)
    return {}

  def passes(self, number: int) -> list[float]:
    """Returns the seconds of so many forward and backward passes."""
    return clocked(lambda: [self._run() for _ in range(number)])


def handlers() -> dict[str, Any]:
  """Returns what the side answers."""
  made: list[TokamaxOperation] = []

  def prepare(kind: str, path: str) -> dict[str, Any]:
    made.append(TokamaxOperation(kind, path))
    return {}

  def versions() -> dict[str, str]:
    from importlib.metadata import version

    return {"tokamax": version("tokamax")}

  return {
    "prepare": prepare,
    "versions": versions,
    "values": lambda path: made[-1].values(path),
    "passes": lambda number: made[-1].passes(number),
  }


if __name__ == "__main__":
  serve(("jax", "tokamax"), handlers)
