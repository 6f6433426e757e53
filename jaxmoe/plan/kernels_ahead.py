"""jaxmoe/ops/ahead.json: Pallas kernels compiled for chips that are not there, and what they take.

`make look-ahead` writes it. It shows that a kernel compiles, how much of a core's memory it takes
and how much it multiplies; nobody has measured how fast it is. A row ages with the sources that its
kernel is made of, and whoever takes that kernel is told.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
import re
from collections.abc import Callable, Iterable

import jax
from jax.sharding import SingleDeviceSharding

from jaxmoe.core.backends import Choice
from jaxmoe.core.errors import InputError
from jaxmoe.core.measured import file_digest
from jaxmoe.core.output import write_atomic
from jaxmoe.hlo.compiled import memory
from jaxmoe.plan.ahead_cases import BACKEND, AheadCase, ahead_cases
from jaxmoe.plan.topology import topology_devices

_ROOT = pathlib.Path(__file__).parents[2]
PATH = _ROOT / "jaxmoe/ops/ahead.json"
CHIPS = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1"}
"""The chips, and a slice of each."""
DTYPES = ("bfloat16", "float32")
_ABOUT = "compiled for chips that are not there; nobody has measured these"
_KERNEL = 'custom_call_target="tpu_custom_call"'
_MEMORY = re.compile(r'"used_scoped_memory_configs":\[\{"memory_space":"1",[^}]*"size":"(\d+)"')


@dataclasses.dataclass(frozen=True)
class AheadRow:
  """What compiling a kernel and its gradients for a chip showed.

  Attributes:
    operation: Its package.
    size: See `AheadCase`.
    dtype: Of the arrays.
    chip: A key of `CHIPS`.
    jax: Its version.
    sources: The digest of what the kernel is made of.
    compiled: Whether it does.
    note: Why not, a line.
    vmem_bytes: What the largest of its kernels takes of a core's memory.
    temporary_bytes: What the program takes of the chip's beside arguments and results.
    work: FLOPs of products over the least there can be, which makes nothing again.
  """

  operation: str
  size: str
  dtype: str
  chip: str
  jax: str
  sources: str
  compiled: bool
  note: str = ""
  vmem_bytes: int = 0
  temporary_bytes: int = 0
  work: float = 0.0

  @property
  def key(self) -> tuple[str, ...]:
    """What there is one row of: of each version of JAX that differs, too."""
    return self.operation, self.size, self.dtype, self.chip, self.jax.rpartition(".")[0]


def read_ahead(path: pathlib.Path = PATH) -> list[AheadRow]:
  """Returns the rows of the file; none where there is no file.

  Raises:
    InputError: the file is not one of rows.
  """
  if not path.is_file():
    return []
  try:
    return [AheadRow(**row) for row in json.loads(path.read_text(encoding="utf-8"))["rows"]]
  except (ValueError, TypeError, KeyError) as error:
    raise InputError(
      f"{path} has no rows of kernels: {error}; remove it and run make look-ahead"
    ) from None


def write_ahead(rows: Iterable[AheadRow], path: pathlib.Path = PATH) -> None:
  """Writes rows over those of the same keys, and keeps the others; all or nothing."""
  merged = {row.key: row for row in (*read_ahead(path), *rows)}
  lines = [json.dumps(dataclasses.asdict(merged[key])) for key in sorted(merged)]
  text = ",\n".join(lines)
  write_atomic(path, f'{{"about": "{_ABOUT}", "rows": [\n{text}\n]}}\n')


def kernel_digest(operation: str, root: pathlib.Path = _ROOT) -> str:
  """Returns a digest of the sources that an operation's kernel is made of, within jaxmoe/ops."""
  return file_digest(root / "jaxmoe/ops" / operation / f"{BACKEND}.py", root)


def compile_ahead(say: Callable[[str], None] = print) -> list[AheadRow]:
  """Returns a row of every kernel, chip and dtype, telling each.

  Raises:
    InputError: libtpu is not installed.
  """
  rows = []
  for chip, name in CHIPS.items():
    device = topology_devices(name)[0]
    for case in ahead_cases():
      for dtype in DTYPES:
        rows.append(_row(case, dtype, chip, device))
        say(_text(rows[-1]))
  return rows


def _row(case: AheadCase, dtype: str, chip: str, device: jax.Device) -> AheadRow:
  digest = kernel_digest(case.operation)
  row = AheadRow(case.operation, case.size, dtype, chip, jax.__version__, digest, compiled=False)
  args = case.abstract(dtype, SingleDeviceSharding(device))
  try:
    compiled = jax.jit(case.both_ways).lower(*args).compile()
  except Exception as error:  # whatever a compiler says of a kernel is what is asked
    return dataclasses.replace(row, note=str(error).partition("\n")[0][:200])
  kernels = [line for line in (compiled.as_text() or "").splitlines() if _KERNEL in line]
  taken = [int(size) for line in kernels for size in _MEMORY.findall(line)]
  return dataclasses.replace(
    row, compiled=True, vmem_bytes=max(taken), temporary_bytes=memory(compiled).temporaries,
    work=round(case.work(dtype), 3),
  )  # fmt: skip


def _text(row: AheadRow) -> str:
  what = f"{row.operation} {row.size} {row.dtype} {row.chip} jax {row.jax}:"
  if not row.compiled:
    return f"{what} does not compile: {row.note}"
  memories = f"{row.vmem_bytes / 2**20:.1f} MiB of a core, {row.temporary_bytes / 2**20:.1f} beside"
  return f"{what} {memories}, {row.work:.2f} of the least work"


def kernel_notes(choices: Iterable[Choice], rows: Iterable[AheadRow] | None = None) -> list[str]:
  """Returns what to know of the kernels that were chosen without a race on such devices."""
  known = list(read_ahead() if rows is None else rows)
  lines = []
  taken = (each for each in choices if each.backend == BACKEND and not each.raced)
  for operation in dict.fromkeys(each.operation for each in taken):
    own = [row for row in known if row.operation == operation]
    failed = next((row for row in own if not row.compiled), None)
    if not own:
      lines.append(f"{operation}: {BACKEND} was never compiled ahead; make look-ahead does")
    elif any(row.sources != kernel_digest(operation) for row in own):
      lines.append(f"{operation}: {BACKEND} has changed since it was compiled; make look-ahead")
    elif failed:
      lines.append(f"{operation}: {BACKEND} does not compile everywhere: {_text(failed)}")
    else:
      lines.append(f"{operation}: {BACKEND} is compiled ahead, not measured")
  return lines
