"""Engines that spread weights, state and activations over the devices of a mesh."""

from jaxmoe.parallel.ahead import scan_ahead
from jaxmoe.parallel.automatic import Automatic, automatic_layout
from jaxmoe.parallel.copies import GIB, Copied, Given, find_copies
from jaxmoe.parallel.degrees import AXES, TOKEN_AXES, Parallel, make_mesh
from jaxmoe.parallel.idle import idle_line
from jaxmoe.parallel.layouts import make_layout, share_of_rows
from jaxmoe.parallel.mesh_context import MeshContext
from jaxmoe.parallel.zero import Gathers, ReduceScatter, keep_no_weights

__all__ = [
  "AXES", "GIB", "TOKEN_AXES", "Automatic", "Copied", "Gathers", "Given", "MeshContext", "Parallel",
  "ReduceScatter", "automatic_layout", "find_copies", "idle_line", "keep_no_weights", "make_layout",
  "make_mesh", "scan_ahead", "share_of_rows",
]
