"""Pipelines as data: order lists, checked and lowered to static columns that one scan runs.

A pipeline is a function `(num_devices, num_micro) -> Table`. To add one, write its file, add one
line to PIPELINES, and the contract test runs it. All of this is of the host: NumPy, no JAX.
"""

from jaxmoe.parallel.pipelines.action import KINDS, Action
from jaxmoe.parallel.pipelines.columns import Columns, Delivery, Keep, Slots
from jaxmoe.parallel.pipelines.csv_notation import write_table
from jaxmoe.parallel.pipelines.dualpipe_v import dualpipe_v
from jaxmoe.parallel.pipelines.gpipe import forward_only, gpipe
from jaxmoe.parallel.pipelines.interleaved import interleaved
from jaxmoe.parallel.pipelines.lowering import lower
from jaxmoe.parallel.pipelines.named_table import named_table, own_table, shown
from jaxmoe.parallel.pipelines.one_f_one_b import one_f_one_b
from jaxmoe.parallel.pipelines.stage_placement import Placement, straight, v_shape
from jaxmoe.parallel.pipelines.table import Table, Vocabulary
from jaxmoe.parallel.pipelines.v_half import v_half
from jaxmoe.parallel.pipelines.vocabulary_passes import with_vocabulary
from jaxmoe.parallel.pipelines.zb_h1 import zb_h1
from jaxmoe.parallel.pipelines.zb_v import zb_v

PIPELINES = {
  "gpipe": gpipe,
  "1f1b": one_f_one_b,
  "interleaved": interleaved,
  "zb_h1": zb_h1,
  "zb_v": zb_v,
  "v_half": v_half,
  "dualpipe_v": dualpipe_v,
}

__all__ = [
  "KINDS",
  "PIPELINES",
  "Action",
  "Columns",
  "Delivery",
  "Keep",
  "Placement",
  "Slots",
  "Table",
  "Vocabulary",
  "forward_only",
  "lower",
  "named_table",
  "own_table",
  "shown",
  "straight",
  "v_shape",
  "with_vocabulary",
  "write_table",
]
