"""A disk that is full or read-only: the run goes on loudly, and stops after three failed saves."""

import pytest

from tests.faults import disks, points, runs

KINDS = {"full_disk": ("fill", "free"), "read_only_disk": ("lock", "unlock")}
MEND = {"free": disks.free, "unlock": disks.unmount}
# Where a run has not begun to train, or has ended and only has to say so.
ENDS = (
  points.before("jaxmoe.train.workdir:Workdir.claim"),
  points.before("jaxmoe.train.session:Session._train"),
  points.before("jaxmoe.train.session:Session._write_files"),
  points.before("jaxmoe.train.session:Session._end"),
)
NUM_BYTES = 6 << 20


@pytest.fixture
def disk(case, tmp_path):
  """Returns a small disk with the workdir on it."""
  if not disks.can_mount(tmp_path / "probe"):
    pytest.skip("mounting a small disk takes root, or a system that lets us")
  folder = tmp_path / "disk"
  disks.make(folder, NUM_BYTES)
  case.workdir = folder / "run"
  yield folder
  disks.remove(folder)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_run_outlives_a_disk_that_refuses(case, disk, kind, seed):
  rng = case.begin(kind, seed)
  spoil, mend = KINDS[kind]
  line = rng.randint(1, 5)
  at = rng.choice(ENDS) if seed % 5 == 4 else moment(line, rng)
  spoilt = {"do": spoil, "folder": str(disk), "at": at}
  if seed % 5 in (1, 3):
    mended = {"do": mend, "folder": str(disk), "at": moment(rng.randint(line + 1, 6), rng)}
    ended = case.run(spoilt, mended)
    assert ended.code == 0, ended
    assert "wait in memory, the run goes on" in ended.out
    case.recover()
    return
  ended = case.run(spoilt)
  if seed % 5 == 4 and ended.code == 0:  # the last lines still fitted in what the files had
    case.recover()
    return
  assert len(ended.err.splitlines()) == 1 and ended.err.startswith("error: "), ended.err
  if seed % 5 == 4:
    assert ended.code in (2, 4), ended
  else:
    assert ended.code == 4, ended
    assert ended.out.count("saving failed (") == 3
  MEND[mend](disk)
  last = [0, *runs.steps_saved(case.workdir)][-1]
  assert case.recover().out.count(f"going on from step {last}") == (0 < last < 6)


def moment(line, rng):
  """Returns a place at the writing of a line."""
  at = {"target": f"{points.JOURNAL}.step", "call": line, "when": rng.choice(("before", "after"))}
  if rng.random() < 0.5:
    at["delay_s"] = round(rng.uniform(0.0, 0.003), 5)
  return at
