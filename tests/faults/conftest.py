"""One fork server for all runs of the suite, the undisturbed run, and the table at the end."""

import os
import pathlib
import random
import shutil
import signal
import tempfile

import jax
import pytest

from tests.faults import points, runs, table

SEEDS = 20
HOME = pathlib.Path(tempfile.gettempdir()) / f"jaxmoe-fault-home-{os.getuid()}"
TINY = runs.ROOT / "configs" / "tiny.py"
KILL = {"do": "shoot", "number": signal.SIGKILL}
CHANGES = {
  "train.num_steps": 6, "train.checkpoint_every": 2, "train.keep": 2,
  "evaluation.every": 3, "samples.every": 3,
}


def pytest_generate_tests(metafunc):
  """A test of faults runs once for each seed; `-k seed_03` runs one."""
  if "seed" in metafunc.fixturenames:
    ids = [f"seed_{seed:02d}" for seed in range(SEEDS)]
    metafunc.parametrize("seed", range(SEEDS), ids=ids)


def pytest_terminal_summary(terminalreporter):
  """Prints the table of what was done to runs and how it went."""
  outcomes = []
  for status in ("passed", "failed", "error"):
    for report in terminalreporter.stats.get(status, ()):
      said = dict(getattr(report, "user_properties", ()))
      if "kind" in said and (report.when == "call" or status == "error"):
        failed = status != "passed"
        outcomes.append((said["kind"], "failed" if failed else said["outcome"]))
  if outcomes:
    terminalreporter.section("faults")
    for line in table.rows(outcomes):
      terminalreporter.line(line)


class Case:
  """One fault on one run: draws, runs, comparisons, and how it went."""

  def __init__(self, zygote, folder, reference=None, note=lambda name, value: None):
    self._zygote, self.folder, self._reference, self._note = zygote, folder, reference, note
    self.workdir = folder / "run"
    self.rng = random.Random()
    self.env = {}

  def begin(self, kind, seed):
    """Names the kind and seeds all draws; returns their source."""
    self._note("kind", kind)
    self.rng.seed(f"{kind}/{seed}")
    return self.rng

  def copy(self, before):
    """Makes the workdir a copy of another."""
    shutil.copytree(before, self.workdir)

  def has(self, name):
    return (self.workdir / name).exists()

  def run(self, *plants, changes=None, recipe=TINY):
    """Runs until it ends."""
    arguments = [f"--config={recipe}", f"--workdir={self.workdir}"]
    merged = {**CHANGES, **(changes or {})}
    arguments += [f"--config.{path}={value}" for path, value in merged.items()]
    return self._zygote.start(self.folder, arguments, plants, self.env).wait()

  def hit(self, phase, before=None, also=(), **options):
    """Kills a run at a drawn moment of `phase`; draws again should it come too late."""
    for _ in range(8):
      if before is not None:
        self.copy(before)
      kill = {**KILL, "at": points.draw(phase, self.rng)}
      ended = self.run(*also, kill, **options)
      if ended.code == -signal.SIGKILL:
        return
      assert ended.code in (0, 3), ended
      shutil.rmtree(self.workdir)
    raise AssertionError(f"no moment of {phase} was met")

  def recover(self, torn=False, **options):
    """Runs the same command to its end, which must be that of the undisturbed run."""
    ended = self.run(**options)
    assert ended.code == 0, ended
    assert "Traceback" not in ended.err, ended.err
    assert runs.left_behind(self.workdir, torn) == runs.left_behind(self._reference)
    self.recovered()
    return ended

  def recovered(self):
    self._note("outcome", "recovered")

  def end_as_stated(self):
    self._note("outcome", "ended as stated")


@pytest.fixture(scope="session")
def zygote():
  server = runs.Zygote(HOME, pathlib.Path(jax.config.jax_compilation_cache_dir))
  yield server
  server.close()


@pytest.fixture(scope="session")
def undisturbed_by(zygote, tmp_path_factory):
  """Returns a function that returns the workdir of a run that nothing happened to."""

  def whole(**options):
    case = Case(zygote, tmp_path_factory.mktemp("undisturbed"))
    ended = case.run(**options)
    assert ended.code == 0, ended
    return case.workdir

  return whole


@pytest.fixture(scope="session")
def undisturbed(undisturbed_by):
  return undisturbed_by()


@pytest.fixture(scope="session")
def break_off(zygote, tmp_path_factory):
  """Returns a function that returns the workdir of a run killed before its last save.

  Steps 2 and 4 are saved, and there are the lines of all steps.
  """

  def broken(**options):
    case = Case(zygote, tmp_path_factory.mktemp("broken_off"))
    ended = case.run({**KILL, "at": points.before(f"{points.STORE}.write", 3)}, **options)
    assert ended.code == -signal.SIGKILL, ended
    assert runs.steps_saved(case.workdir) == [2, 4]
    return case.workdir

  return broken


@pytest.fixture(scope="session")
def broken_off(break_off):
  return break_off()


@pytest.fixture
def case(zygote, tmp_path, record_property, undisturbed):
  return Case(zygote, tmp_path, undisturbed, record_property)


@pytest.fixture
def twin(zygote, tmp_path):
  """Returns another run, which nobody kills."""
  folder = tmp_path / "twin"
  folder.mkdir()
  return Case(zygote, folder)
