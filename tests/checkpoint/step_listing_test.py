"""What lies in a folder of checkpoints is listed, verified and told apart, array by array."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from jaxmoe.checkpoint.manifest import DamagedStepError
from jaxmoe.checkpoint.npz_store import ARRAYS, NpzStore
from jaxmoe.checkpoint.orbax_store import OrbaxStore
from jaxmoe.checkpoint.step_difference import differences, record_differences
from jaxmoe.checkpoint.step_listing import HALF_WRITTEN, WHOLE, list_steps
from jaxmoe.status.checkpoint_lines import difference_line, step_lines


@pytest.fixture(params=[NpzStore, OrbaxStore])
def store(request, tmp_path):
  made = request.param(tmp_path / "checkpoints", keep=9)
  for step in (1, 5, 12):
    made.write(step, {"a": jnp.full((3, 2), step), "b": jnp.ones(4, jnp.bfloat16)}, {"step": step})
  made.wait()
  yield made
  made.close()


def test_whole_half_written_and_damaged_steps_are_listed_in_order(store):
  store.set_aside(5, "b is not\nwhat it was")
  (store.folder / "20.partial").mkdir()
  (store.folder / "notes").mkdir()
  one, five, twelve, twenty = list_steps(store)
  assert [x.step for x in (one, five, twelve, twenty)] == [1, 5, 12, 20]
  assert (one.state, one.num_arrays, one.num_bytes) == (WHOLE, 2, 4 * 6 + 2 * 4)
  assert one.bytes_on_disk > one.num_bytes
  assert (five.state, five.why, five.num_arrays) == ("damaged", "b is not\nwhat it was", None)
  assert (twenty.state, twenty.bytes_on_disk) == (HALF_WRITTEN, 0)
  lines = [*step_lines([one, five, twelve, twenty], one.written_unix_s + 90)]
  assert lines[1].split()[:2] == ["1", "2"] and lines[1].endswith("90 s ago  whole")
  assert lines[3].strip() == "b is not what it was"
  assert all(len(line) <= 80 for line in lines)


def test_a_step_whose_manifest_is_no_manifest_says_so(store):
  for path in store.folder.joinpath("5").rglob("*"):
    if path.name in ("manifest.json", "metadata"):
      path.write_text("{}")
  (five,) = (x for x in list_steps(store) if x.step == 5)
  assert five.num_arrays is None and "hash written with it" in five.why
  assert "unreadable" in "".join(step_lines([five], 0.0))


def test_a_changed_byte_is_found_in_its_array(tmp_path):
  store = NpzStore(tmp_path / "checkpoints")
  store.write(1, {"a": jnp.arange(999.0), "b": jnp.ones(4)}, {})
  path = store.folder / "1" / ARRAYS
  with np.load(path) as held:
    arrays = dict(held)
  arrays["a"][7] ^= 1
  np.savez(path, **arrays)
  reader = store.open_step(1)
  assert reader.read("b").tolist() == [1.0] * 4
  with pytest.raises(DamagedStepError, match="other values than were written in a"):
    reader.read("a")


def test_only_what_differs_is_read_and_by_how_much_is_told(tmp_path):
  one = NpzStore(tmp_path / "one")
  other = NpzStore(tmp_path / "other")
  same = {"same": jnp.arange(5.0)}
  one.write(1, {**same, "x": jnp.array([3.0, 4.0, 0.0]), "gone": jnp.ones(2), "s": jnp.ones(3)}, {})
  other.write(9, {**same, "x": jnp.array([3.0, 4.5, 0.0]), "s": jnp.ones((3, 1))}, {})
  readers, read = [store.open_step(step) for store, step in ((one, 1), (other, 9))], []

  def noted(reader):
    return lambda name: read.append(name) or reader.fetch(name)

  readers = [dataclasses.replace(reader, fetch=noted(reader)) for reader in readers]
  gone, shape, x = differences(*readers)
  assert read == ["x", "x"]
  assert gone.name == "gone" and gone.what.endswith("one/1")
  assert shape.what == "float32[3] and float32[3, 1]"
  assert (x.num_values, x.largest, x.relative) == (1, 0.5, 0.1)
  assert difference_line(x) == "x: 1 values differ, by 0.5 at most (relative norm 0.1)"


def test_places_of_records_that_differ_are_named():
  one = {"step": 1, "config": {"seed": 0, "same": [1]}, "only": None}
  other = {"step": 2, "config": {"seed": 1, "same": [1]}, "more": {"x": 1}}
  assert record_differences(one, other) == ["config.seed", "more", "step"]
