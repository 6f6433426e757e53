"""Pipelines as data: order lists, checked and lowered to static columns that one scan runs.

A pipeline is a function `(num_devices, num_micro) -> Table`. To add one, write its file, add one
line to PIPELINES, and the contract test runs it. All of this is of the host: NumPy, no JAX.
"""

from jaxmoe.parallel.pipelines.action import KINDS, Action
from jaxmoe.parallel.pipelines.columns import Columns, Delivery, Slots
from jaxmoe.parallel.pipelines.gpipe import forward_only, gpipe
from jaxmoe.parallel.pipelines.lowering import lower
from jaxmoe.parallel.pipelines.one_f_one_b import one_f_one_b
from jaxmoe.parallel.pipelines.stage_placement import Placement, straight, v_shape
from jaxmoe.parallel.pipelines.table import Table, Vocabulary

PIPELINES = {
  "gpipe": gpipe,
  "1f1b": one_f_one_b,
}

__all__ = [
  "KINDS",
  "PIPELINES",
  "Action",
  "Columns",
  "Delivery",
  "Placement",
  "Slots",
  "Table",
  "Vocabulary",
  "forward_only",
  "lower",
  "straight",
  "v_shape",
]
