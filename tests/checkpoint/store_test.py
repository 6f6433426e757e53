"""What every store promises, and how the newest intact step is found."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmoe.checkpoint import STORES, LazyArray
from jaxmoe.checkpoint.manifest import DamagedStepError
from jaxmoe.checkpoint.store import read_latest
from jaxmoe.core.errors import CheckpointError, InputError


@pytest.fixture(params=STORES)
def store(request, tmp_path):
  kind, tiny = STORES[request.param]
  made = tiny(tmp_path / "checkpoints")
  assert isinstance(made, kind)
  yield made
  made.close()


def never(step, why):
  raise AssertionError((step, why))


def test_a_step_is_read_back_bit_for_bit(store, state, record, like_of, same):
  store.write(3, state, record)
  store.wait()
  arrays, read = store.read(3, like_of(state))
  assert same(arrays, state)
  assert read == record and [type(v) for v in read.values()] == [type(v) for v in record.values()]
  assert all(x.sharding == like_of(state)[name].sharding for name, x in arrays.items())


def test_what_a_step_holds_is_told_without_reading_it(store, state, record):
  store.write(3, state, record)
  store.wait()
  held = store.contents(3)
  assert held == {name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in state.items()}
  with pytest.raises(CheckpointError, match="no step 1"):
    store.contents(1)


def test_a_store_without_steps_has_nothing(store, state, like_of, tmp_path):
  assert store.steps() == [] and store.aside() == []
  assert read_latest(store, like_of(state), never) is None
  with pytest.raises(CheckpointError, match="no step 1"):
    store.read(1, like_of(state))
  assert list(tmp_path.iterdir()) == []


def test_the_newest_steps_are_kept(store, record, like_of, same):
  states = {step: {"x": jnp.full((3,), step)} for step in (1, 5, 9, 100)}
  for step, arrays in states.items():
    store.write(step, arrays, {"step": step})
  store.wait()
  assert store.steps() == [9, 100]
  for step in (9, 100):
    arrays, read = store.read(step, like_of(states[step]))
    assert same(arrays, states[step]) and read == {"step": step}


def test_steps_are_written_in_order(store):
  store.write(5, {"x": jnp.ones(3)}, {})
  store.wait()
  for step in (5, 4):
    with pytest.raises(InputError, match=f"{step} after 5"):
      store.write(step, {"x": jnp.ones(3)}, {})
  assert store.steps() == [5]


def test_arrays_may_be_donated_right_after_the_write(store, like_of):
  overwrite = jax.jit(lambda x: -x, donate_argnums=0)
  for step in range(1, 6):
    x = jnp.arange(2**18, dtype=jnp.float32) + step
    expected = np.array(x)
    like = like_of({"x": x})
    store.write(step, {"x": x}, {})
    y = overwrite(overwrite(x))
    jax.block_until_ready(overwrite(y))
    store.wait()
    np.testing.assert_array_equal(store.read(step, like)[0]["x"], expected)


def test_what_was_read_may_be_donated_and_read_again(store, like_of):
  x = jnp.arange(2**12, dtype=jnp.float32)
  store.write(1, {"x": x}, {})
  store.wait()
  overwrite = jax.jit(lambda x: -x - 1, donate_argnums=0)
  for _ in range(3):
    read = store.read(1, like_of({"x": x}))[0]["x"]
    np.testing.assert_array_equal(read, np.arange(2**12))
    jax.block_until_ready(overwrite(read))


def test_a_record_changed_after_the_write_is_written_as_it_was(store, like_of):
  record = {"list": [1, 2]}
  store.write(1, {"x": jnp.ones(3)}, record)
  record["list"].append(3)
  store.wait()
  _, read = store.read(1, like_of({"x": jnp.ones(3)}))
  assert read == {"list": [1, 2]}
  read["list"].append(4)
  assert store.read(1, like_of({"x": jnp.ones(3)}))[1] == {"list": [1, 2]}


@pytest.mark.parametrize("record", [{"a": (1, 2)}, {1: 2}, {"a": float("nan")}, {"a": {1}}, [1]])
def test_a_record_that_json_would_change_is_refused(store, record):
  with pytest.raises(InputError, match="JSON"):
    store.write(1, {"x": jnp.ones(3)}, record)
  assert store.steps() == []


def test_another_model_is_the_readers_mistake_and_sets_nothing_aside(store, like_of):
  state = {"a": jnp.ones((2, 3)), "b": jnp.ones(4), "c": jnp.ones(5)}
  store.write(1, state, {})
  store.wait()
  wrong = {
    "d.*not in the checkpoint": {**state, "d": jnp.ones(3)},
    "b.*not asked for": {"a": state["a"], "c": state["c"]},
    r"a \(float32\[2, 3\] there, float32\[3, 2\] asked\)": {**state, "a": jnp.ones((3, 2))},
    r"b \(float32\[4\] there, bfloat16\[4\] asked\)": {**state, "b": jnp.ones(4, jnp.bfloat16)},
    "e not in.*a, b, c in": {"e": jnp.ones(3)},
  }
  for message, asked in wrong.items():
    with pytest.raises(InputError, match=message):
      read_latest(store, like_of(asked), never)
  with pytest.raises(InputError, match="a: `like` must carry a sharding"):
    read_latest(store, {k: jax.ShapeDtypeStruct(x.shape, x.dtype) for k, x in state.items()}, never)
  assert store.steps() == [1] and store.aside() == []


def test_a_part_is_read_by_the_start_of_its_names(store, state, record, like_of, same):
  store.write(1, state, record)
  store.wait()
  part = {name: x for name, x in state.items() if name.startswith("params/")}
  step, arrays, read = read_latest(store, like_of(part), never, under="params/")
  assert step == 1 and same(arrays, part) and read == record
  with pytest.raises(InputError, match="optimizer/0/count"):
    read_latest(store, like_of(part), never)


def test_a_step_set_aside_never_counts_again_but_stays(store, like_of, same):
  first, second = {"x": jnp.zeros(3)}, {"x": jnp.ones(3)}
  store.write(1, first, {})
  store.write(2, second, {})
  store.wait()
  store.set_aside(2, "a reason")
  assert store.steps() == [1] and len(store.aside()) == 1
  assert read_latest(store, like_of(first), never)[0] == 1
  store.write(2, second, {})
  store.wait()
  assert store.steps() == [1, 2]
  store.set_aside(2, "a reason")
  assert len(set(store.aside())) == 2
  store.set_aside(1, "a reason")
  with pytest.raises(CheckpointError, match="set aside"):
    read_latest(store, like_of(first), never)


def test_a_step_set_aside_for_another_reason_is_no_damage(store, like_of):
  store.write(1, {"x": jnp.zeros(3)}, {})
  store.wait()
  store.set_aside(1, "a reason", "undone")
  assert store.steps() == store.aside() == []
  assert read_latest(store, like_of({"x": jnp.zeros(3)}), never) is None


def damage(store, step, monkeypatch):
  """Makes the store read other values than were written, as a flipped bit would."""
  real = store.read

  def read(at, like, under=""):
    if at in damaged:
      raise DamagedStepError(f"step {at}: params/x is damaged")
    return real(at, like, under)

  damaged = {step} | getattr(store, "damaged", set())
  store.damaged = damaged
  monkeypatch.setattr(store, "read", read)


@pytest.mark.parametrize("set_aside", [True, False])
def test_a_damaged_step_is_reported_and_the_one_before_is_used(
  store, like_of, monkeypatch, set_aside
):
  for step in (1, 2):
    store.write(step, {"x": jnp.full(3, step)}, {})
  store.wait()
  damage(store, 2, monkeypatch)
  told = []
  found = read_latest(
    store, like_of({"x": jnp.full(3, 1)}), lambda *line: told.append(line), set_aside=set_aside
  )
  assert found[0] == 1 and float(found[1]["x"][0]) == 1
  assert told == [(2, "step 2: params/x is damaged")]
  assert store.steps() == ([1] if set_aside else [1, 2])
  damage(store, 1, monkeypatch)
  for _ in range(2):  # the second time there are none left to try
    with pytest.raises(CheckpointError, match=r"no intact checkpoint") as caught:
      read_latest(store, like_of({"x": jnp.full(3, 1)}), lambda *line: None)
    assert not isinstance(caught.value, DamagedStepError)


def lazily(state, made=None):
  """Returns arrays that note when they are made."""
  made = [] if made is None else made
  return {
    name: LazyArray(x.shape, x.dtype, lambda name=name, x=x: (made.append(name), np.asarray(x))[1])
    for name, x in state.items()
    if x.size
  }


def test_a_step_written_array_by_array_is_read_back_bit_for_bit(store, state, record, like_of,
                                                                same):  # fmt: skip
  made, alive = [], []
  arrays = lazily(state, made)
  store.write_streamed(3, arrays, record, lambda name: alive.append((name, len(made))))
  assert sorted(made) == sorted(arrays)
  assert alive == [(name, at) for at, name in enumerate(made, start=1)], "one is held at a time"
  whole = {name: state[name] for name in arrays}
  read, found = store.read(3, like_of(whole))
  assert same(read, whole) and found == record
  store.write(4, state, record)
  store.wait()
  assert store.steps() == [3, 4]
  with pytest.raises(InputError, match="3 after 4"):
    store.write_streamed(3, arrays, record)


def test_what_making_an_array_raises_passes_through_and_leaves_no_step(store, state, like_of,
                                                                       tmp_path):  # fmt: skip
  def torn():
    raise OSError(5, "Input/output error", "model.safetensors")

  arrays = {**lazily(state), "z": LazyArray((3,), np.dtype(np.float32), torn)}
  with pytest.raises(OSError, match=r"model\.safetensors"):
    store.write_streamed(1, arrays, {})
  assert store.steps() == [] and not list(tmp_path.glob("checkpoints/*"))
  store.write_streamed(1, lazily(state), {})
  assert store.steps() == [1]


def test_a_step_is_read_array_by_array_on_the_host(store, state, record, same):
  store.write(3, state, record)
  store.wait()
  reader = store.open_step(3)
  read = {name: reader.read(name) for name in reader.manifest.arrays}
  assert same(read, state) and reader.manifest.record == record
  assert all(type(array) is np.ndarray for array in read.values())
  with pytest.raises(CheckpointError, match="no step 1"):
    store.open_step(1)
