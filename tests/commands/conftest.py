"""Running commands as `python -m launch.NAME` does, in this process or in one of their own."""

import contextlib
import dataclasses
import gc
import io
import logging
import os
import pathlib
import runpy
import signal
import subprocess
import sys
import tempfile

import jax
import pytest

from jaxmoe.checkpoint.orbax_store import quiet_orbax
from jaxmoe.commands.process import jax_settings, run_flags
from jaxmoe.cost import peak
from tests.models.pretrained.checkpoint import write_checkpoint

ROOT = pathlib.Path(__file__).parents[2]
HOME = pathlib.Path(tempfile.gettempdir()) / f"jaxmoe-test-home-{os.getuid()}"
TINY = f"--config={ROOT}/configs/tiny.py"
CHANGES = ("train.num_steps=6", "train.checkpoint_every=4", "evaluation.every=3", "samples.every=6")
AGAIN = (TINY, *(f"--config.{change}" for change in CHANGES))


@dataclasses.dataclass(frozen=True)
class Result:
  """What a command left: its exit code and what it printed."""

  code: int
  out: str
  err: str


class Terminal(io.StringIO):
  """Standard output or error of a command that runs in this process."""

  encoding = "utf-8"

  def reconfigure(self, **settings):
    """Takes what a real stream takes."""


def run_here(name, *arguments):
  """Runs a command in this process; exceptions that are not its own exit come through."""
  out, err = Terminal(), Terminal()
  caught = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
  handlers = {number: signal.getsignal(number) for number in caught}
  opened, make = [], run_flags.Workdir
  run_flags.Workdir = lambda path: opened.append(make(path)) or opened[-1]
  before, sys.argv = sys.argv, [f"launch/{name}.py", *map(str, arguments)]
  path = str(ROOT / "launch" / f"{name}.py")
  try:
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
      runpy.run_path(path, run_name="__main__")
    code = 0
  except SystemExit as stop:
    code = stop.code or 0
  finally:
    gc.unfreeze()
    sys.argv, run_flags.Workdir = before, make
    for number, handler in handlers.items():
      signal.signal(number, handler)
    for workdir in opened:
      workdir.release()
  return Result(code, out.getvalue(), err.getvalue())


def share_programs():
  """Lets processes with the cache of HOME find the programs compiled in this one."""
  compiled = HOME / "jaxmoe" / "compiled"
  if not compiled.exists():
    compiled.parent.mkdir(parents=True, exist_ok=True)
    pathlib.Path(jax.config.jax_compilation_cache_dir).mkdir(parents=True, exist_ok=True)
    with contextlib.suppress(FileExistsError):
      compiled.symlink_to(jax.config.jax_compilation_cache_dir)


def start(name, *arguments, env=None, program=None, **options):
  """Returns a command started as a process of its own, with pipes."""
  own = {"XDG_CACHE_HOME": str(HOME), "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
  share_programs()
  options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, **options}
  return subprocess.Popen(
    [sys.executable, *(program or ("-m", f"launch.{name}")), *map(str, arguments)],
    cwd=ROOT,
    env={**os.environ, **own, **(env or {})},
    **options,
  )


def run_alone(name, *arguments, **options):
  """Runs a command as a process of its own."""
  process = start(name, *arguments, **options)
  out, err = process.communicate(timeout=300)
  return Result(process.returncode, out, err)


@pytest.fixture(autouse=True)
def _settings_are_the_tests(monkeypatch):
  """A command in this process leaves JAX as the tests set it up, and measures no peak."""
  monkeypatch.setattr(jax_settings, "set_up_jax", lambda keep_memory=True: None)
  monkeypatch.setattr(peak, "matmul_peak", lambda dtype, spend_s, size=0: (1e11, 512))


@pytest.fixture(scope="session", autouse=True)
def _quiet():
  quiet_orbax()
  logging.getLogger("absl").setLevel(logging.ERROR)


@pytest.fixture(scope="session")
def here():
  """Returns `run_here(name, *arguments) -> Result`."""
  return run_here


@pytest.fixture(scope="session")
def alone():
  """Returns `run_alone(name, *arguments, **options) -> Result`."""
  return run_alone


@pytest.fixture(scope="session")
def started():
  """Returns `start(name, *arguments, **options) -> Popen`."""
  return start


@pytest.fixture(scope="session")
def tiny():
  """Returns the config argument of the smallest recipe."""
  return TINY


@pytest.fixture(scope="session")
def again():
  """Returns the arguments of the command that made `trained`, but for the workdir."""
  return AGAIN


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
  """Returns the workdir of a short finished run: steps 4 and 6 are saved and scored."""
  workdir = tmp_path_factory.mktemp("trained") / "run"
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(jax_settings, "set_up_jax", lambda keep_memory=True: None)
    patch.setenv("XDG_CACHE_HOME", str(HOME))
    result = run_here("train", *AGAIN, f"--workdir={workdir}")
  assert result.code == 0, result
  return workdir


@pytest.fixture(scope="session")
def compiles():
  """Returns a list to which the name of every program lowered from now on is appended."""
  lowered = []

  def note(event, duration, **details):
    if event == "/jax/core/compile/jaxpr_to_mlir_module_duration":
      lowered.append(details.get("fun_name", "?"))

  jax.monitoring.register_event_duration_secs_listener(note)
  return lowered


@pytest.fixture(scope="session")
def crew():
  """Returns a function (processes, devices, *program) -> Popen of `launch.local`."""

  def run(processes, devices, *program, heartbeat_s=10):
    flags = (f"--processes={processes}", f"--devices_per_process={devices}")
    return start("local", *flags, f"--heartbeat_s={heartbeat_s}", "--", *program)

  return run


@pytest.fixture(scope="session")
def start_on(crew):
  """Returns a function (processes, devices, workdir, *flags, **options) -> Popen of a run.

  It is spread over all devices. `changes` are added to those of `again` or take their place.
  """

  def run(processes, devices, workdir, *flags, changes=(), program=("launch.train",)):
    spread = f"parallel.data={processes * devices}"
    values = dict(change.split("=") for change in (*CHANGES, spread, *changes))
    recipe = (TINY, *(f"--config.{field}={value}" for field, value in values.items()))
    return crew(processes, devices, *program, *recipe, f"--workdir={workdir}", *flags)

  return run


@pytest.fixture(scope="session")
def train_on(start_on):
  """Returns a function as `start_on` that waits and returns (code, out, err)."""

  def run(*arguments, **options):
    process = start_on(*arguments, **options)
    out, err = process.communicate(timeout=550)
    return process.returncode, out, err

  return run


@pytest.fixture
def checkpoint(tmp_path):
  """Returns a function that makes a checkpoint of a family, in some dtype."""

  def make(model_type, dtype="float32", name="checkpoint"):
    folder = tmp_path / name
    write_checkpoint(model_type, folder, dtype)
    return folder

  return make


@pytest.fixture
def text(tmp_path):
  """Returns a folder of small texts, some of which are held out."""
  folder = tmp_path / "text"
  folder.mkdir()
  for at in range(8):
    (folder / f"{at}.txt").write_text(f"def f_{'abcdefgh'[at]}(x):\n  return x\n" * (at + 3))
  return folder


@pytest.fixture
def convert(here):
  """Returns a function that runs `launch.convert`, which must succeed."""

  def run(*flags):
    result = here("convert", *flags)
    assert result.code == 0, result
    return result

  return run
