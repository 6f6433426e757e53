"""Automatic layouts: where parameters lie, from what a traced program does with them.

Redco's two rules (Tan et al. 2023, arXiv:2310.16355) decide over the axis `tensor`. Rule 2: what
makes heads is cut along its heads, what takes them too. Rule 1: of two products in a row the first
is cut along what it makes and the second along what it takes, so that only its sum is exchanged.
The rows of a looked-up table are cut. Beyond Redco: stacked experts lie over the expert axes and
their insides follow rule 1; what scores experts stays whole; so do key heads that are too few.

Redco goes by names, this by the program: a dim is cut wherever it appears, so what belongs together
(a kernel, its bias, what it is multiplied with) is cut alike, and no leaf along two of its dims.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from jax.sharding import Mesh

from jaxmoe.core.layout import EXPERT, LAYER, Dims, Layout
from jaxmoe.core.param_names import flatten, unflatten
from jaxmoe.parallel.dataflow import (
  CUT,
  DATA,
  INDEXED,
  INSIDE,
  LAYERS,
  OPAQUE,
  RANKED,
  REDUCED,
  Dataflow,
  Product,
)
from jaxmoe.parallel.degrees import TOKEN_AXES
from jaxmoe.parallel.dim_factors import MISALIGNED, Dim, Factor, resolve, size_of
from jaxmoe.parallel.jaxpr_interpreter import trace
from jaxmoe.parallel.replication import Replicated

HEADS, HIDDEN, ROWS = "heads", "mlp", "vocab"
"""What dims are called that lie over `tensor`: those of rules 2 and 1, and of looked-up tables."""

_NEVER = (DATA, LAYERS, CUT, OPAQUE, INSIDE, MISALIGNED)
Factors = frozenset[Factor]


@dataclasses.dataclass(frozen=True)
class AutomaticLayout:
  """Where each parameter lies, and why; three trees like the parameters.

  Attributes:
    dims: Logical dims, which any Layout understands.
    specs: The mesh axes of each dim.
    reasons: In words.
    replicated: The largest activation that every `tensor` device holds whole, as the parameters
      lie; None where there is one such device. Of several, rows lie over the axes of tokens.
    why: Why it is whole, where one of its dims might have been cut.
  """

  dims: Any
  specs: Any
  reasons: Any
  replicated: Replicated | None = None
  why: str = ""

  def table(self) -> str:
    """Returns a line for each parameter: its path, spec and reason."""
    specs, reasons = flatten(self.specs), flatten(self.reasons)
    rows = [(path, str(tuple(specs[path])), reasons[path]) for path in specs]
    widths = [max((len(row[at]) for row in rows), default=0) for at in (0, 1)]
    return "\n".join(
      f"{path:{widths[0]}}  {spec:{widths[1]}}  {reason}" for path, spec, reason in rows
    )


def automatic_layout(
  loss: Callable[[Any, Any], Any],
  params: Any,
  batch: Any,
  mesh: Mesh,
  expert_axes: tuple[str, ...] = ("expert",),
) -> AutomaticLayout:
  """Returns where the parameters of `loss(params, batch)` lie on a mesh.

  The loss is any JAX code; `params` and `batch` may be abstract. Nothing is computed.

  Args:
    loss: Returns anything; only what it does with its arguments counts.
    params: A tree of arrays.
    batch: A tree of arrays.
    mesh: Its axes `tensor` and `expert_axes` are used where it has them.
    expert_axes: What experts are spread over.
  """
  dataflow, leaves = trace(loss, params, batch)
  axes = {
    **dict.fromkeys((HEADS, HIDDEN, ROWS), _of_mesh(mesh, ("tensor",))),
    EXPERT: _of_mesh(mesh, expert_axes),
  }
  layout = Layout(mesh, rules={"params": axes}, may_replicate=frozenset([EXPERT]))
  rules = _Rules(dataflow, leaves, layout.degree(axes[HEADS]), layout.degree(axes[EXPERT]))
  shapes = flatten(params)
  dims = dict(zip(shapes, map(rules.dims, range(len(leaves)))))
  specs = {path: layout.spec("params", dims[path], leaf.shape) for path, leaf in shapes.items()}
  reasons = dict(zip(shapes, map(rules.reason, range(len(leaves)))))
  replicated, why = rules.replicated(layout.degree(_of_mesh(mesh, TOKEN_AXES)))
  placed, spread, reasons_text = (unflatten(params, flat) for flat in (dims, specs, reasons))
  return AutomaticLayout(placed, spread, reasons_text, replicated, why)


def _of_mesh(mesh: Mesh, axes: tuple[str, ...]) -> tuple[str, ...]:
  return tuple(axis for axis in axes if axis in mesh.axis_names)


@dataclasses.dataclass(frozen=True)
class _Cut:
  """Leading factors of a dim that are cut together, and what such dims are called."""

  unit: Dim
  name: str


class _Rules:
  """The rules, applied to what a program does; `tensor` and `expert` are degrees."""

  def __init__(self, dataflow: Dataflow, leaves: Sequence[Sequence[Dim]], tensor: int, expert: int):
    self._dataflow, self._tensor, self._expert = dataflow, tensor, expert
    self._leaves = [tuple(map(resolve, dims)) for dims in leaves]
    self._heads = _factors(dataflow.heads)
    self._experts = self._find_experts()
    self._routers = {
      leaf for product in dataflow.products if self._routes(product) for leaf in product.leaves
    }
    self._refused: dict[Dim, str] = {}
    self._cuts: list[_Cut] = []
    for cut in self._candidates() if tensor > 1 else ():
      self._accept(cut)

  def dims(self, leaf: int) -> Dims:
    """Returns the logical dims of a leaf."""
    dims = self._leaves[leaf]
    first = 1 if dims and _marked(dims[0], LAYERS) else 0
    names: list[str | None] = [LAYER if at < first else self._name(dim, leaf)
                               for at, dim in enumerate(dims)]
    if self._holds_experts(leaf):
      names[self._first(leaf)] = EXPERT
    return tuple(names)

  def reason(self, leaf: int) -> str:
    """Returns in words why a leaf lies as it does."""
    if leaf in self._routers:
      return "whole: it scores experts"
    reasons_text = []
    if self._holds_experts(leaf):
      size = size_of(self._leaves[leaf][self._first(leaf)])
      fits = size % self._expert == 0
      reasons_text.append(
        f"{size} experts" if fits else f"{size} experts cannot be divided by {self._expert}"
      )
    name = next((name for name in self.dims(leaf) if name in (HEADS, HIDDEN, ROWS)), None)
    reasons_text.append(self._why_whole(leaf) if name is None else self._why_cut(leaf, name))
    return "; ".join(reasons_text)

  def replicated(self, groups: int) -> tuple[Replicated | None, str]:
    """Returns the largest activation that is not cut, of one of `groups` devices, and why."""
    if self._tensor == 1:
      return None, ""
    whole = [
      (Replicated.of(("tensor",), self._part(dims, groups), made.dtype, made.eqn), dims)
      for made in self._dataflow.made.values()
      if not any(map(self._name, dims := [resolve(dim) for dim in made.dims]))
    ]
    if not whole:
      return None, ""
    largest, dims = max(whole, key=lambda one: one[0].bytes)
    whys = (why for unit, why in map(self._unit, dims) if unit is None and "cannot" in why)
    return largest, next(whys, "")

  def _part(self, dims: Sequence[Dim], groups: int) -> list[int]:
    """Returns the sizes of dims with rows, or else experts, spread over their devices."""
    shape = [size_of(dim) for dim in dims]
    for at, dim in enumerate(dims):
      rows = _marked(dim, DATA)
      if rows or (dim and self._experts.issuperset(dim)):
        shape[at] = -(-shape[at] // (groups if rows else self._expert))
        break
    return shape

  def _why_cut(self, leaf: int, name: str) -> str:
    rule = {HEADS: "heads, rule 2", HIDDEN: "rule 1", ROWS: "rows of a table"}[name]
    for product in self._products(leaf):
      if any(self._name(resolve(dim)) for dim in product.summed):
        return f"cut along what it is looked up in ({rule})" if product.lookup else (
          f"cut along what it takes ({rule})"
        )
      if any(self._name(resolve(dim)) for dim in product.out):
        return f"cut along what it makes ({rule})"
    return f"cut like what it goes with ({rule})"

  def _why_whole(self, leaf: int) -> str:
    products = self._products(leaf)
    if self._tensor == 1:
      return "whole: there is one tensor device"
    if not products:
      return "whole: it goes with what is not cut"
    for dim in (
      dim for product in products for dim in (product.summed if product.lookup else product.out)
    ):
      unit, why = self._unit(resolve(dim))
      why = self._refused.get(unit, "") if unit else why
      if why:
        return f"whole: {why}"
    return "whole: what it makes and takes is not cut"

  def _products(self, leaf: int) -> list[Product]:
    return [product for product in self._dataflow.products if leaf in product.leaves]

  def _name(self, dim: Dim, leaf: int | None = None) -> str | None:
    """Returns what a dim that is cut is called."""
    if leaf in self._routers:
      return None
    return next((cut.name for cut in self._cuts if dim[: len(cut.unit)] == cut.unit), None)

  def _first(self, leaf: int) -> int:
    """Returns the first dim of a leaf that does not count layers."""
    dims = self._leaves[leaf]
    return next((at for at, dim in enumerate(dims) if not _marked(dim, LAYERS)), len(dims))

  def _holds_experts(self, leaf: int) -> bool:
    """Whether a leaf is a stack of what experts are made of."""
    return self._stacked(leaf) and leaf not in self._routers

  def _stacked(self, leaf: int) -> bool:
    """Whether the first dim of a leaf, before others, counts experts."""
    rest = self._leaves[leaf][self._first(leaf) :]
    return len(rest) > 1 and bool(rest[0]) and self._experts.issuperset(rest[0])

  def _find_experts(self) -> Factors:
    """Returns what counts experts: each entry is multiplied with rows of its own, and is no head.

    Or the entries are scores that are compared, and there is a matrix for each.
    """
    dataflow = self._dataflow
    of_batch = _factors(dim for product in dataflow.products for dim in product.batch)
    of_heads = self._heads | (_factors(dataflow.attended) & of_batch)
    scored = _factors(
      product.out[0] for product in dataflow.products if _scores(product) and not product.lookup
    )
    scored &= _factors(
      dims[self._first(leaf)] for leaf, dims in enumerate(self._leaves)
      if len(dims) > self._first(leaf) + 2
    )  # fmt: skip
    inside = frozenset(
      factor for dims in self._leaves for dim in dims
      if not of_batch.issuperset(dim) for factor in dim
    )  # fmt: skip
    counted = (of_batch - of_heads - inside) | scored
    return frozenset(f for f in counted if not f.marks & {DATA, LAYERS})

  def _routes(self, product: Product) -> bool:
    """Whether a product makes scores of experts, and nothing else."""
    out = [resolve(dim) for dim in product.out if dim]
    if len(out) != 1 or product.lookup or any(product.batch):
      return False
    counts = [resolve(dim) for dim in self._dataflow.picked]
    counts += [dims[self._first(leaf)] for leaf, dims in enumerate(self._leaves)
               if self._stacked(leaf)]
    known = out[0] in counts or self._experts.issuperset(out[0])
    return known or (_scores(product) and size_of(out[0]) in map(size_of, counts))

  def _unit(self, dim: Dim) -> tuple[Dim | None, str]:
    """Returns the leading factors along which a dim divides, or None and why there are none."""
    size, unit = 1, list[Factor]()
    for factor in dim:
      never = [why for why in _NEVER if why in factor.marks]
      if never:
        why = f"a dim of {size_of(dim)} {never[0]}"
        return None, self._uneven(unit) if unit else why
      if factor in self._experts:
        return None, ""
      unit.append(factor)
      size *= factor.size
      if size % self._tensor == 0:
        return tuple(unit), ""
      if self._tensor % size:
        break
    return None, self._uneven(unit) if unit else ""

  def _uneven(self, unit: Sequence[Factor]) -> str:
    what = " heads" if unit[0] in self._heads else ""
    return f"{size_of(unit)}{what} cannot be divided by {self._tensor}"

  def _candidates(self) -> list[_Cut]:
    """Returns what might be cut: heads, tables, and what products make, the best first.

    Better is what no other operation sums over, what few products take (a residual stream is taken
    by many), and what comes first.
    """
    found: dict[Dim, tuple[tuple[int, ...], _Cut]] = {}
    for order, product in enumerate(self._dataflow.products):
      if product.leaves & self._routers:
        continue
      for dim in product.summed if product.lookup else product.out:
        unit, _ = self._unit(resolve(dim))
        if unit is None or unit in found:
          continue
        rank, name = self._rank(unit), HIDDEN
        if product.lookup:
          rank, name = (1,), ROWS
        elif unit[0] in self._heads:
          rank, name = (0, -sum(map(bool, self._places(unit)))), HEADS
        found[unit] = (*rank, order), _Cut(unit, name)
    return [cut for _, cut in sorted(found.values(), key=lambda pair: pair[0])]

  def _rank(self, unit: Dim) -> tuple[int, ...]:
    looked_at = any(factor.marks & {REDUCED, RANKED, INDEXED} for factor in unit)
    takers = {
      leaf for product in self._dataflow.products if not product.lookup for leaf in product.leaves
      if any(resolve(dim)[: len(unit)] == unit for dim in product.summed)
    }  # fmt: skip
    return 2 + looked_at, len(takers)

  def _places(self, unit: Dim) -> list[list[int]]:
    """Returns for each leaf the dims that a cut along this unit would cut."""
    return [
      [at for at, dim in enumerate(dims) if dim[: len(unit)] == unit] for dims in self._leaves
    ]

  def _accept(self, cut: _Cut) -> None:
    """Takes a cut unless a leaf would be cut along two dims, or a factor in two ways."""
    used = {factor for other in self._cuts for factor in other.unit}
    places = self._places(cut.unit)
    twice = any(len(at) > 1 for at in places)
    taken = any(
      at and any(self._name(dim, leaf) for dim in self._leaves[leaf])
      for leaf, at in enumerate(places)
    )
    if not (used.intersection(cut.unit) or twice or taken):
      self._cuts.append(cut)
      return
    self._refused[cut.unit] = "what it makes and takes is one dim" if twice else (
      "what it makes is taken by what is cut along its other dim"
    )


def _scores(product: Product) -> bool:
  """Whether all a product makes is one dim whose entries are compared."""
  out = [dim for dim in product.out if dim]
  return len(out) == 1 and _marked(resolve(out[0]), RANKED)


def _factors(dims: Iterator[Dim] | Sequence[Dim]) -> Factors:
  return frozenset(factor for dim in dims for factor in resolve(dim))


def _marked(dim: Dim, what: str) -> bool:
  return any(what in factor.marks for factor in dim)
