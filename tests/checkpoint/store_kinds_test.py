"""A store is opened by what is there, and by nothing else."""

import ast
import json
import pathlib
import typing

import jax.numpy as jnp
import numpy as np
import pytest

from jaxmoe.checkpoint import STORES, open_store
from jaxmoe.checkpoint.manifest import DamagedStepError
from jaxmoe.checkpoint.npz_store import ARRAYS, MANIFEST, NpzStore
from jaxmoe.checkpoint.store import read_latest
from jaxmoe.checkpoint.store_kinds import on_disk
from jaxmoe.core import multihost
from jaxmoe.core.config_io import from_plain, to_plain
from jaxmoe.core.errors import CheckpointError, InputError
from jaxmoe.train.experiment import Train

ROOT = pathlib.Path(__file__).parents[2]
ARRAY = {"params/x": jnp.arange(6.0).reshape(2, 3)}


def written(folder, kind, steps=(1,)):
  store = open_store(folder, kind)
  for step in steps:
    store.write(step, ARRAY, {"step": step})
  store.wait()
  store.close()
  return folder


@pytest.mark.parametrize("kind", on_disk())
def test_a_store_is_of_the_kind_that_wrote_what_is_there(tmp_path, like_of, same, kind):
  written(tmp_path / "run" / "checkpoints", kind, (3, 4))
  for other in on_disk():
    for folder in (tmp_path / "run", tmp_path / "run" / "checkpoints"):
      store = open_store(folder, other)
      assert type(store) is STORES[kind][0] and store.steps() == [3, 4]
      step, arrays, record = read_latest(store, like_of(ARRAY), pytest.fail)
      assert step == 4 and record == {"step": 4} and same(arrays, ARRAY)
      store.close()


@pytest.mark.parametrize("kind", on_disk())
def test_a_step_that_is_damaged_or_set_aside_tells_its_kind_still(tmp_path, kind):
  folder = written(tmp_path / "checkpoints", kind)
  next(path for path in (folder / "1").rglob("*") if path.is_file()).unlink()
  assert type(open_store(folder)) is STORES[kind][0]
  open_store(folder).set_aside(1, "a reason")
  assert type(open_store(folder)) is STORES[kind][0] and open_store(folder).steps() == []


def test_where_nothing_is_there_a_store_is_what_the_recipe_says_and_makes_nothing(tmp_path):
  for kind, each in on_disk().items():
    assert type(open_store(tmp_path / "no" / "checkpoints", kind)) is each
  assert list(tmp_path.iterdir()) == []


def make(folder, *files):
  for name in files:
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text("x")


@pytest.mark.parametrize(
  ("files", "why"),
  [
    (("config.json", "model.safetensors"), "holds no checkpoint"),
    (("checkpoints/7/weights.bin",), "7 is a step of no store that is known"),
    (("0/model.pt",), "0 is a step of no store that is known"),
    (("checkpoints/1/label/metadata", "checkpoints/2/manifest.json"), "steps of two kinds"),
  ],
)  # fmt: skip
def test_an_unknown_folder_is_refused_in_one_line(tmp_path, files, why):
  make(tmp_path, *files)
  with pytest.raises(InputError, match=why) as caught:
    open_store(tmp_path)
  assert "\n" not in str(caught.value) and str(tmp_path) in str(caught.value)


def test_a_kind_that_no_disk_holds_is_refused(tmp_path):
  for kind in ("memory", "tape"):
    with pytest.raises(InputError, match=f"called '{kind}'; there are orbax, npz"):
      open_store(tmp_path / "checkpoints", kind)


def test_a_recipe_names_its_store_and_one_of_before_is_as_it_was():
  kinds = typing.get_args(typing.get_type_hints(Train)["store"])
  assert list(kinds) == list(on_disk())
  plain = to_plain(Train())
  assert "store" not in to_plain(Train(), as_before=True)  # so no fingerprint changes
  del plain["store"]
  assert from_plain(Train, plain) == Train() and Train().store == "orbax"
  assert to_plain(Train(store="npz"), as_before=True)["store"] == "npz"
  with pytest.raises(InputError, match="'orbax' or 'npz'"):
    Train(store="memory")


def test_nothing_but_the_dict_of_stores_names_orbax_store():
  """By code, not in docstrings; whoever wants a store calls open_store."""
  named = set()
  for path in [*(ROOT / "jaxmoe").rglob("*.py"), *(ROOT / "launch").rglob("*.py")]:
    for node in ast.walk(ast.parse(path.read_text())):
      names = [getattr(node, "id", ""), getattr(node, "attr", ""), getattr(node, "name", "")]
      if "OrbaxStore" in names:
        named.add(path.relative_to(ROOT).as_posix())
  own = "jaxmoe/checkpoint/orbax_store.py"
  assert named == {own, "jaxmoe/checkpoint/store_kinds.py"}


def test_numpy_and_json_alone_read_a_step_of_an_npz_store(tmp_path):
  folder = written(tmp_path / "checkpoints", "npz")
  manifest = json.loads((folder / "1" / MANIFEST).read_text())
  with np.load(folder / "1" / ARRAYS, allow_pickle=False) as arrays:
    (name,) = arrays
    line = manifest["arrays"][name]
    found = arrays[name].view(line["dtype"]).reshape(line["shape"])
  assert name == "params/x" and manifest["record"] == {"step": 1}
  np.testing.assert_array_equal(found, ARRAY["params/x"])


@pytest.mark.parametrize("name", [ARRAYS, MANIFEST])
@pytest.mark.parametrize("how", ["flipped", "cut", "empty", "gone"])
def test_a_damaged_file_of_an_npz_store_is_told(tmp_path, like_of, name, how):
  folder = written(tmp_path / "checkpoints", "npz")
  path = folder / "1" / name
  raw = bytearray(path.read_bytes())
  raw[len(raw) // 3] ^= 1
  path.write_bytes({"flipped": raw, "cut": raw[: len(raw) // 2], "empty": b"", "gone": b""}[how])
  if how == "gone":
    path.unlink()
  with pytest.raises(DamagedStepError, match=name if name == MANIFEST else "1"):
    open_store(folder).read(1, like_of(ARRAY))


def test_a_save_that_was_killed_is_no_step_and_goes(tmp_path):
  folder = written(tmp_path / "checkpoints", "npz")
  make(folder, "2.partial/arrays.npz")
  assert open_store(folder).steps() == [1]
  written(folder, "npz", (5,))
  assert sorted(path.name for path in folder.iterdir()) == ["1", "5"]


def test_an_npz_store_that_cannot_write_says_so(tmp_path):
  (tmp_path / "checkpoints").write_text("a file")
  with pytest.raises(CheckpointError, match="saving step 1 failed"):
    NpzStore(tmp_path / "checkpoints").write(1, ARRAY, {})


def test_an_npz_store_is_for_one_process(tmp_path, monkeypatch):
  monkeypatch.setattr(multihost, "is_multi_process", lambda: True)
  with pytest.raises(InputError, match=r"one process; set --config.train.store=orbax"):
    NpzStore(tmp_path / "checkpoints")
