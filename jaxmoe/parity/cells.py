"""The cells of the parity table: which layouts are compared with one device, and with what.

A cell's key has the axes of more than one device, the ZeRO stage and what is folded, and the names
of router, experts, dispatcher, exchange and attention. Degrees are no part of it: what is right on
two devices of an axis is the same program on more.
"""

from __future__ import annotations

import dataclasses
import itertools
import re
import typing
from collections.abc import Collection, Iterable, Iterator
from typing import Any

from jaxmoe.core.backends import Chooser
from jaxmoe.core.config_io import component
from jaxmoe.core.errors import InputError
from jaxmoe.models.block import ATTENTION
from jaxmoe.models.masks import MASKS
from jaxmoe.moe.dispatch import DISPATCHERS, EXCHANGES
from jaxmoe.moe.experts import EXPERTS
from jaxmoe.moe.layer import MoEConfig
from jaxmoe.moe.routers import ROUTERS
from jaxmoe.parallel import AXES, Parallel
from jaxmoe.parallel.attend import ATTEND
from jaxmoe.parallel.block_order import Order
from jaxmoe.parallel.degrees import HeadPlace, Stage
from jaxmoe.parallel.pipelines import PIPELINES, Action, Keep, shown, write_table
from jaxmoe.parity.context_cells import context_cells
from jaxmoe.train.experiment import Experiment

PARTITION = "partition_activations"
_WHOLE_ROWS = ("data", "fsdp", "expert", "tensor")
"""Axes over which neither rows nor the stack are cut."""
NO_EXCHANGE = "none"
RAGGED = "all_to_all_ragged"
"""The exchange `all_to_all` by the back end `ragged`; where no device can, by the one that can."""
_EXCHANGES = (*EXCHANGES, RAGGED)
_COMPONENT = {RAGGED: "all_to_all"}
_FAMILIES: tuple[Collection[str], ...] = (
  ROUTERS, EXPERTS, DISPATCHERS, {*_EXCHANGES, NO_EXCHANGE}, ATTENTION
)  # fmt: skip
"""Where the names at the end of a key come from."""


def table_with_again(num_devices: int, num_micro: int) -> str:
  """Returns the text of 1f1b with an `R` before each backward pass."""
  table, orders = PIPELINES["1f1b"](num_devices, num_micro), []
  for order in table.orders:
    made = (
      (Action(of.stage, "R", of.micro), of) if of.kind == "BW" else (of,) for of in order
    )  # fmt: skip
    orders.append(tuple(itertools.chain.from_iterable(made)))
  return write_table(dataclasses.replace(table, orders=tuple(orders)))


AGAIN = table_with_again(2, 4)
"""The table of cells whose stages are made again in a pass of its own."""


@dataclasses.dataclass(frozen=True)
class Cell:
  """One layout with one choice of each component.

  Attributes:
    parallel: The degrees with which it is tried.
    router: A key of ROUTERS, and so on.
    experts: A key of EXPERTS.
    dispatch: A key of DISPATCHERS.
    exchange: A key of EXCHANGES, or RAGGED; counts only where experts are spread.
    attention: A key of ATTENTION.
    mask: A key of MASKS; counts only where rows are spread over context devices.
  """

  parallel: Parallel
  router: str = "topk"
  experts: str = "swiglu"
  dispatch: str = "dropless"
  exchange: str = "all_to_all"
  attention: str = "softmax"
  mask: str = "document"

  @property
  def key(self) -> str:
    """The name of what it shows, such as `data+expert/zero3/topk/swiglu/dropless/all_to_all`."""
    layout = layout_key(self.parallel)
    exchange = self.exchange if self.parallel.expert_degree > 1 else NO_EXCHANGE
    parts: tuple[str, ...] = (layout, self.router, self.experts, self.dispatch, exchange)
    parts += (self.attention,) * (self.attention != "softmax")
    parts += (self.mask,) * (self.mask != "document" and self.parallel.context > 1)
    return "/".join(parts)


def layout_key(parallel: Parallel) -> str:
  """Returns the part of a key that is about the layout; degrees of 1 are not named."""
  axes = "+".join(axis for axis in AXES if parallel.axis_sizes[axis] > 1)
  extras = [shown(parallel.pipeline)] if parallel.pipe > 1 else []
  extras += [parallel.head] * (parallel.head != "last")
  extras += [parallel.keep] * (parallel.keep != "input")
  if parallel.fsdp > 1:
    extras.append(f"zero{parallel.zero}")
  if parallel.context > 1:
    extras.append(parallel.attend)
    extras += [parallel.order] * (parallel.order != "plain")
  if parallel.sequence:
    extras.append("sequence")
  if parallel.partition_activations:
    extras.append(PARTITION)
  folds = [axis for axis in AXES if axis in parallel.fold and parallel.axis_sizes[axis] > 1]
  if folds:
    extras.append("fold_" + "_".join(folds))
  return "/".join([axes, *extras])


def cell_called(key: str) -> Cell | None:
  """Returns the cell of a key, on two devices of each axis; None where it is not a key."""
  *words, last = key.split("/")
  mask = {"mask": last} if last in MASKS else {}
  words += [] if mask else [last]
  size = 5 if words[-1:] and words[-1] in ATTENTION else 4
  layout, names = words[:-size], words[-size:]
  if not layout or not all(name in family for name, family in zip(names, _FAMILIES)):
    return None
  fields: dict[str, Any] = dict.fromkeys(layout[0].split("+"), 2)
  for extra in layout[1:]:
    if extra in PIPELINES:
      fields["pipeline"] = extra
    elif extra == shown(AGAIN):
      fields["pipeline"] = AGAIN
    elif re.fullmatch("zero[0-3]", extra):
      fields["zero"] = int(extra[-1])
    elif extra in ATTEND:
      fields["attend"] = extra
    elif extra in typing.get_args(Order):
      fields["order"] = extra
    elif extra in typing.get_args(HeadPlace):
      fields["head"] = extra
    elif extra in typing.get_args(Keep):
      fields["keep"] = extra
    elif extra.startswith("fold_"):
      fields["fold"] = tuple(extra.removeprefix("fold_").split("_"))
    else:
      fields[extra] = True
  known = {
    *AXES, "pipeline", "zero", "sequence", PARTITION, "fold", "attend", "order", "head", "keep"
  }  # fmt: skip
  if not {*fields, *fields.get("fold", ())} <= known:
    return None
  parts = mask | dict(zip(("router", "experts", "dispatch", "exchange", "attention"), names))
  if parts["exchange"] == NO_EXCHANGE:
    del parts["exchange"]
  cell = Cell(Parallel(**fields), **parts)
  return cell if cell.key == key else None


def all_cells() -> list[Cell]:
  """Returns every cell of the table, each key once."""
  found: dict[str, Cell] = {}
  for cell in _every():
    found.setdefault(cell.key, cell)
  return list(found.values())


def smoke_cells() -> list[Cell]:
  """Returns the few cells of every test run: each axis, stage and exchange at least once."""
  three = Parallel(data=2, expert=2, tensor=2)
  return [
    Cell(Parallel(data=2, fsdp=2, expert=2), dispatch="capacity"),
    Cell(Parallel(fsdp=4, zero=2), router="aux_free"),
    Cell(dataclasses.replace(three, sequence=True, fold=("tensor",))),
    Cell(three, exchange="all_gather"),
    Cell(Parallel(fsdp=2, zero=1, expert=2, tensor=2), experts="zero_copy_constant"),
    Cell(Parallel(expert=2, context=2, attend="ring", order="zigzag")),
    Cell(Parallel(context=2, tensor=2, attend="ulysses")),
    Cell(Parallel(pipe=2, expert=2, pipeline="zb_v")),
    Cell(Parallel(pipe=2, tensor=2, head="one_barrier")),
  ]


def cells_of(experiment: Experiment) -> list[str]:
  """Returns the keys that a recipe stands on, none on one device.

  Raises:
    InputError: a component is a class that no cell has.
  """
  parallel = experiment.parallel
  if parallel.num_devices == 1:
    return []
  keys = []
  for group in experiment.model.stack:
    for block in group.pattern:
      attention = _name(ATTENTION, block.attention)
      mask = _name(MASKS, _mask(block.attention))
      if isinstance(block.ffn, MoEConfig):
        layer = block.ffn
        names = (
          _name(ROUTERS, layer.router), _name(EXPERTS, layer.experts),
          _name(DISPATCHERS, layer.dispatch), _exchange(experiment, layer),
        )
        keys.append(Cell(parallel, *names, attention, mask).key)
      else:
        keys.append(Cell(parallel, attention=attention, mask=mask).key)
  return list(dict.fromkeys(keys))


def _mask(attention: Any) -> Any:
  """Returns the mask of a kind of attention, or of its experts' heads."""
  return getattr(attention, "heads", attention).mask


def _exchange(experiment: Experiment, layer: MoEConfig) -> str:
  """Returns the name of a layer's exchange, in which that of its back end may be."""
  name = _name(EXCHANGES, layer.exchange)
  asked = dict(experiment.kernels.asked).get("exchange")
  return RAGGED if (name, asked) == ("all_to_all", "ragged") else name


def _name(family: dict[str, tuple[type, Any]], record: Any) -> str:
  """Returns the name of a record: that of the settings most like it among those of its class."""
  names = [name for name, (kind, _) in family.items() if kind is type(record)]
  if not names:
    raise InputError(f"no cell of the parity table has a {type(record).__name__}")
  mine = _plain(record)

  def alike(name: str) -> int:
    other = _plain(family[name][1])
    return sum(other[field] == value for field, value in mine.items())

  return max(names, key=alike)


def _plain(record: Any) -> dict[str, Any]:
  """Returns the fields of a record; components by their class, sizes left out."""
  fields = {field.name: getattr(record, field.name) for field in dataclasses.fields(record)}
  return {
    name: type(value).__name__ if dataclasses.is_dataclass(value) else value
    for name, value in fields.items()
  }


def chooser_of(cell: Cell) -> Chooser:
  """Returns what chooses the back ends that a cell names, where they fit."""
  names = (("exchange", "ragged"),) if cell.exchange == RAGGED else ()
  return Chooser(names=names, strict=False)


def parts_of(cell: Cell) -> dict[str, Any]:
  """Returns the components of a cell as records."""
  return {
    "router": component(ROUTERS, "router", cell.router),
    "experts": component(EXPERTS, "experts", cell.experts),
    "dispatch": component(DISPATCHERS, "dispatch", cell.dispatch),
    "exchange": component(EXCHANGES, "exchange", _COMPONENT.get(cell.exchange, cell.exchange)),
    "attention": component(ATTENTION, "attention", cell.attention),
    "mask": component(MASKS, "mask", cell.mask),
  }


def _every() -> Iterator[Cell]:
  for parallel in layouts():
    yield Cell(parallel)
  data, expert, tensor = Parallel(data=2), Parallel(expert=2), Parallel(tensor=2)
  both = Parallel(data=2, expert=2)
  for router in ROUTERS:
    yield from (Cell(layout, router=router) for layout in (data, expert, both))
  for dispatch in DISPATCHERS:
    yield from (Cell(layout, dispatch=dispatch) for layout in (data, expert, both))
    yield Cell(expert, dispatch=dispatch, exchange="all_gather")
  for exchange in _EXCHANGES:
    layouts_of = [Parallel(data=2, expert=2, fold=("data",))]
    if exchange != "all_to_all_two_level":
      layouts_of.extend((expert, Parallel(expert=2, tensor=2)))
    yield from (Cell(layout, exchange=exchange) for layout in layouts_of)
  for experts in EXPERTS:
    for layout in (data, expert, tensor, Parallel(fsdp=2), Parallel(expert=2, tensor=2)):
      yield Cell(layout, experts=experts)
  for attention in ATTENTION:
    yield Cell(data, attention=attention)
    yield Cell(expert, attention=attention)
    yield Cell(Parallel(fsdp=2), attention=attention)
    yield Cell(Parallel(fsdp=2, expert=2), attention=attention)
    yield Cell(Parallel(data=2, fsdp=2, expert=2), attention=attention)
    if attention != "experts":
      yield Cell(tensor, attention=attention)
      for sequence in (False, True):
        for degree in (1, 2):
          layout = Parallel(fsdp=2, expert=degree, tensor=2, sequence=sequence)
          yield Cell(layout, attention=attention)
      yield Cell(Parallel(tensor=2, sequence=True), attention=attention)
  yield from (Cell(layout, **parts) for layout, parts in context_cells())
  yield from pipe_cells()
  yield from smoke_cells()


def pipe_cells() -> Iterator[Cell]:
  """Yields the cells of pipelines: each with each axis, and of one of them all other choices."""
  for pipeline in PIPELINES:
    one = Parallel(pipe=2, pipeline=pipeline)
    for more in (
      {}, {"data": 2}, {"expert": 2}, {"fsdp": 2}, {"tensor": 2}, {"tensor": 2, "sequence": True}
    ):  # fmt: skip
      yield Cell(dataclasses.replace(one, **more))  # type: ignore[arg-type]
  yield from spread_head_cells()
  yield from residual_cells()
  one = Parallel(pipe=2)
  stages: tuple[Stage, ...] = (0, 1, 2)
  for zero in stages:
    yield Cell(dataclasses.replace(one, fsdp=2, zero=zero))
  for axes in itertools.combinations(_WHOLE_ROWS, 2):
    yield Cell(dataclasses.replace(one, **dict.fromkeys(axes, 2)))  # type: ignore[arg-type]
  for router in ROUTERS:
    yield Cell(one, router=router)
  expert = dataclasses.replace(one, expert=2)
  for dispatch in DISPATCHERS:
    yield Cell(one, dispatch=dispatch)
    yield Cell(expert, dispatch=dispatch)
  for exchange in _EXCHANGES:
    levels = {"data": 2, "fold": ("data",)} if exchange == "all_to_all_two_level" else {}
    yield Cell(dataclasses.replace(expert, **levels), exchange=exchange)  # type: ignore[arg-type]
  for experts in EXPERTS:
    yield Cell(one, experts=experts)
  for attention in ATTENTION:
    yield Cell(one, attention=attention)


def spread_head_cells() -> Iterator[Cell]:
  """Yields the cells of a vocabulary that lies over all devices of a pipeline."""
  one = Parallel(pipe=2, head="one_barrier")
  two = Parallel(pipe=2, head="two_barriers")
  for pipeline in PIPELINES:
    yield Cell(dataclasses.replace(one, pipeline=pipeline))
  for axes in (("data",), ("expert",), ("fsdp",), ("tensor",), ("data", "fsdp")):
    yield Cell(dataclasses.replace(one, **dict.fromkeys(axes, 2)))  # type: ignore[arg-type]
  yield Cell(dataclasses.replace(one, tensor=2, sequence=True))
  yield Cell(dataclasses.replace(one, context=2, attend="ring"))
  yield Cell(dataclasses.replace(one, fsdp=2, zero=2))
  for pipeline in ("1f1b", "zb_v", "dualpipe_v"):
    yield Cell(dataclasses.replace(two, pipeline=pipeline))
  for axis in ("expert", "fsdp", "tensor", "context"):
    attend = {"attend": "ring"} if axis == "context" else {}
    yield Cell(dataclasses.replace(two, **{axis: 2}, **attend))  # type: ignore[arg-type]


def residual_cells() -> Iterator[Cell]:
  """Yields the cells of stages that keep residuals, and of a table that makes them again."""
  again = Parallel(pipe=2, pipeline=AGAIN)
  kept = Parallel(pipe=2, keep="residuals")
  for pipeline in PIPELINES:
    yield Cell(dataclasses.replace(kept, pipeline=pipeline))
  for axis in ("data", "expert", "fsdp", "tensor", "context"):
    more = {axis: 2} | ({"attend": "ring"} if axis == "context" else {})
    yield Cell(dataclasses.replace(kept, **more))  # type: ignore[arg-type]
    if axis in ("expert", "fsdp"):
      yield Cell(dataclasses.replace(again, **more))  # type: ignore[arg-type]
  yield Cell(again)
  yield Cell(dataclasses.replace(kept, tensor=2, sequence=True))
  yield Cell(dataclasses.replace(kept, tensor=2, partition_activations=True))
  yield Cell(dataclasses.replace(kept, fsdp=2, zero=2))
  for head in ("one_barrier", "two_barriers"):
    yield Cell(dataclasses.replace(kept, head=head))
  yield Cell(dataclasses.replace(kept, pipeline="zb_v", head="one_barrier"))


def layouts() -> Iterator[Parallel]:
  """Yields every set of axes whose devices hold whole rows and stacks, with stages and variants."""
  for size in range(1, len(_WHOLE_ROWS) + 1):
    for axes in itertools.combinations(_WHOLE_ROWS, size):
      yield from _variants(axes)
  yield Parallel(data=2, expert=2, fold=("data",))
  yield Parallel(fsdp=2, expert=2, fold=("fsdp",))
  yield Parallel(data=2, tensor=2, expert=2, fold=("data", "tensor"))
  yield Parallel(data=2, tensor=2, expert=2, fold=("data", "tensor"), sequence=True)


def _variants(axes: Iterable[str]) -> Iterator[Parallel]:
  axes = tuple(axes)
  degree = 4 if len(axes) == 1 else 2  # 4 tensor devices share 2 key heads
  layout = Parallel(**dict.fromkeys(axes, degree))  # type: ignore[arg-type]
  stages: tuple[Stage, ...] = (0, 1, 2, 3) if "fsdp" in axes else (3,)
  for zero in stages:
    yield dataclasses.replace(layout, zero=zero)
    if "tensor" in axes:
      yield dataclasses.replace(layout, zero=zero, sequence=True)
      yield dataclasses.replace(layout, zero=zero, partition_activations=True)
  if "tensor" in axes and "expert" in axes:
    yield dataclasses.replace(layout, fold=("tensor",))
    yield dataclasses.replace(layout, fold=("tensor",), sequence=True)
