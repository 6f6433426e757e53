"""Programs kept from one process to the next, so that a warm start traces nothing of ours.

What is kept of a program is its StableHLO, the structure of what it returns, and which back ends
were chosen while it was traced. JAX's own compile cache has the executable, under the same key as
if it had been traced again: a warm start runs the executable of the cold one, bit for bit.

The name of a file is a digest of all that a traced program depends on: every source of this
package, the versions below it, JAX's settings, the devices, what the caller says (the recipe), and
its arguments. A file is trusted if the digest of its content is that of its first line; any other
is made anew. Files are replaced whole, and two processes that write one write the same.

Where several processes are one run each traces for itself: nothing is read or kept.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import io
import json
import os
import pathlib
import platform
from collections.abc import Callable, Mapping
from typing import Any

import flax
import jax
import jax.numpy as jnp
import jaxlib
import numpy as np
import optax
from jax.sharding import NamedSharding

from jaxmoe.core import measured, multihost, tree_json
from jaxmoe.core.backends import Choice, ChoiceLog
from jaxmoe.core.output import write_atomic

MAX_FILES = 128
"""Programs that a folder keeps; those that were not used for longest go."""

_ROOT = pathlib.Path(__file__).parents[1]
_OF_FILES_AND_LOGS = ("cache_dir", "cache_max", "cache_min", "log", "dump", "profiler", "traceback")


@dataclasses.dataclass(frozen=True)
class Program:
  """A function, and how it becomes a program.

  Attributes:
    name: What it is called in profiles and files.
    function: The function; traced only where no program of it is kept.
    donate: The numbers of the arguments that it may use up.
    out_shardings: Of what it returns; None where all lies on one device.
  """

  name: str
  function: Callable[..., Any]
  donate: tuple[int, ...] = ()
  out_shardings: Any = None

  def lower(self, *args: Any) -> jax.stages.Lowered:
    """Returns it, traced and lowered for arguments or for what they are like."""
    return self._lower(self.name, self.function, *args)

  def lower_like(self, out: Any, *args: Any) -> jax.stages.Lowered:
    """Returns a program of the same arguments and results, in which nothing is computed."""
    leaves, tree = jax.tree.flatten(out)

    def nothing(*args: Any) -> Any:
      del args
      return jax.tree.unflatten(tree, jax.ffi.ffi_call("kept", leaves)())  # one line for all

    return self._lower(f"kept_{self.name}", nothing, *args)

  def _lower(self, name: str, function: Callable[..., Any], *args: Any) -> jax.stages.Lowered:
    def program(*args: Any) -> Any:
      return function(*args)

    program.__name__ = program.__qualname__ = name
    out = {} if self.out_shardings is None else {"out_shardings": self.out_shardings}
    return jax.jit(program, donate_argnums=self.donate, keep_unused=True, **out).lower(*args)


class Compiler:
  """Makes programs, here and now."""

  def __call__(self, program: Program, *args: Any) -> jax.stages.Compiled:
    """Returns a program compiled for arguments, or for what they are like."""
    return program.lower(*args).compile()

  def shapes(self, name: str, function: Callable[..., Any], *args: Any) -> Any:
    """Returns what a function, by a name for files, returns for arguments: shapes and dtypes."""
    del name
    return jax.eval_shape(function, *args)


class KeptPrograms:
  """The programs that a folder keeps.

  Attributes:
    choices: Where back ends are told.

  Args:
    folder: Made at the first write; one that cannot be written keeps nothing.
    since_s: When this process began, in seconds since 1970. Newer sources may not be those that it
      runs: then nothing is read or kept.
    choices: Where back ends are told that are chosen while programs are traced; those of a kept
      program are told again.
  """

  def __init__(self, folder: pathlib.Path, since_s: float, choices: ChoiceLog | None = None):
    self._folder, self._since_s = folder, since_s
    self.choices = ChoiceLog() if choices is None else choices

  def of(self, *about: Any) -> Compiler:
    """Returns what makes programs whose functions depend on records and plain values."""
    return _KeptOf(self, about)

  def compiled(self, program: Program, about: Any, *args: Any) -> jax.stages.Compiled:
    """Returns a program compiled for arguments, or for what they are like.

    Args:
      program: What is compiled, and if need be traced.
      about: What else the function depends on: records of this package, and plain values.
      *args: Arrays or shapes.
    """
    how = (program.donate, str(program.out_shardings))
    path = self._path(program.name, how, about, args)
    lowered = None if path is None else self._read(path, program, args)
    if lowered is None:
      before = self.choices.take()
      lowered = program.lower(*args)
      chosen = self.choices.take()
      for choice in (*before, *chosen):
        self.choices.add(choice)
      if path is not None:
        with contextlib.suppress(OSError, ValueError):
          self._write(path, lowered.out_info, _module_of(lowered), chosen)
    return lowered.compile()

  def shapes(self, name: str, function: Callable[..., Any], about: Any, *args: Any) -> Any:
    """Returns shapes and dtypes of what a function returns; `about` and `args` as above."""
    path = self._path(name, "shapes", about, args)
    found = None if path is None else _record(path)
    if found is not None:
      return found[0]
    out = jax.eval_shape(function, *args)
    if path is not None:
      with contextlib.suppress(OSError, ValueError):
        self._write(path, out, b"", ())
    return out

  def _path(self, name: str, how: Any, about: Any, args: tuple[Any, ...]) -> pathlib.Path | None:
    """Returns the file of what has a name; None where it is not to be kept."""
    sources, newest_s = _sources()
    if multihost.is_multi_process() or newest_s > self._since_s:
      return None
    try:
      described = _described(about)
    except ValueError:
      return None
    leaves = [_argument(leaf) for leaf in jax.tree.leaves(args)]
    of_args = [str(jax.tree.structure(args)), leaves]
    key = json.dumps([sources, _surroundings(), described, how, of_args])
    return self._folder / f"{name}-{hashlib.sha256(key.encode()).hexdigest()[:40]}"

  def _read(
    self, path: pathlib.Path, program: Program, args: tuple[Any, ...]
  ) -> jax.stages.Lowered | None:
    """Returns what is kept, ready to be compiled; None where nothing is there that is whole."""
    found = _record(path)
    if found is None:
      return None
    out, module, choices = found
    try:
      lowered = _with_module(program.lower_like(out, *args), module)
    except (ValueError, TypeError, KeyError, AttributeError):
      return None
    for choice in choices:
      self.choices.add(choice)
    return lowered

  def _write(self, path: pathlib.Path, out: Any, module: bytes, chosen: tuple[Choice, ...]) -> None:
    """Keeps what was traced: what comes out, and the program if there is one.

    Raises:
      ValueError: what comes out is none of the trees that a file can hold.
      OSError: it cannot be written.
    """
    record = {
      "out": tree_json.to_json(out),
      "leaves": [(leaf.shape, np.dtype(leaf.dtype).name) for leaf in jax.tree.leaves(out)],
      "choices": [dataclasses.astuple(choice) for choice in chosen],
    }
    plain = json.dumps(record).encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, b"\n".join((_digest(plain, module), plain, module)))
    kept = sorted(path.parent.iterdir(), key=lambda each: each.stat().st_mtime)
    for old in kept[:-MAX_FILES]:
      old.unlink(missing_ok=True)


class _KeptOf(Compiler):
  """Takes what is kept of functions that depend on what it is about."""

  def __init__(self, programs: KeptPrograms, about: tuple[Any, ...]):
    self._programs, self._about = programs, about

  def __call__(self, program: Program, *args: Any) -> jax.stages.Compiled:
    return self._programs.compiled(program, self._about, *args)

  def shapes(self, name: str, function: Callable[..., Any], *args: Any) -> Any:
    return self._programs.shapes(name, function, self._about, *args)


def _record(path: pathlib.Path) -> tuple[Any, bytes, list[Choice]] | None:
  """Returns what comes out, the program and the choices of a file; None if it is not whole."""
  try:
    digest, plain, module = path.read_bytes().split(b"\n", 2)
    if digest != _digest(plain, module):
      return None
    record = json.loads(plain)
    leaves = [jax.ShapeDtypeStruct(tuple(shape), dtype) for shape, dtype in record["leaves"]]
    out = jax.tree.unflatten(tree_json.from_json(record["out"]), leaves)
    os.utime(path)
    return out, module, [Choice(*choice) for choice in record["choices"]]
  except (OSError, ValueError, TypeError, KeyError, AttributeError):
    return None


def _digest(plain: bytes, module: bytes) -> bytes:
  return hashlib.sha256(plain + b"\n" + module).hexdigest().encode()


def _module_of(lowered: jax.stages.Lowered) -> bytes:
  """Returns the StableHLO of a program that nothing but its arguments goes into.

  Raises:
    ValueError: something does, such as a callback.
  """
  lowering: Any = lowered._lowering  # no public way leads back from StableHLO to a program
  held = ("keepalive", "host_callbacks", "unordered_effects", "ordered_effects", "mut")
  if lowering.const_args or any(lowering.compile_args[name] for name in held):
    raise ValueError("the program holds on to something of its process")
  bytecode = io.BytesIO()
  lowering.stablehlo().operation.write_bytecode(bytecode)
  return bytecode.getvalue()


def _with_module(lowered: jax.stages.Lowered, module: bytes) -> jax.stages.Lowered:
  """Returns a lowered program with other StableHLO in its place."""
  if b"lapack" in module:  # JAX makes LAPACK known to XLA when it lowers a call of it
    jax.jit(jnp.linalg.cholesky).lower(jax.ShapeDtypeStruct((1, 1), jnp.float32))
  lowering: Any = lowered._lowering
  there = lowering.stablehlo()
  lowering._hlo = type(there).parse(module, context=there.context)
  return lowered


@functools.cache
def _sources() -> tuple[str, float]:
  """Returns a digest of all sources of this package, and when the newest was changed."""
  total, newest_s = hashlib.sha256(), 0.0
  for path in sorted(_ROOT.rglob("*.py")):
    content = path.read_bytes()
    total.update(f"{path.relative_to(_ROOT).as_posix()} {len(content)} ".encode())
    total.update(content)
    newest_s = max(newest_s, path.stat().st_mtime)
  return total.hexdigest(), newest_s


def _surroundings() -> Mapping[str, Any]:
  """Returns what any program depends on besides sources, recipe and arguments."""
  settings = {
    name: str(getattr(jax.config, name, value))
    for name, value in jax.config.values.items()
    if not any(word in name for word in _OF_FILES_AND_LOGS)
  }
  modules = (flax, jax, jaxlib, np, optax)
  return {
    "python": platform.python_version(),
    "versions": {module.__name__: module.__version__ for module in modules},
    "settings": settings,
    "devices": [(each.platform, each.device_kind, each.id) for each in jax.devices()],
    "measured": "" if jax.default_backend() == "cpu" else measured.known().digest,
  }


def _described(value: Any) -> Any:
  """Returns what JSON can hold of records and plain values.

  Raises:
    ValueError: a class is not of this package, so that its source is not among those it depends on.
  """
  if value is None or isinstance(value, str | int | float):
    return value
  if isinstance(value, np.dtype):
    return value.name
  if isinstance(value, Mapping):
    return {"items": [(_described(key), _described(value[key])) for key in sorted(value)]}
  if isinstance(value, tuple | list | frozenset | set):
    ordered = sorted(value) if isinstance(value, frozenset | set) else value
    return [_described(each) for each in ordered]
  kind = type(value)
  if not dataclasses.is_dataclass(value) or kind.__module__.partition(".")[0] != "jaxmoe":
    raise ValueError(f"{kind.__module__}.{kind.__qualname__} is not of this package")
  fields = {f.name: _described(getattr(value, f.name)) for f in dataclasses.fields(value)}
  return {"class": f"{kind.__module__}:{kind.__qualname__}", "fields": fields}


def _argument(leaf: Any) -> Any:
  """Returns what of an argument a program depends on."""
  sharding = getattr(leaf, "sharding", None)
  mesh = getattr(sharding, "mesh", None)
  order = [] if mesh is None else [device.id for device in mesh.devices.flat]
  weak = bool(getattr(leaf, "weak_type", False))
  return [list(np.shape(leaf)), str(leaf.dtype), weak, _lies(sharding), order]


def _lies(sharding: Any) -> str:
  """Returns how an array lies; dims at the end that are not spread can be named or not."""
  if not isinstance(sharding, NamedSharding):
    return str(sharding)
  spec = list(sharding.spec)
  while spec and spec[-1] is None:
    spec.pop()
  return str((sharding.mesh, spec, sharding.memory_kind))
