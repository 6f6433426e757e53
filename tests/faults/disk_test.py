"""A disk that is full or read-only: the run goes on loudly, and stops after three failed saves."""

import pytest

from tests.faults import disks, points, runs

KINDS = {"full_disk": ("fill", "free"), "read_only_disk": ("lock", "unlock")}
MEND = {"free": disks.free, "unlock": disks.unmount}
# Where a run has not begun to train, or has ended and only has to say so.
ENDS = (
  points.before("jaxmoe.train.workdir:Workdir.claim"),
  points.before("jaxmoe.train.trainer:Trainer._fit"),
  points.before("jaxmoe.train.run_setup:write_config_and_tokenizer"),
  points.before("jaxmoe.train.trainer:Trainer._end"),
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
  if seed % 5 in (1, 3):
    refused_for_a_while(case, disk, rng, spoil, mend)
    case.recover()
    return
  at = rng.choice(ENDS) if seed % 5 == 4 else moment(rng.randint(1, 5), rng)
  ended = case.run({"do": spoil, "folder": str(disk), "at": at})
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
  assert (f"going on from step {last}" in case.recover().out) == (last > 0)


def refused_for_a_while(case, disk, rng, spoil, mend):
  """Runs past a disk that refuses for a while; draws again if it was too short or too long."""
  for _ in range(8):
    line = rng.randint(1, 5)
    spoilt = {"do": spoil, "folder": str(disk), "at": moment(line, rng)}
    mended = {"do": mend, "folder": str(disk), "at": moment(rng.randint(line + 1, 6), rng)}
    ended = case.run(spoilt, mended)
    failed = ended.out.count("saving failed (")
    assert (ended.code, failed) == (4, 3) or ended.code == 0, ended
    if ended.code == 0 and "wait in memory, the run goes on" in ended.out:
      return
    disks.remove(disk)
    disks.make(disk, NUM_BYTES)
  raise AssertionError("no moment was met")


def moment(line, rng):
  """Returns a place at the writing of a line."""
  at = {"target": f"{points.RUN_LOG}.step", "call": line, "when": rng.choice(("before", "after"))}
  if rng.random() < 0.5:
    at["delay_s"] = round(rng.uniform(0.0, 0.003), 5)
  return at
