"""Whole runs of a few steps, in this process."""

import dataclasses
import errno
import json
import shutil
import types

import jax
import numpy as np
import pytest

from jaxmoe.checkpoint import STORES
from jaxmoe.core.errors import CheckpointError, InputError, NotFiniteError
from jaxmoe.core.layout import one_device
from jaxmoe.cost.host import HostMemory
from jaxmoe.data.corpus import open_corpus
from jaxmoe.moe.layer import MoESums
from jaxmoe.moe.routing import RouterSums
from jaxmoe.optim import Constant
from jaxmoe.parallel import Parallel, make_layout
from jaxmoe.runs.recipe_loading import load_recipe
from jaxmoe.train import changed_definitions, rollback, run_setup
from jaxmoe.train import step as train_step
from jaxmoe.train.append_file import AppendFile
from jaxmoe.train.experiment import Experiment, Recovery
from jaxmoe.train.run_options import RunResult
from jaxmoe.train.saver import MAX_FAILED_SAVES, Saver
from jaxmoe.train.trainer import Trainer
from jaxmoe.train.workdir import Workdir

STEPS = 6
COMPILED_STEP = Trainer.compiled_step
OVERRIDES = {
  "model.dim": 16, "data.seq_len": 32, "train.num_steps": STEPS, "train.checkpoint_every": 2,
  "evaluation.every": 3, "evaluation.max_bytes": 200, "samples.every": 2, "samples.max_tokens": 4,
}  # fmt: skip


def recipe(**train):
  overrides = [f"--config.{path}={value}" for path, value in OVERRIDES.items()]
  made = load_recipe("configs/tiny.py", overrides)
  optim = dataclasses.replace(made.optim, schedule=Constant(warmup_steps=2))
  return dataclasses.replace(made, optim=optim, train=dataclasses.replace(made.train, **train))


@pytest.fixture(scope="module")
def corpus():
  return open_corpus(recipe().data)


@pytest.fixture(scope="module", autouse=True)
def _compiled_once():
  """Equal models share one decoder and step, and so what was compiled; no peak is measured."""
  decoders, decoder = {}, Experiment.decoder
  steps = {}
  with pytest.MonkeyPatch.context() as patch:

    def shared(self, *layout, **how):
      if self.model not in decoders:
        decoders[self.model] = decoder(self, *layout, **how)
      return decoders[self.model]

    def shared_step(self, state, batch):
      # The schedule is constant: how many steps there are changes nothing.
      seed = self.experiment.train.seed
      key = dataclasses.replace(self.experiment, train=recipe(seed=seed).train)
      if key not in steps:
        steps[key] = COMPILED_STEP(self, state, batch)
      return steps[key]

    patch.setattr(Experiment, "decoder", shared)
    patch.setattr(Trainer, "compiled_step", shared_step)
    patch.setattr(run_setup, "kept_peak", lambda dtype, folder: 1e12)
    yield


@pytest.fixture(scope="module")
def train(corpus):
  """Returns a function (folder, stop_at, corpus, **fields of Train) that trains in a folder."""

  def run(folder, stop_at=None, corpus=corpus, **fields):
    workdir, experiment, lines = Workdir(folder), recipe(**fields), folder / "metrics.jsonl"
    done = lines.read_bytes().count(b"\n") if lines.exists() else 0
    asked = iter(range(done + 1, 100))
    try:
      made = Trainer(experiment, workdir, corpus, one_device())
      return made.fit(lambda: next(asked) == stop_at)
    finally:
      workdir.release()

  return run


def rows(path):
  return [json.loads(text) for text in path.read_text().splitlines()]


def events(folder, kind):
  return [event for event in rows(folder / "events.jsonl") if event["event"] == kind]


def outcome(folder):
  """Returns what must be equal between runs that are the same."""
  lines = rows(folder / "metrics.jsonl")
  for line in lines:
    assert line.pop("time")["seconds"]["step"] > 0
  return lines, events(folder, "done")[-1]["digest"], (folder / "samples.md").read_bytes()


@pytest.fixture(scope="module")
def straight(train, tmp_path_factory):
  """The folder of a run that nothing disturbed."""
  folder = tmp_path_factory.mktemp("straight")
  assert train(folder) == RunResult(STEPS, done=True)
  return folder


@pytest.fixture(scope="module")
def stopped(train, tmp_path_factory):
  """The folder of a run that was asked to stop at step 5, with checkpoints at 2, 4 and 5."""
  folder = tmp_path_factory.mktemp("stopped")
  assert train(folder, stop_at=5) == RunResult(5, done=False)
  return folder


@pytest.fixture
def again(stopped, tmp_path):
  """A copy of the stopped run."""
  return shutil.copytree(stopped, tmp_path / "again")


def test_a_stall_tells_the_memory_that_is_left_within_the_limits_of_the_groups(
  corpus, tmp_path, monkeypatch
):
  told = {}
  monkeypatch.setattr(
    run_setup.host, "memory", lambda: HostMemory(600 << 20, 100 << 20, grouped=True)
  )
  monkeypatch.setattr(run_setup, "dump_and_end", lambda *given: told.update(given=given))
  observers = run_setup.make_observers(recipe(), Workdir(tmp_path), corpus, None)
  observers.watchdog._stalled("step 7", 9.0)
  _, line, tell = told["given"]
  tell()
  assert "after: step 7; memory: 0.1 GB of 0.6 GB free (the limit of this control group)" in line
  assert events(tmp_path, "stalled")[0]["time"]["free_bytes"] == 100 << 20


def test_virtual_devices_have_the_peak_of_their_machine_once(straight):
  assert run_setup.num_peaks(one_device()) == 1
  assert run_setup.num_peaks(make_layout(Parallel(data=8), jax.devices())) == 1
  (compiled,) = events(straight, "compiled")
  assert compiled["time"]["peak_flops_per_s"] == 1e12


def test_a_run_leaves_what_it_should(straight):
  lines, _, samples = outcome(straight)
  assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
  assert [line["step"] for line in lines if "eval" in line] == [3, 6]
  assert samples.count(b"## step ") == 4
  assert samples.startswith(b"## step 0\n")
  assert sorted(path.name for path in (straight / "checkpoints").iterdir()) == ["2", "4", "6"]
  assert set(lines[0]["layers"]) == {"0", "1"}
  assert lines[0]["tokens"] == 4 * 32
  assert [event["event"] for event in rows(straight / "events.jsonl")] == [
    "process", "start", "compiled", "kernels", "checkpoint", "checkpoint", "checkpoint", "done"
  ]  # fmt: skip


def test_the_same_run_twice_is_the_same_to_the_last_bit(train, straight, tmp_path):
  train(tmp_path)
  assert outcome(tmp_path) == outcome(straight)


def test_another_seed_is_another_run(train, straight, tmp_path):
  train(tmp_path, seed=1, num_steps=2)
  assert rows(tmp_path / "metrics.jsonl")[0]["loss"] != rows(straight / "metrics.jsonl")[0]["loss"]


def test_a_run_that_was_stopped_goes_on_as_if_it_had_not_been(train, straight, again):
  assert events(again, "stopped")[0]["step"] == 5
  train(again)
  assert outcome(again) == outcome(straight)
  assert events(again, "resume")[0]["step"] == 5


def test_a_run_may_be_stopped_again_and_again(train, straight, tmp_path):
  for step in (1, 3, 4):
    assert train(tmp_path, stop_at=step) == RunResult(step, done=False)
  train(tmp_path)
  assert outcome(tmp_path) == outcome(straight)
  assert len(events(tmp_path, "start")) == 1


def test_a_definition_mended_since_the_checkpoint_is_told_once(train, again, monkeypatch, capsys):
  monkeypatch.setitem(changed_definitions.MENDED, "sums", lambda decoder: "sums are sums")
  monkeypatch.setitem(changed_definitions.MENDED, "others", lambda decoder: "")
  train(again)
  train(again, num_steps=STEPS + 1)
  (event,) = events(again, "mended")
  assert (event["step"], event["definition"], event["what"]) == (5, "sums", "sums are sums")
  assert capsys.readouterr().out.count("from step 5 on, sums are sums") == 1


def test_lines_and_samples_after_the_checkpoint_are_written_again(train, straight, again):
  """What a run leaves that is killed after its last checkpoint."""
  shutil.rmtree(again / "checkpoints" / "5")
  with open(again / "metrics.jsonl", "a") as file:
    file.write('{"step":6,"loss":9.0,"time":{}}\n{"step":7,"lo')
  with open(again / "samples.md", "a") as file:
    file.write("## step 6\n\n```text\nnot this\n```\n\n")
  (again / "tokenizer.json").unlink()
  train(again)
  assert (again / "tokenizer.json").read_bytes() == (straight / "tokenizer.json").read_bytes()
  assert outcome(again) == outcome(straight)
  assert events(again, "resume")[0]["step"] == 4


def test_a_run_killed_before_its_first_checkpoint_starts_with_empty_files(
  train, straight, tmp_path
):
  for name in ("metrics.jsonl", "samples.md"):
    (tmp_path / name).write_bytes((straight / name).read_bytes())
  train(tmp_path)
  assert outcome(tmp_path) == outcome(straight)


def test_a_damaged_newest_checkpoint_is_named_and_the_run_still_ends_equal(train, straight, again):
  flip_bits(again / "checkpoints" / "5")
  train(again)
  assert outcome(again) == outcome(straight)
  (aside,) = events(again, "set_aside")
  assert aside["step"] == 5
  assert events(again, "resume")[0]["step"] == 4
  assert (again / "checkpoints" / "5.damaged").is_dir()


def test_no_intact_checkpoint_ends_the_run_instead_of_starting_anew(train, again):
  for path in (again / "checkpoints").iterdir():
    flip_bits(path)
  before = (again / "metrics.jsonl").read_bytes()
  for _ in range(2):
    with pytest.raises(CheckpointError, match="no intact checkpoint"):
      train(again)
  assert (again / "metrics.jsonl").read_bytes() == before


def flip_bits(checkpoint):
  largest = max((path for path in checkpoint.rglob("*") if path.is_file()), key=_size)
  raw = bytearray(largest.read_bytes())
  for quarter in (1, 2, 3):  # a bit of what nothing reads any more changes nothing
    raw[quarter * len(raw) // 4] ^= 4
  largest.write_bytes(raw)


def _size(path):
  return path.stat().st_size


def test_more_steps_go_on_where_fewer_ended(train, straight, tmp_path):
  """The last step of the shorter run was sampled besides."""
  assert train(tmp_path, num_steps=3) == RunResult(3, done=True)
  assert train(tmp_path) == RunResult(STEPS, done=True)
  assert outcome(tmp_path)[:2] == outcome(straight)[:2]
  assert outcome(tmp_path)[2].count(b"## step ") == outcome(straight)[2].count(b"## step ") + 1


def test_a_run_that_is_done_does_nothing_more(train, straight):
  before = outcome(straight)
  assert train(straight) == RunResult(STEPS, done=True)
  assert outcome(straight) == before
  assert len({event["digest"] for event in events(straight, "done")}) == 1


class OtherTokenizer:
  """Like the tokenizer of bytes, but saved otherwise."""

  def __init__(self, real):
    self._real = real

  def __getattr__(self, name):
    return getattr(self._real, name)

  def save(self, path):
    path.write_text('{"kind": "another"}')


def test_the_data_of_another_corpus_is_refused_and_the_run_stays_as_it_was(train, corpus, again):
  part = corpus.data.parts[0]
  fewer = dataclasses.replace(part, source=dataclasses.replace(part.source, num_documents=300))
  other = open_corpus(dataclasses.replace(corpus.data, parts=(fewer, *corpus.data.parts[1:])))
  other.tokenizer = OtherTokenizer(other.tokenizer)
  before = {path: path.read_bytes() for path in again.rglob("*") if path.is_file()}
  with pytest.raises(InputError, match=r"train\.documents: 390 -> 2"):
    train(again, corpus=other)
  assert {path: path.read_bytes() for path in again.rglob("*") if path.is_file()} == before


def test_the_step_is_compiled_once_and_donates_its_state(train, tmp_path, monkeypatch):
  compiled, real = [], COMPILED_STEP

  def watched(self, state, batch):
    step = real(self, state, batch)
    compiled.append(step)

    def run(state, batch):
      new = step(state, batch)
      assert any(leaf.is_deleted() for leaf in jax.tree.leaves(state.params))
      return new

    return run

  monkeypatch.setattr(Trainer, "compiled_step", watched)
  train(tmp_path, num_steps=3, checkpoint_every=100)
  (step,) = compiled
  # Compiled ahead of time: it has no cache to grow, and refuses other shapes.
  assert isinstance(step, jax.stages.Compiled)


def test_what_is_frozen_keeps_its_buffers_in_the_step_of_a_run_and_other_layers_move(
  corpus, tmp_path, monkeypatch
):
  overrides = [f"--config.{path}={value}" for path, value in OVERRIDES.items()]
  overrides.append("--config.optim.frozen=layers/0/moe/router/*")
  frozen = load_recipe("configs/tiny.py:router=aux_free", overrides)
  made, given = Trainer(frozen, Workdir(tmp_path / "run"), corpus, one_device()), []

  def still(*parts):  # a step that compiles at once
    given.append(parts[5])
    return lambda state, batch: (state, {})

  monkeypatch.setattr(train_step, "TrainStep", still)
  COMPILED_STEP(made, made.spec.shapes, {})
  params = jax.tree.map(lambda leaf: np.ones(leaf.shape, leaf.dtype), made.decoder.shapes)
  each, one = np.float32([[3, 1, 0, 0]] * 2), np.float32([2, 2])
  sums = MoESums(RouterSums(each, each, one, one, one, each, one), {})
  after = given[0](
    params, jax.tree.map(lambda leaf: leaf + 1, params), {"0": {"0": sums}}, {"0": {"0": None}}
  )
  router = after["stack"]["0"]["0"]["moe"]["router"]
  rate = frozen.model.stack[0].pattern[0].ffn.router.bias_rate
  moved = np.float32([[0] * 4, [-rate, 0, rate, rate]])
  np.testing.assert_allclose(router["buffers"]["bias"], 1 + moved, rtol=1e-6)


def test_a_trainer_refuses_what_would_fail_on_the_way_before_it_writes(corpus, tmp_path):
  tiny = recipe()
  samples = dataclasses.replace(tiny.samples, prompts=("short", "x" * 32))
  steps = dataclasses.replace(tiny.train, num_steps=1)
  for wrong, why in (
    (dataclasses.replace(tiny, samples=samples), "samples.prompts"),
    (dataclasses.replace(tiny, train=steps), "warm-up"),
  ):
    with pytest.raises(InputError, match=why):
      Trainer(wrong, Workdir(tmp_path / "run"), corpus, one_device())
  assert list(tmp_path.iterdir()) == []


class Store:
  """A store in which the n-th write fails, at once or later in the background."""

  def __init__(self, fails, later):
    self.fails, self.later = fails, later
    self.tried, self.kept, self._under_way = 0, [], None

  def write(self, step, arrays, record):
    self.wait()
    self.tried += 1
    if self.tried not in self.fails:
      self._under_way = step
    elif self.later:
      self._under_way = -step
    else:
      raise CheckpointError(f"no space for {step}")

  def wait(self):
    step, self._under_way = self._under_way, None
    if step is not None and step < 0:
      raise CheckpointError(f"no space for {-step}")
    if step is not None:
      self.kept.append(step)

  def steps(self):
    return self.kept

  def unremoved(self):
    return {}


@pytest.fixture
def saver_of(observers):
  """Returns a function from a store to (saver, the events it writes)."""

  def make(store):
    saver = Saver(
      experiment=recipe(),
      corpus=types.SimpleNamespace(identity={}),
      spec=types.SimpleNamespace(to_arrays=lambda state: {}),
      store=store,
      stream=types.SimpleNamespace(state=dict),
      observers=observers,
    )
    return saver, observers.log.seen

  return make


@pytest.mark.parametrize("later", [False, True], ids=["at once", "in the background"])
def test_three_failing_saves_in_a_row_end_the_run(saver_of, later):
  saver, seen = saver_of(Store(fails=range(2, 99), later=later))
  with pytest.raises(CheckpointError, match="no space"):
    for step in range(1, 9):
      saver(step, None)
  assert [event["step"] for event in seen if event["event"] == "save_failed"] == [2, 3, 4]
  assert len(seen) <= MAX_FAILED_SAVES * 2 + 1


@pytest.mark.parametrize("later", [False, True], ids=["at once", "in the background"])
def test_saves_that_fail_now_and_then_do_not(saver_of, later):
  saver, seen = saver_of(Store(fails=(1, 2, 4, 5, 7), later=later))
  for step in range(1, 10):
    saver(step, None)
  assert [event["step"] for event in seen if event["event"] == "save_failed"] == [1, 2, 4, 5, 7]


@pytest.mark.parametrize("later", [False, True], ids=["at once", "in the background"])
@pytest.mark.parametrize("fails", [(2,), (3,), (2, 3), (3, 4)])
def test_a_run_does_not_end_before_its_last_step_is_kept(saver_of, fails, later):
  store = Store(fails, later)
  saver, _ = saver_of(store)
  for step in (1, 2, 3):
    saver(step, None)
  saver.finish(3, None)
  assert store.kept[-1] == 3


@pytest.mark.parametrize("later", [False, True], ids=["at once", "in the background"])
def test_a_last_step_that_cannot_be_kept_is_an_error(saver_of, later):
  saver, _ = saver_of(Store(range(1, 99), later))
  saver(3, None)
  with pytest.raises(CheckpointError, match="no space for 3"):
    saver.finish(3, None)


def test_a_run_writes_the_store_its_recipe_names_and_goes_on_from_it(train, straight, tmp_path):
  train(tmp_path, stop_at=3, store="npz")
  assert list((tmp_path / "checkpoints").glob("*/arrays.npz"))
  assert not list((tmp_path / "checkpoints").glob("*/label"))
  with pytest.raises(InputError, match="store"):
    train(tmp_path)
  assert train(tmp_path, store="npz") == RunResult(STEPS, done=True)
  assert outcome(tmp_path) == outcome(straight)


def test_saving_that_fails_ends_a_run_with_its_lines_written(train, tmp_path, monkeypatch):
  def full(self, step, arrays, record):
    raise CheckpointError("no space")

  monkeypatch.setattr(STORES["orbax"][0], "write", full)
  with pytest.raises(CheckpointError, match="no space"):
    train(tmp_path, checkpoint_every=1)
  assert [line["step"] for line in rows(tmp_path / "metrics.jsonl")] == [1, 2, 3]
  assert [event["step"] for event in events(tmp_path, "save_failed")] == [1, 2, 3]


@pytest.fixture
def poison(monkeypatch):
  """Returns a function (seen -> bool) after which batches with these numbers hold no token id."""

  def make(bad):
    real, drawn = Trainer.next_batch, []

    def draw(self):
      batch, data = real(self)
      drawn.append(data["batches"])
      if bad(data["batches"]):
        batch["ids"] = batch["ids"] * 0 + 10**6
      return batch, data

    monkeypatch.setattr(Trainer, "next_batch", draw)
    return drawn

  return make


def test_bad_batches_take_the_run_back_to_a_checkpoint_and_it_goes_on_with_others(
  train, straight, tmp_path, poison
):
  drawn = poison(lambda number: number in (5, 6))
  recovery = Recovery(patience=2, skip_batches=3)
  assert train(tmp_path, recovery=recovery) == RunResult(STEPS, done=True)
  (rollback,) = events(tmp_path, "rollback")
  assert rollback["time"].pop("lost_s") > 0
  assert {**rollback, "time": {}} == {
    "event": "rollback", "step": 6, "to": 4, "skipped_batches": 3, "why": "not finite", "time": {}
  }  # fmt: skip
  assert [event["step"] for event in events(tmp_path, "skipped")] == [5, 6]
  # Batches 7 to 9 were left out.
  assert drawn == [1, 2, 3, 4, 5, 6, 10, 11]
  lines, _, samples = outcome(tmp_path)
  assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
  assert lines[:4] == outcome(straight)[0][:4]
  assert all(line["loss"] is not None and line["skipped"] == 0 for line in lines)
  assert samples.count(b"## step 6") == 1


def test_a_run_that_is_stopped_on_the_way_back_ends_up_the_same(train, tmp_path, poison):
  poison(lambda number: number in (5, 6))
  recovery = Recovery(patience=2)
  train(tmp_path / "whole", recovery=recovery)
  for stop in (5, 6):
    train(tmp_path / str(stop), stop_at=stop, recovery=recovery)
    train(tmp_path / str(stop), recovery=recovery)
    assert outcome(tmp_path / str(stop)) == outcome(tmp_path / "whole")


def test_a_rollback_that_does_not_help_is_followed_by_one_to_an_older_step(
  train, straight, tmp_path, poison
):
  poison(lambda number: 5 <= number < 10)
  recovery = Recovery(patience=2, skip_batches=1)
  train(tmp_path, recovery=recovery)
  went = [(event["step"], event["to"]) for event in events(tmp_path, "rollback")]
  assert went == [(6, 4), (6, 2)]
  lines, _, _ = outcome(tmp_path)
  assert lines[:2] == outcome(straight)[0][:2]
  assert all(line["loss"] for line in lines)


def test_without_a_checkpoint_the_run_goes_back_to_its_start(train, tmp_path, poison):
  poison(lambda number: number == 1)
  train(tmp_path, recovery=Recovery(patience=1))
  assert [event["to"] for event in events(tmp_path, "rollback")] == [0]
  assert all(line["loss"] for line in outcome(tmp_path)[0])


def test_a_run_made_of_another_does_not_go_back_to_random_parameters(
  train, tmp_path, poison, monkeypatch
):
  poison(lambda number: number in (3, 4))
  monkeypatch.setattr(rollback, "was_made", lambda events: True)
  with pytest.raises(CheckpointError, match="go back to step 0, with which it was made"):
    train(tmp_path, recovery=Recovery(patience=2), checkpoint_every=9)


@pytest.mark.parametrize(
  ("raised", "words"),
  [
    (OSError(errno.EIO, "Input/output error", "/mnt/texts/a"), "/mnt/texts/a: Input/output error"),
    (MemoryError("Unable to allocate 5 TiB"), r"not enough memory \(Unable to allocate 5 TiB\)"),
  ],
)
def test_what_the_machine_refuses_is_one_line_and_an_event(
  train, tmp_path, monkeypatch, raised, words
):
  def refuse(*arguments):
    raise raised

  monkeypatch.setattr(Trainer, "next_batch", refuse)
  with pytest.raises(InputError, match=words):
    train(tmp_path)
  assert events(tmp_path, "failed")[0]["code"] == 2


def test_rollbacks_over_the_budget_end_the_run_with_one_line(train, tmp_path, poison):
  poison(lambda number: number > 3)
  recovery = Recovery(patience=1, max_rollbacks=2)
  with pytest.raises(NotFiniteError, match="2 rollbacks are allowed"):
    train(tmp_path, recovery=recovery)
  (failed,) = events(tmp_path, "failed")
  assert failed["code"] == 3 and "step" in failed["why"]
  assert len(events(tmp_path, "rollback")) == 2


def test_a_disk_that_refuses_lines_for_a_while_is_told_and_leaves_the_same_files(
  train, straight, tmp_path, monkeypatch
):
  real, refused = AppendFile._write, iter(range(100))

  def full(self, data):
    if self.path.name == "metrics.jsonl" and 2 <= next(refused) < 6:
      raise OSError(28, "No space left on device")
    real(self, data)

  monkeypatch.setattr(AppendFile, "_write", full)
  train(tmp_path)
  assert outcome(tmp_path) == outcome(straight)
  assert events(tmp_path, "save_failed") and events(tmp_path, "journal_late")


def test_trouble_with_the_data_is_told_and_stands_in_the_events(observers):
  observers.slow("code", "a.py", 7.04)
  observers.unread("code", "a.py", "Input/output error")
  observers.worker("died", 2)
  assert observers.log.seen == [
    {"event": "data_slow", "domain": "code", "document": "a.py"},
    {"event": "data_retry", "domain": "code", "document": "a.py", "why": "Input/output error"},
    {"event": "data_worker", "what": "died", "restarts": 2},
  ]
  assert len(observers.display.said) == 3 and "a.py" in observers.display.said[0]


def test_a_run_whose_batches_come_from_another_process_is_the_same(straight, train, tmp_path):
  """The workdirs of both may go on with the other."""
  data = dataclasses.replace(recipe().data, worker="process")
  experiment, workdir = dataclasses.replace(recipe(), data=data), Workdir(tmp_path)
  try:
    made = Trainer(experiment, workdir, open_corpus(data), one_device())
    asked = iter(range(1, 100))
    assert made.fit(lambda: next(asked) == 3) == RunResult(3, done=False)
  finally:
    workdir.release()
  train(tmp_path)
  assert outcome(tmp_path) == outcome(straight)


def test_a_disk_that_refuses_the_last_event_ends_the_run_with_one_line_and_it_goes_on(
  train, straight, tmp_path, monkeypatch
):
  real = AppendFile._write

  def refuse(self, data):
    if b'"event":"done"' in data:
      raise OSError(30, "Read-only file system")
    real(self, data)

  with monkeypatch.context() as patch:
    patch.setattr(AppendFile, "_write", refuse)
    with pytest.raises(CheckpointError, match=r"last lines cannot be written.*Read-only"):
      train(tmp_path)
  assert train(tmp_path) == RunResult(STEPS, done=True)
  assert outcome(tmp_path) == outcome(straight)
