"""The floating point operations of a matrix product in a compiled program.

XLA on CPU and GPU prints products as `dot`; on TPU as `convolution`, of which the batch of a
batched product is a spatial dim with a dilated base.
"""

from __future__ import annotations

import math
import re

from jaxmoe.hlo.text import Computation, Instruction


def dot_flops(instruction: Instruction, computation: Computation) -> int:
  """Returns 2 for each multiply-add of a product, 0 for any other instruction."""
  if instruction.opcode not in ("dot", "convolution"):
    return 0
  left, right = (computation[name].shapes[0].dims for name in instruction.operands[:2])
  out = instruction.shapes[0].dims
  if instruction.opcode == "dot":
    summed = instruction.attribute(r"lhs_contracting_dims=\{([\d,]*)\}") or ""
    return 2 * math.prod(out) * math.prod(left[int(dim)] for dim in summed.split(",") if dim)
  labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", instruction.attributes)
  assert labels, "a convolution without dim_labels"
  of_left, of_right, of_out = labels.groups()
  # The kernel's input features are those of one group.
  adds = right[of_right.index("i")] * out[of_out.index("b")] * out[of_out.index("f")]
  for dim in filter(str.isdigit, of_out):
    sizes = left[of_left.index(dim)], right[of_right.index(dim)], out[of_out.index(dim)]
    adds *= _pairs(*sizes, _window(instruction, int(dim)))
  return 2 * adds


def _window(instruction: Instruction, dim: int) -> dict[str, int]:
  """Returns stride, low padding and dilations of a spatial dim."""
  text = instruction.attribute(r"window=\{([^}]*)\}") or ""
  fields = {name: value.split("x")[dim] for name, value in re.findall(r"(\w+)=(\S+)", text)}
  return {
    "stride": int(fields.get("stride", 1)),
    "pad": int(fields.get("pad", "0_0").split("_")[0]),
    "lhs_dilate": int(fields.get("lhs_dilate", 1)),
    "rhs_dilate": int(fields.get("rhs_dilate", 1)),
  }


def _pairs(left: int, kernel: int, out: int, window: dict[str, int]) -> int:
  """Returns how many (output, kernel) positions meet an element of the input, no padding or gap."""
  base = window["lhs_dilate"]
  places = (
    at * window["stride"] + k * window["rhs_dilate"] - window["pad"]
    for at in range(out)
    for k in range(kernel)
  )
  return sum(place % base == 0 and 0 <= place // base < left for place in places)
