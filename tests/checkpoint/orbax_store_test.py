"""Damage of every kind on disk, failed and killed saves."""

import contextlib
import json
import logging
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmoe.checkpoint.digest import digest
from jaxmoe.checkpoint.manifest import DamagedStepError
from jaxmoe.checkpoint.orbax_store import OrbaxStore, quiet_orbax
from jaxmoe.checkpoint.read_error import read_error
from jaxmoe.checkpoint.store import read_latest
from jaxmoe.core.errors import CheckpointError, InputError


@pytest.fixture
def written(tmp_path, state, record, like_of):
  """The directory of one step, and what to ask the store for."""
  store = OrbaxStore(tmp_path / "checkpoints")
  store.write(1, state, record)
  store.close()
  return tmp_path / "checkpoints" / "1", like_of(state)


def read_or_name(step, like, state, same):
  """Reads a step: the arrays equal those saved, or damage is told on one line. True if damaged."""
  try:
    arrays, _ = OrbaxStore(step.parent).read(int(step.name), like)
  except DamagedStepError as error:
    assert str(step) in str(error) and "\n" not in str(error)
    return True
  assert same(arrays, state), "other values were read and nobody noticed"
  return False


def flip_bits(step, like, state, same, num_trials, seed):
  """Returns how many of the flips, one at a time in the array files, were noticed."""
  rng = np.random.default_rng(seed)
  files = [path for path in sorted((step / "arrays").rglob("*")) if path.is_file()]
  sizes = np.array([path.stat().st_size for path in files])
  damaged = 0
  for _ in range(num_trials):
    place = int(rng.integers(sizes.sum()))
    index = int(np.searchsorted(np.cumsum(sizes), place, side="right"))
    good = files[index].read_bytes()
    bad = bytearray(good)
    bad[place - int(sizes[:index].sum())] ^= 1 << int(rng.integers(8))
    files[index].write_bytes(bad)
    damaged += read_or_name(step, like, state, same)
    files[index].write_bytes(good)
  assert not read_or_name(step, like, state, same)
  return damaged


def test_a_flipped_bit_in_an_array_file_is_named_or_harmless(written, state, same):
  assert flip_bits(*written, state, same, num_trials=12, seed=0) > 0


@pytest.mark.slow
def test_a_hundred_flipped_bits_are_named_or_harmless(written, state, same):
  damaged = flip_bits(*written, state, same, num_trials=100, seed=1)
  print(f"{damaged} of 100 flips damaged the step, the others changed no value")
  assert damaged > 10


def test_a_changed_value_is_named_by_its_array(tmp_path, like_of):
  # Stored uncompressed by nobody's promise, so the values are changed through Orbax itself.
  state = {"params/a": jnp.ones(4), "params/b": jnp.ones(4), "params/c": jnp.ones(4)}
  changed = {**state, "params/b": state["params/b"].at[2].set(1.0000001)}
  for name, arrays in {"good": state, "bad": changed}.items():
    store = OrbaxStore(tmp_path / name)
    store.write(1, arrays, {})
    store.close()
  shutil.rmtree(tmp_path / "good" / "1" / "arrays")
  shutil.copytree(tmp_path / "bad" / "1" / "arrays", tmp_path / "good" / "1" / "arrays")
  with pytest.raises(DamagedStepError, match=r"other values than were written in params/b$"):
    OrbaxStore(tmp_path / "good").read(1, like_of(state))


def test_truncated_emptied_and_deleted_files_are_named_or_harmless(written, state, same, tmp_path):
  step, like = written
  damages = {
    "half": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "empty": lambda path: path.write_bytes(b""),
    "gone": lambda path: path.unlink() if path.is_file() else shutil.rmtree(path),
    "garbage": lambda path: path.write_bytes(os.urandom(path.stat().st_size)),
  }
  shutil.copytree(step, tmp_path / "good")
  noticed = {}
  for path in [path.relative_to(step) for path in sorted(step.rglob("*"))]:
    kinds = damages if (step / path).is_file() else ["gone"]
    for kind in kinds:
      damages[kind](step / path)
      noticed[str(path), kind] = read_or_name(step, like, state, same)
      shutil.rmtree(step)
      shutil.copytree(tmp_path / "good", step)
  for path, kind in [("label/metadata", kind) for kind in damages] + [("arrays", "gone")]:
    assert noticed[path, kind], (path, kind)
  assert any(hit and "/d/" in path for (path, _), hit in noticed.items())
  for path in step.iterdir():
    damages["gone"](path)
  assert read_or_name(step, like, state, same), "an emptied step"


def test_an_array_missing_from_the_table_of_the_files_is_named(written):
  step, like = written
  file = step / "arrays" / "_METADATA"
  table = json.loads(file.read_text())
  del table["tree_metadata"]["('params/int8',)"]
  file.write_text(json.dumps(table))
  with pytest.raises(DamagedStepError, match="1/arrays: params/int8 is missing"):
    OrbaxStore(step.parent).read(1, like)


def test_the_files_of_an_array_that_cannot_be_read_are_told_in_words(written):
  step, like = written
  for path in (step / "arrays" / "ocdbt.process_0" / "d").iterdir():
    path.write_bytes(path.read_bytes()[:7])
  with pytest.raises(DamagedStepError, match=r'OUT_OF_RANGE.*"params/') as caught:
    OrbaxStore(step.parent).read(1, like)
  assert "bound method" not in str(caught.value)


def test_a_reason_that_may_pass_is_no_damage_however_deep_it_lies(tmp_path):
  def raised(text):
    outer = Exception("Encountered error while reading array index: 0")
    outer.__cause__ = ValueError(text)
    return read_error(tmp_path, outer)

  assert type(raised("PERMISSION_DENIED: Error reading x")) is CheckpointError
  assert type(raised("OUT_OF_RANGE: Error reading x")) is DamagedStepError


def test_an_old_step_that_cannot_be_removed_fails_no_save_and_is_told_once(tmp_path, monkeypatch):
  real = shutil.rmtree

  def rmtree(path, *args, **options):
    if pathlib.Path(path).name == "1":
      raise PermissionError(1, "Operation not permitted", str(path))
    real(path, *args, **options)

  monkeypatch.setattr(shutil, "rmtree", rmtree)
  store = OrbaxStore(tmp_path, keep=1)
  for step in (1, 2, 3):
    store.write(step, {"x": jnp.ones(3)}, {})
    store.wait()
    told = store.unremoved()
    assert list(told) == [1] * (step == 2)
    assert all("Operation not permitted" in why for why in told.values())
  assert store.steps() == [1, 3], "it stays, and the next is removed all the same"
  store.close()


def test_a_folder_that_cannot_be_read_is_told(tmp_path, monkeypatch):
  def scandir(path):
    raise PermissionError(13, "Permission denied", str(path))

  monkeypatch.setattr(os, "scandir", scandir)
  for look in (OrbaxStore(tmp_path).steps, OrbaxStore(tmp_path).aside):
    with pytest.raises(CheckpointError, match=r"cannot be read \(Permission denied"):
      look()


@pytest.mark.parametrize(
  "tamper",
  [
    lambda label: label["record"].update(step=8),
    lambda label: label["record"]["data"]["state"].reverse(),
    lambda label: label["record"].pop("none"),
    lambda label: label["arrays"]["params/int8"]["digest"].reverse(),
    lambda label: label["arrays"].pop("params/int8"),
    lambda label: label["arrays"]["params/int8"].update(shape=[3, 8]),
    lambda label: label.update(sha256=label["sha256"][::-1]),
    lambda label: label.pop("sha256"),
    lambda label: label.update(more=1),
    lambda label: label.clear(),
  ],
)
def test_a_tampered_label_is_named(written, tamper):
  step, like = written
  label = json.loads((step / "label" / "metadata").read_text())
  tamper(label)
  (step / "label" / "metadata").write_text(json.dumps(label))
  with pytest.raises(DamagedStepError, match="label/metadata: the record does not have the hash"):
    OrbaxStore(step.parent).read(1, like)


def test_each_flipped_bit_of_the_label_is_named_or_harmless(written, state, record, same):
  step, like = written
  file = step / "label" / "metadata"
  good = file.read_bytes()
  rng = np.random.default_rng(0)
  for place in rng.integers(len(good), size=40):
    bad = bytearray(good)
    bad[place] ^= 1 << int(rng.integers(8))
    file.write_bytes(bad)
    try:
      arrays, read = OrbaxStore(step.parent).read(1, like)
    except DamagedStepError:
      continue
    assert same(arrays, state) and read == record


def test_the_newest_intact_step_is_found_behind_damaged_ones(tmp_path, like_of, same):
  store = OrbaxStore(tmp_path, keep=4)
  noise = jax.random.normal(jax.random.key(0), (64, 64))  # small arrays lie in Orbax's manifest
  states = {step: {"x": noise + step} for step in range(1, 5)}
  for step, arrays in states.items():
    store.write(step, arrays, {"step": step})
  store.wait()
  (tmp_path / "4" / "label" / "metadata").write_text("{}")
  shutil.rmtree(tmp_path / "3" / "arrays" / "ocdbt.process_0")
  told = []
  step, arrays, record = read_latest(store, like_of(states[1]), lambda *line: told.append(line))
  assert step == 2 and same(arrays, states[2]) and record == {"step": 2}
  assert [at for at, _ in told] == [4, 3]
  assert "4/label/metadata" in told[0][1] and "3/arrays" in told[1][1]
  assert store.steps() == [1, 2] and store.aside() == ["3.damaged", "4.damaged"]
  assert (tmp_path / "3.damaged" / "WHY.txt").read_text() == told[1][1] + "\n"
  store.write(3, states[3], {})
  store.wait()
  assert store.steps() == [1, 2, 3]
  store.close()


FULL_DISK = """
import pathlib, resource, sys
import jax, jax.numpy as jnp, numpy as np
from jaxmoe.checkpoint.orbax_store import OrbaxStore, quiet_orbax
from jaxmoe.core.errors import CheckpointError
quiet_orbax()
state = {str(i): jax.random.normal(jax.random.key(i), (2**14,)) for i in range(6)}
one = jax.sharding.SingleDeviceSharding(jax.devices()[0])
like = {k: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=one) for k, x in state.items()}
limits = resource.getrlimit(resource.RLIMIT_FSIZE)
for surfaces_in in ("wait", "write", "close"):
  path = pathlib.Path(sys.argv[1]) / surfaces_in
  store = OrbaxStore(path)
  store.write(1, state, {})
  store.wait()
  resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))
  store.write(2, state, {})
  try:
    store.write(3, state, {}) if surfaces_in == "write" else getattr(store, surfaces_in)()
    raise AssertionError("nothing was raised")
  except CheckpointError as error:
    assert "saving step 2 failed" in str(error) and chr(10) not in str(error), error
  resource.setrlimit(resource.RLIMIT_FSIZE, limits)
  assert store.steps() == [1]
  store.write(3, state, {})
  store.close()
  arrays, _ = OrbaxStore(path).read(3, like)
  assert all(np.array_equal(arrays[k], x) for k, x in state.items())
  # Orbax clears a failed save away, but a thread of it may still write there.
  whole = sorted(each.name for each in path.iterdir() if each.name.isdecimal())
  assert whole == ["1", "3"], "what failed never counts"
"""


def test_a_save_that_fails_on_a_full_disk_is_told_and_the_next_one_works(tmp_path):
  # In a process of its own: the limit holds for a whole process.
  env = {**os.environ, "PYTHONPATH": os.getcwd(), "JAX_PLATFORMS": "cpu"}
  done = subprocess.run(
    [sys.executable, "-c", FULL_DISK, tmp_path], env=env, capture_output=True, text=True
  )
  assert done.returncode == 0, done.stderr


def test_a_directory_that_cannot_be_made_is_told(tmp_path):
  (tmp_path / "file").write_text("")
  store = OrbaxStore(tmp_path / "file" / "checkpoints")
  assert store.steps() == [] and store.aside() == []
  with pytest.raises(CheckpointError, match="saving step 1 failed"):
    store.write(1, {"x": jnp.ones(3)}, {})
  store.close()


@pytest.mark.parametrize("error", [OSError(24, "too many files"), MemoryError(), "UNAVAILABLE: x"])
def test_a_reason_that_may_pass_sets_nothing_aside(written, monkeypatch, error):
  step, like = written

  def fail(*args, **kwargs):
    raise error if isinstance(error, Exception) else ValueError(error)

  monkeypatch.setattr("orbax.checkpoint.Checkpointer.restore", fail)
  store = OrbaxStore(step.parent)
  with pytest.raises(CheckpointError) as caught:
    read_latest(store, like, lambda *line: None)
  assert not isinstance(caught.value, DamagedStepError)
  assert store.steps() == [1] and store.aside() == []


def test_dtypes_the_files_cannot_hold_and_bad_numbers_are_refused(tmp_path):
  with pytest.raises(InputError, match="x: this store cannot hold uint4"):
    OrbaxStore(tmp_path / "a").write(1, {"x": jnp.ones(3, jnp.uint4)}, {})
  with pytest.raises(InputError, match="keep=0"):
    OrbaxStore(tmp_path / "a", keep=0)
  assert not (tmp_path / "a").exists()


def test_other_files_and_unfinished_saves_are_not_steps(tmp_path, like_of):
  for name in ["3.orbax-checkpoint-tmp", "04", "-1", "x", "²", "7.damaged"]:
    (tmp_path / name).mkdir()
  (tmp_path / "5").write_text("a file")
  store = OrbaxStore(tmp_path)
  assert store.steps() == [] and store.aside() == ["7.damaged"]
  store.write(6, {"x": jnp.ones(3)}, {})
  store.close()
  assert store.steps() == [6]
  assert not (tmp_path / "3.orbax-checkpoint-tmp").exists()


KILLED = """
import sys
import jax, jax.numpy as jnp
from jaxmoe.checkpoint.orbax_store import OrbaxStore
store = OrbaxStore(sys.argv[1])
like = lambda step: {f"params/{i}": jnp.full((1 << 18,), step + i / 64) for i in range(24)}
store.write(1, like(1), {"step": 1})
store.wait()
state = like(2)
print("go", flush=True)
store.write(2, state, {"step": 2})
store.wait()
print("done", flush=True)
"""


@pytest.mark.slow
def test_a_save_killed_at_any_time_leaves_an_intact_step(tmp_path, like_of, same):
  rng = np.random.default_rng(0)
  found: list[int] = []
  env = {**os.environ, "PYTHONPATH": os.getcwd(), "JAX_PLATFORMS": "cpu"}
  for trial in range(8):
    path = tmp_path / str(trial)
    child = subprocess.Popen(
      [sys.executable, "-c", KILLED, path], stdout=subprocess.PIPE, env=env, text=True
    )
    assert child.stdout.readline() == "go\n"
    with contextlib.suppress(subprocess.TimeoutExpired):
      child.wait(timeout=float(rng.uniform(0, 0.4)))  # a save takes about 0.3 s
    child.send_signal(signal.SIGKILL)
    child.wait()
    child.stdout.close()
    states = {
      step: {f"params/{i}": jnp.full((1 << 18,), step + i / 64) for i in range(24)}
      for step in (1, 2, 3)
    }
    store = OrbaxStore(path)
    step, arrays, record = read_latest(store, like_of(states[1]), lambda *line: found.append(line))
    assert same(arrays, states[step]) and record == {"step": step}
    found.append(step)
    store.write(3, states[3], {})
    store.close()
    left = sorted({1, step, 3})
    assert sorted(entry.name for entry in path.iterdir()) == [str(s) for s in left]
    assert digest(store.read(3, like_of(states[3]))[0]) == digest(states[3])
  print(f"after the kills these steps were the newest intact: {found}")
  assert set(found) <= {1, 2}, "a killed save looked like a whole one"


@pytest.mark.parametrize(
  ("error", "kept"),
  [
    (ValueError("RESOURCE_EXHAUSTED: no space [tensorstore_spec='{}']"), False),
    (ValueError('RESOURCE_EXHAUSTED: local file "run/6.orbax-checkpoint-tmp/d/2"'), False),
    (ValueError("another task of ours"), True),
  ],
)
def test_the_error_of_an_array_that_orbax_does_not_await_is_not_logged(error, kept):
  said = ("asyncio", logging.ERROR, "base_events.py", 1, "Future exception was never retrieved", ())
  record = logging.LogRecord(*said, (type(error), error, None))
  quiet_orbax()
  assert bool(logging.getLogger("asyncio").filter(record)) == kept


def test_a_directory_that_cannot_be_made_leaves_no_thread_that_waits(tmp_path, monkeypatch):
  """Such a thread would keep the process from ending."""
  before = set(threading.enumerate())
  store = OrbaxStore(tmp_path / "store")
  x = {"x": jnp.arange(3.0)}
  store.write(1, x, {})
  store.wait()
  with monkeypatch.context() as patch:
    patch.setattr(pathlib.Path, "mkdir", refuse)
    patch.setattr(os, "mkdir", refuse)
    with pytest.raises(CheckpointError, match="saving step 2 failed"):
      store.write(2, x, {})
      store.wait()
  store.close()
  for thread in set(threading.enumerate()) - before:
    if not thread.daemon:
      thread.join(20)
      assert not thread.is_alive(), thread


def refuse(*arguments, **options):
  raise OSError(30, "Read-only file system")
