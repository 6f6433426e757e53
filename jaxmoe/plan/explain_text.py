"""The explanation of a recipe as plain text of at most 80 columns."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Sequence

from jaxmoe.parallel import Replicated
from jaxmoe.plan.activations import Activations, ExpertActivations
from jaxmoe.plan.explain import Compiled, Explanation, ParamPlacement, Traffic
from jaxmoe.plan.kernels_ahead import kernel_notes

WIDTH = 80
UNITS = ("B", "KiB", "MiB", "GiB", "TiB", "PiB")


def explain_text(found: Explanation) -> str:
  """Returns the text; every number is one device's unless it says otherwise."""
  lines = [*_mesh(found), "", *_weights(found), "", *_held(found), ""]
  lines += [*_activations(found.activations), *_copies(found.copies), "", *_kernels(found)]
  if found.compiled is None:
    lines += ["", "not compiled: no collectives, FLOPs or peak memory"]
  else:
    lines += ["", *_compiled(found, found.compiled)]
  return "\n".join(line.rstrip() for line in lines)


def size(number: float) -> str:
  """Returns bytes in the largest unit that leaves at least one: `1.50 GiB`."""
  for unit in UNITS[:-1]:
    if abs(number) < 1024:
      return f"{number:.0f} {unit}" if unit == "B" else f"{number:.2f} {unit}"
    number /= 1024
  return f"{number:.2f} {UNITS[-1]}"


def _mesh(found: Explanation) -> Iterator[str]:
  number = 1
  for degree in found.mesh.values():
    number *= degree
  degrees = " ".join(f"{axis}={degree}" for axis, degree in found.mesh.items())
  yield f"mesh  {degrees}  ({number} x {found.device})"


def _weights(found: Explanation) -> Iterator[str]:
  yield from _columns("parameter, dims with the mesh axes they lie on", "a device", "whole")
  for weight in found.weights:
    yield from _columns(f"{weight.name} {_shape(weight.shape)}", *map(size, _both(weight)))
    yield f"    {_dims(weight)}"


def _both(weight: ParamPlacement) -> tuple[int, int]:
  return weight.bytes, weight.whole


def _shape(shape: tuple[int, ...]) -> str:
  return "(" + ",".join(map(str, shape)) + ")"


def _dims(weight: ParamPlacement) -> str:
  """Returns `layer expert=expert,fsdp embed`."""
  return " ".join(
    f"{dim or '-'}={','.join(axes)}" if axes else f"{dim or '-'}"
    for dim, axes in zip(weight.dims, weight.axes)
  )


def _kernels(found: Explanation) -> Iterator[str]:
  yield "back ends"
  for line in (*map(str, found.kernels), *kernel_notes(found.kernels)):
    yield from textwrap.wrap(line, WIDTH, initial_indent="  ", subsequent_indent="    ")


def _columns(text: str, *cells: str) -> Iterator[str]:
  """Yields a line with cells of 12 at its end; text that is too long has a line before it."""
  room = WIDTH - 12 * len(cells)
  if len(text) > room:
    yield text
    text = ""
  yield f"{text:<{room}}" + "".join(f"{cell:>12}" for cell in cells)


def _held(found: Explanation) -> Iterator[str]:
  yield from _columns("a step is given", "a device", "whole")
  for kind, held in found.held.items():
    yield from _columns(f"  {kind}", size(held.bytes), size(held.whole))
    if kind == "parameters" and held != found.file:
      sizes = (size(found.file.bytes), size(found.file.whole))
      yield from _columns("    in a file, model.param_dtype", *sizes)
  whole = sum(held.whole for held in found.held.values())
  yield from _columns("  together", size(found.arguments), size(whole))


def _activations(made: Activations) -> Iterator[str]:
  yield f"a device's part of a microbatch: {made.rows} rows, {made.tokens:,} tokens"
  yield from _columns("  residual stream between two blocks", size(made.stream))
  yield from _columns("  kept for the backward pass (no tensor sharding)", size(made.kept))
  yield from _columns("  logits at a time, float32", size(made.logits))
  for experts in made.experts:
    yield ""
    yield from _experts(experts)


def _copies(copies: Sequence[Replicated]) -> Iterator[str]:
  if copies:
    yield ""
    yield from _columns("the largest activation that devices hold alike", "a device")
  for one in copies:
    *first, last = textwrap.wrap(str(one), WIDTH, initial_indent="  ", subsequent_indent="    ")
    yield from first
    yield from _columns(last, size(one.bytes))


def _experts(made: ExpertActivations) -> Iterator[str]:
  yield from textwrap.wrap(
    f"{made.layers} MoE layer(s) at {made.where}: {made.num_experts} experts that take rows, "
    f"{made.experts_here} a device, {made.num_active} a token; {made.dispatch}; rows of "
    f"{made.tokens:,} tokens may come to a device",
    WIDTH,
  )
  loads = made.loads
  yield from _columns("  load of the busiest expert over the mean", *(f"{at.load}" for at in loads))
  rows = {
    "rows it is sent": [f"{at.expert_rows:,}" for at in loads],
    "of them dropped": [f"{at.dropped:,}" for at in loads],
    "rows of the busiest device": [f"{at.device_rows:,}" for at in loads],
    "dispatch buffers, in and out": [size(at.dispatch_bytes) for at in loads],
    "hidden rows of its experts": [size(at.hidden_bytes) for at in loads],
  }
  for label, cells in rows.items():
    yield from _columns(f"  {label}", *cells)


def _compiled(found: Explanation, compiled: Compiled) -> Iterator[str]:
  memory, flops = compiled.memory, compiled.flops
  yield "compiled step, one device"
  yield from _columns("  arguments", size(memory.arguments))
  if compiled.unread:
    yield from _columns("  given, but never read", size(compiled.unread))
  yield from _columns("  outputs in the place of arguments", size(memory.aliased))
  yield from _columns("  other outputs", size(memory.outputs - memory.aliased))
  yield from _columns("  temporaries", size(memory.temporaries))
  yield from _columns("  peak memory", size(memory.peak))
  if found.room is not None:
    label = "  of the memory a device has: " + ("it fits" if found.fits else "it does not fit")
    yield from _columns(label, size(found.room))
  yield from _columns("  FLOPs of matrix products", f"{flops.matmul:.4g}")
  if flops.unknown_loops:
    label = "  and in loops of unknown length, one pass"
    yield from _columns(label, f"{flops.unknown_loops:.4g}")
  yield from _columns("  model FLOPs, all devices, no recomputation", f"{found.model_flops:.4g}")
  yield ""
  yield from _traffic("collectives of the compiled step", compiled.traffic)
  if {one.dtype for one in compiled.traffic} != {one.dtype for one in compiled.asked}:
    yield ""
    yield from _traffic("as the code asks for them, without the partitioner's", compiled.asked)


def _traffic(title: str, traffic: Sequence[Traffic]) -> Iterator[str]:
  if not traffic:
    yield f"{title}: none"
    return
  total = sum(one.wire_bytes for one in traffic)
  yield from _columns(title, "times", "sent", "share")
  for one in traffic:
    mark = ("" if one.known else " (loop of unknown length)") + " (a branch)" * one.sometimes
    share = one.wire_bytes / total if total else 0
    yield from _columns(
      f"  {one.kind} over {one.over}, {one.dtype}{mark}",
      f"{one.count:,}", size(one.wire_bytes), f"{share:.1%}",
    )  # fmt: skip
  yield from _columns("  together", f"{sum(one.count for one in traffic):,}", size(total), "")
