"""Whole runs whose stages, or rows, lie over two processes: against one process, and back."""

import json
import shutil

import numpy as np
import pytest

pytestmark = pytest.mark.slow

STEPS = 6
CHANGES = (
  "train.num_micro=4",
  "train.batch_size=8",
  "evaluation.every=6",
  "samples.every=0",
  "parallel.data=1",
)
LAYOUTS = {  # processes, devices of each, what else differs
  "one": (1, 1, ()),
  "stages": (2, 1, ("parallel.pipe=2",)),
  "stages and experts": (2, 2, ("parallel.pipe=2", "parallel.expert=2")),
  "rows": (2, 1, ("parallel.context=2",)),
}
OTHERS = list(LAYOUTS)[1:]


def read(path):
  return [json.loads(line) for line in path.read_text().splitlines()]


def losses(workdir):
  return np.array([line["loss"] for line in read(workdir / "metrics.jsonl") if "loss" in line])


def last_digest(workdir):
  return [event for event in read(workdir / "events.jsonl") if event["event"] == "done"][-1][
    "digest"
  ]


def entries(workdir):
  """Returns name, shape and dtype of what the last checkpoint holds."""
  sealed = json.loads((workdir / "checkpoints" / str(STEPS) / "label" / "metadata").read_bytes())
  return {name: (entry["shape"], entry["dtype"]) for name, entry in sealed["arrays"].items()}


@pytest.fixture(scope="module")
def go(train_on):
  """Returns a function (layout's name, workdir) that trains there and returns the output."""

  def run(name, workdir):
    processes, devices, own = LAYOUTS[name]
    code, out, err = train_on(processes, devices, workdir, changes=(*CHANGES, *own))
    assert code == 0, (name, err)
    return out

  return run


@pytest.fixture(scope="module")
def runs(go, tmp_path_factory):
  """Returns the workdirs of a run on each of the layouts."""
  folder = tmp_path_factory.mktemp("stages")
  for name in LAYOUTS:
    go(name, folder / name)
  return folder


@pytest.mark.parametrize("name", OTHERS)
def test_losses_and_names_are_those_of_one_process(runs, name):
  one, other = losses(runs / "one"), losses(runs / name)
  assert len(one) == STEPS
  np.testing.assert_allclose(other, one, rtol=1e-5)
  assert entries(runs / name) == entries(runs / "one")


@pytest.mark.parametrize(
  ("writer", "reader"),
  [*((name, "one") for name in OTHERS), *(("one", name) for name in OTHERS),
   ("stages", "stages and experts"), ("stages and experts", "stages")],
)  # fmt: skip
def test_every_bit_that_one_saved_is_restored_by_the_other(runs, go, tmp_path, writer, reader):
  workdir = shutil.copytree(runs / writer, tmp_path / "run")
  assert "nothing to do" in go(reader, workdir)
  assert last_digest(workdir) == last_digest(runs / writer)


@pytest.mark.parametrize(("writer", "reader"), [("stages", "one"), ("one", "stages")])
def test_a_run_goes_on_over_more_or_fewer_processes(runs, go, tmp_path, writer, reader):
  workdir = shutil.copytree(runs / writer, tmp_path / "run")
  shutil.rmtree(workdir / "checkpoints" / str(STEPS))
  assert "going on from step 4" in go(reader, workdir)
  np.testing.assert_allclose(losses(workdir), losses(runs / "one"), rtol=1e-5)
