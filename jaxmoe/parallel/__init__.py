"""Engines that spread weights, state and activations over the devices of a mesh."""

from jaxmoe.parallel.automatic import AutomaticLayout, automatic_layout
from jaxmoe.parallel.block_order import SLOT
from jaxmoe.parallel.degrees import AXES, ROW_AXES, TOKEN_AXES, AxisNames, Parallel, make_mesh
from jaxmoe.parallel.idle import idle_line
from jaxmoe.parallel.layouts import make_layout, share_of_rows
from jaxmoe.parallel.mesh_context import MeshContext
from jaxmoe.parallel.replication import GIB, Replicated, Varying, find_replicated
from jaxmoe.parallel.scan_prefetch import scan_with_prefetch
from jaxmoe.parallel.zero import ParamGatherer, ReduceScatter, save_all_but_weights

__all__ = [
  "AXES",
  "GIB",
  "ROW_AXES",
  "SLOT",
  "TOKEN_AXES",
  "AutomaticLayout",
  "AxisNames",
  "MeshContext",
  "Parallel",
  "ParamGatherer",
  "ReduceScatter",
  "Replicated",
  "Varying",
  "automatic_layout",
  "find_replicated",
  "idle_line",
  "make_layout",
  "make_mesh",
  "save_all_but_weights",
  "scan_with_prefetch",
  "share_of_rows",
]
