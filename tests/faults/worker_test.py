"""The process that makes batches may die or stop; it never outlives the run."""

import pathlib
import signal
import time

import pytest

from tests.faults import points, runs

WITH_WORKER = {
  "data.worker": "process", "data.seq_len": 128, "train.batch_size": 32, "train.num_steps": 10,
}
WATCH = {"do": "watch_worker", "stall_s": 1.0}
NEXT = points.Place("jaxmoe.data.stream:BatchStream.__next__", calls=4)
BEGIN = points.Place("jaxmoe.data.worker_client:WorkerClient.take", within_s=1.0)
SIGNALS = {
  "data_worker_killed": (signal.SIGKILL, "died"), "data_worker_stopped": (signal.SIGSTOP, "stalled")
}


@pytest.fixture(scope="module")
def with_thread(undisturbed_by):
  """Returns what a run leaves whose batches are made by a thread."""
  return undisturbed_by(changes={**WITH_WORKER, "data.worker": "thread"})


def compare(case, with_thread):
  """The runs are equal but for the field that says who makes the batches."""
  mine, others = runs.left_behind(case.workdir), runs.left_behind(with_thread)
  assert {**mine, "config": ""} == {**others, "config": ""}
  case.recovered()


def living(marker):
  """Returns the processes in whose environment `marker` stands."""
  found = []
  for path in pathlib.Path("/proc").glob("[0-9]*/environ"):
    try:
      if marker.encode() in path.read_bytes():
        found.append(int(path.parent.name))
    except OSError:
      continue
  return found


@pytest.mark.slow
@pytest.mark.parametrize("kind", SIGNALS)
def test_a_run_outlives_its_data_worker(case, with_thread, kind, seed):
  rng = case.begin(kind, seed)
  number, what = SIGNALS[kind]
  hits = [{"do": "shoot_worker", "number": number, "at": place.draw(rng)}
          for place in (rng.choice((NEXT, BEGIN)), NEXT)[: rng.randint(1, 2)]]  # fmt: skip
  ended = case.run(WATCH, *hits, changes=WITH_WORKER)
  assert ended.code == 0, ended
  told = runs.events(case.workdir, "data_worker")
  assert told and {event["what"] for event in told} == {what}
  compare(case, with_thread)


@pytest.mark.slow
def test_a_data_worker_ends_with_its_run(case, with_thread, seed):
  case.begin("sigkill_with_data_worker", seed)
  case.env = {"FAULT_CASE": str(case.folder)}
  marker = f"FAULT_CASE={case.folder}"
  case.hit(case.rng.choice(("step", "data", "save")), also=[WATCH], changes=WITH_WORKER)
  end = time.monotonic() + 30
  while living(marker) and time.monotonic() < end:
    time.sleep(0.1)
  assert not living(marker)
  assert case.run(changes=WITH_WORKER).code == 0
  compare(case, with_thread)
