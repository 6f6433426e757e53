"""Programs kept in a folder: the same bits and donation, and never those of something else."""

import dataclasses
import os
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from jax.sharding import PartitionSpec as P

from jaxmoe.core import kept_programs
from jaxmoe.core.backends import Choice, ChoiceLog
from jaxmoe.core.kept_programs import KeptPrograms, Program
from jaxmoe.core.metrics import Mean
from jaxmoe.core.rng import Keys

ROWS = jax.ShapeDtypeStruct((8, 4), jnp.float32)
LATER_S = 4e9


class Traced:
  """A function of a state and rows that counts how often it is traced."""

  def __init__(self, does=lambda x: x):
    self.times, self._does = 0, does

  def __call__(self, state, rows_TD):
    self.times += 1
    moved = jax.tree.map(lambda leaf: leaf + self._does(jnp.sin(rows_TD)).mean(), state)
    return moved, {"loss": Mean(rows_TD.sum(), jnp.float32(rows_TD.size)), "none": None}


def example(sharding=None):
  """Returns a state and rows."""
  state = {"a": jnp.arange(32.0).reshape(8, 4), "step": jnp.zeros((), jnp.float32)}
  rows_TD = jnp.linspace(0, 1, 32).reshape(8, 4)
  if sharding is None:
    return state, rows_TD
  placed = {**state, "a": jax.device_put(state["a"], sharding)}
  return {**placed, "step": _everywhere(state["step"], sharding)}, jax.device_put(rows_TD, sharding)


def _everywhere(leaf, sharding):
  return jax.device_put(leaf, NamedSharding(sharding.mesh, PartitionSpec()))


def ran(compiled, *arguments):
  """Returns what a program gave, as NumPy."""
  return jax.tree.map(np.asarray, compiled(*arguments))


def same(ours, theirs):
  """Whether two trees are equal, bit for bit."""
  ours, theirs = (jax.tree.map(np.asarray, each) for each in (ours, theirs))
  pairs = zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True)
  alike = jax.tree.structure(ours) == jax.tree.structure(theirs)
  return alike and all(np.array_equal(a, b) and a.dtype == b.dtype for a, b in pairs)


@pytest.fixture
def times(tmp_path):
  """Returns a function that compiles a program as a new process would, and counts its traces."""

  def compile_it(about=(), args=None, folder=tmp_path / "programs", since_s=LATER_S, **fields):
    function = fields.pop("function", Traced())
    program = Program("toy", function, **fields)
    kept = KeptPrograms(folder, since_s)
    return kept.compiled(program, about, *(args or example())), function.times

  return compile_it


@pytest.mark.parametrize("devices", [1, 8])
def test_a_kept_program_gives_the_bits_of_one_traced_anew_and_uses_up_its_state(times, devices):
  mesh = jax.make_mesh((devices,), ("data",), axis_types=(AxisType.Auto,))
  rows = NamedSharding(mesh, PartitionSpec("data"))
  whole = NamedSharding(mesh, PartitionSpec())
  out = ({"a": rows, "step": whole}, whole)
  fields = {"donate": (0,), "args": example(rows), "out_shardings": out}
  fresh, first = times(**fields)
  kept, second = times(**fields)
  assert (first, second) == (1, 0)
  given = example(rows)
  state, metrics = kept(*given)
  assert all(leaf.is_deleted() for leaf in jax.tree.leaves(given[0]))
  anew = fresh(*example(rows))
  assert [leaf.sharding for leaf in jax.tree.leaves((state, metrics))] == [
    leaf.sharding for leaf in jax.tree.leaves(anew)
  ]
  assert same((state, metrics), anew)
  sizes = [each.memory_analysis() for each in (fresh, kept)]
  assert sizes[0].alias_size_in_bytes == sizes[1].alias_size_in_bytes > 0
  assert sizes[0].temp_size_in_bytes == sizes[1].temp_size_in_bytes


def test_recipe_source_version_settings_devices_or_arguments_that_differ_are_traced_anew(
  times, monkeypatch
):
  assert times(about=Keys(1, "a"))[1] == 1
  assert times(about=Keys(1, "a"))[1] == 0
  assert times(about=Keys(1, "b"))[1] == 1
  assert times(about=Keys(1, "a"), donate=(0,))[1] == 1
  state, rows_TD = example()
  assert times(about=Keys(1, "a"), args=(state, rows_TD[:4]))[1] == 1
  assert times(about=Keys(1, "a"), args=(state, rows_TD.astype(jnp.bfloat16)))[1] == 1
  with monkeypatch.context() as patch:
    patch.setattr(jax, "__version__", "0.10.99")
    assert times(about=Keys(1, "a"))[1] == 1
  with monkeypatch.context() as patch:
    patch.setattr(kept_programs, "_sources", lambda: ("another file", 0.0))
    assert times(about=Keys(1, "a"))[1] == 1
  with jax.default_matmul_precision("highest"):
    assert times(about=Keys(1, "a"))[1] == 1
  assert times(about=Keys(1, "a"))[1] == 0


def test_arrays_that_lie_alike_are_alike_however_that_is_said(times):
  mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
  state, rows_TD = example()
  for spec, traces in ((P("data", None), 1), (P("data"), 0), (P(None, None), 1), (P(), 0)):
    lying = jax.device_put(rows_TD, NamedSharding(mesh, spec))
    assert times(args=(state, lying))[1] == traces


def test_shapes_are_kept_and_half_a_file_is_made_anew(tmp_path):
  kept, args = KeptPrograms(tmp_path, LATER_S), example()
  expected, traces = jax.eval_shape(Traced(), *args), []
  for damaged in (None, None, b"", b"half"):
    if damaged is not None:
      (path,) = tmp_path.iterdir()
      path.write_bytes(damaged)
    function = Traced()  # JAX remembers what it traced
    assert kept.of("toy").shapes("toy", function, *args) == expected
    traces.append(function.times)
  assert traces == [1, 0, 1, 1]
  function = Traced()
  assert kept.of("another").shapes("toy", function, *args) == expected
  assert function.times == 1


def test_every_source_counts(tmp_path, monkeypatch):
  for name, text in (("a.py", "x = 1"), ("deep/b.py", "y = 2")):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text(text)
  monkeypatch.setattr(kept_programs, "_ROOT", tmp_path)
  seen = [kept_programs._sources.__wrapped__()[0]]
  (tmp_path / "deep/b.py").write_text("y = 3")
  seen.append(kept_programs._sources.__wrapped__()[0])
  (tmp_path / "deep/c.py").write_text("")
  seen.append(kept_programs._sources.__wrapped__()[0])
  (tmp_path / "deep/c.py").rename(tmp_path / "c.py")
  seen.append(kept_programs._sources.__wrapped__()[0])
  assert len(set(seen)) == 4


def test_sources_that_changed_since_the_process_began_keep_nothing(times, tmp_path):
  assert times(since_s=0.0)[1] == 1
  assert not (tmp_path / "programs").exists()
  times()
  assert times(since_s=0.0)[1] == 1


def test_a_recipe_of_which_a_class_lies_elsewhere_keeps_nothing(times, tmp_path):
  @dataclasses.dataclass(frozen=True)
  class Own:
    width: int = 1

  assert [times(about=Own())[1] for _ in range(2)] == [1, 1]
  assert not (tmp_path / "programs").exists()


def test_a_file_that_is_not_whole_is_made_anew(times, tmp_path):
  fresh, _ = times()
  (path,) = (tmp_path / "programs").iterdir()
  whole = path.read_bytes()
  middle = len(whole) // 2
  flipped = whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :]
  for damaged in (b"", whole[:70], whole[:-1], whole + b"x", flipped, b"\n\n", b"a" * 999):
    path.write_bytes(damaged)
    again, traces = times()
    assert (traces, times()[1]) == (1, 0)
    assert same(ran(again, *example()), ran(fresh, *example()))
  path.unlink()
  path.mkdir()  # cannot be replaced by a file
  assert times()[1] == 1


def test_a_folder_that_cannot_be_written_costs_nothing_but_the_trace(times, tmp_path):
  (tmp_path / "file").write_text("")
  assert times(folder=tmp_path / "file" / "programs")[1] == 1


def test_a_folder_keeps_so_many_programs_and_lets_go_those_that_were_not_used(
  times, tmp_path, monkeypatch
):
  monkeypatch.setattr(kept_programs, "MAX_FILES", 2)
  times(about="first")
  (first,) = (tmp_path / "programs").iterdir()
  times(about="second")
  for age, path in enumerate(sorted((tmp_path / "programs").iterdir(), key=lambda p: p != first)):
    os.utime(path, (time.time() - 99 + age,) * 2)  # the first is the oldest
  assert times(about="first")[1] == 0
  times(about="third")
  assert len(list((tmp_path / "programs").iterdir())) == 2
  assert times(about="first")[1] == 0
  assert times(about="second")[1] == 1


def test_what_calls_back_into_its_process_is_not_kept(times, tmp_path):
  def echo(x_TD):
    return jax.pure_callback(lambda x: x, ROWS, x_TD)

  for _ in range(2):
    compiled, traces = times(function=Traced(echo))
    assert traces == 1
    ran(compiled, *example())
  assert not list((tmp_path / "programs").glob("*"))


def test_choices_made_while_a_program_was_traced_are_told_again(tmp_path):
  def chosen():
    log = ChoiceLog()
    log.add(Choice("before", "it", "why"))

    def traced(x):
      log.add(Choice("toy", "few", "the first that fits"))
      return x

    KeptPrograms(tmp_path, LATER_S, log).compiled(Program("toy", traced), (), ROWS)
    return log.take()

  first, second = chosen(), chosen()
  assert first == second
  assert [choice.operation for choice in first] == ["before", "toy"]


ALONE = """
import pathlib, sys
import jax
from jaxmoe.core.kept_programs import KeptPrograms, Program

def f(x):
  assert sys.argv[2] == "traces", "traced"
  return jax.numpy.linalg.eigh(x @ x.T)[0]

like = jax.ShapeDtypeStruct((4, 4), "float32")
kept = KeptPrograms(pathlib.Path(sys.argv[1]), 4e9).compiled(Program("f", f), (), like)
print(kept(jax.numpy.arange(16.0).reshape(4, 4)).tolist())
"""


def test_a_program_that_calls_lapack_runs_in_a_process_that_never_traced_it(tmp_path):
  said = [  # each with JAX's settings as they are at first, which kept programs depend on
    subprocess.run(
      [sys.executable, "-c", ALONE, str(tmp_path), how], capture_output=True, text=True,
      env={**os.environ, "JAX_PLATFORMS": "cpu"}, check=False,
    )
    for how in ("traces", "never traces")
  ]  # fmt: skip
  assert [each.returncode for each in said] == [0, 0], [each.stderr for each in said]
  assert said[0].stdout == said[1].stdout and said[0].stdout.startswith("[")
