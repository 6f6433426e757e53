"""Three functions in plain jnp, on any layout: an MoE that tells which of two rules made a row."""

import dataclasses
import json
import os
import pathlib
import socket
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmoe.checkpoint import MemoryStore, open_store
from jaxmoe.core.errors import InputError, NotFiniteError
from jaxmoe.optim import Constant, OnlineFairness, Optim
from jaxmoe.parallel import Parallel
from jaxmoe.train.task import Task, TaskRecipe, TaskRun
from tests.train.mixture_task import EXAMPLES, TASK, make_params

LAYOUTS = {
  "fsdp": Parallel(fsdp=4, data=2),
  "expert and tensor": Parallel(data=2, expert=2, tensor=2),
  "zero 1": Parallel(fsdp=2, zero=1, tensor=4),
}
OPTIM = Optim(schedule=Constant(), learning_rate=1e-2)
RECIPE = TaskRecipe(OPTIM, num_steps=12, batch_size=16)


def run_of(parallel=None, **options):
  recipe = RECIPE if parallel is None else dataclasses.replace(RECIPE, parallel=parallel)
  devices = jax.devices()[: recipe.parallel.num_devices]
  return TaskRun(TASK, make_params(), EXAMPLES[:3], recipe, devices, **options)


def losses(lines):
  return np.array([line["loss"] for line in lines])


@pytest.fixture(scope="module")
def one():
  """Returns (losses, predictions) of one device."""
  run = run_of()
  return losses(run.fit(EXAMPLES)), run.predictions(EXAMPLES[:21])


@pytest.mark.parametrize("name", ["fsdp", "expert and tensor"])
def test_losses_and_predictions_are_those_of_one_device(one, name):
  run = run_of(LAYOUTS[name])
  np.testing.assert_allclose(losses(run.fit(EXAMPLES)), one[0], rtol=1e-5)
  made = run.predictions(EXAMPLES[:21])
  assert made["class"].shape == (21,)
  np.testing.assert_allclose(made["probability"], one[1]["probability"], rtol=1e-4, atol=1e-6)


def test_it_learns(one):
  assert one[0][-3:].mean() < 0.8 * one[0][:3].mean()


def test_experts_and_hidden_units_are_spread_and_so_are_their_moments():
  run = run_of(LAYOUTS["expert and tensor"])
  assert tuple(run.params["experts"]["a"].sharding.spec) == ("expert", None, "tensor")
  parts = [
    leaf.sharding.spec for leaf in jax.tree.leaves(run._moments) if leaf.shape == (4, 6, 16)
  ]
  assert [tuple(spec) for spec in parts] == [("expert", None, "tensor")] * 2
  assert "scores experts" in run.automatic.table()


def test_zero_3_spreads_parameters_and_zero_1_moments_alone():
  whole = run_of(LAYOUTS["zero 1"])
  assert "fsdp" not in str(whole.params["experts"]["a"].sharding.spec)
  assert any("fsdp" in str(leaf.sharding.spec) for leaf in jax.tree.leaves(whole._moments))
  assert "fsdp" in str(run_of(LAYOUTS["fsdp"]).params["experts"]["a"].sharding.spec)


def test_a_run_goes_on_from_its_checkpoint_on_another_layout(one, tmp_path):
  store = open_store(tmp_path / "checkpoints")
  run_of(LAYOUTS["expert and tensor"], store=store).fit(EXAMPLES, 5)
  store.close()
  run = run_of(LAYOUTS["fsdp"], store=open_store(tmp_path / "checkpoints"))
  assert run.step == 5
  np.testing.assert_allclose(losses(run.fit(EXAMPLES)), one[0][5:], rtol=1e-5)


def test_a_checkpoint_of_another_recipe_is_refused():
  store = MemoryStore()
  run_of(store=store).fit(EXAMPLES, 1)
  other = dataclasses.replace(RECIPE, seed=1)
  with pytest.raises(InputError, match="was made with"):
    TaskRun(TASK, make_params(), EXAMPLES, other, jax.devices()[:1], store)


def test_every_example_comes_once_before_any_comes_again():
  seen = []

  def collate(rows):
    seen.extend(int(row[1]) for row in rows)
    return TASK.collate(EXAMPLES[: len(rows)])

  task = dataclasses.replace(TASK, collate=collate)
  run = TaskRun(task, make_params(), [(0, 0)], RECIPE, jax.devices()[:1])
  seen.clear()
  run.fit([(0, i) for i in range(40)], 10)
  for epoch in range(4):
    assert sorted(seen[40 * epoch : 40 * (epoch + 1)]) == list(range(40))
  assert seen[:40] != seen[40:80]


def test_parameters_that_were_given_stay_usable():
  params = make_params()
  TaskRun(TASK, params, EXAMPLES, RECIPE, jax.devices()[:1]).fit(EXAMPLES, 1)
  jax.block_until_ready(jax.tree.map(lambda leaf: leaf + 0, params))


@pytest.mark.parametrize("name", ["one", "expert and tensor"])
def test_what_is_frozen_keeps_every_bit_and_the_rest_learns(name):
  parallel = LAYOUTS.get(name, Parallel())
  frozen = dataclasses.replace(OPTIM, frozen=("shared/*", "experts/*@0:2"))
  recipe = dataclasses.replace(RECIPE, optim=frozen, parallel=parallel)
  run = TaskRun(TASK, make_params(), EXAMPLES[:3], recipe, jax.devices()[: parallel.num_devices])
  lines, (old, new) = run.fit(EXAMPLES, 3), jax.device_get((make_params(), run.params))
  assert lines[2]["loss"] < lines[0]["loss"]
  for path in ("a", "b", "bias"):
    np.testing.assert_array_equal(new["shared"][path], old["shared"][path])
  for path in ("a", "b"):
    still = (new["experts"][path] == old["experts"][path]).all((1, 2))
    assert still.tolist() == [True, True, False, False]
  assert (new["router"] != old["router"]).any()


def test_keys_differ_from_step_to_step_and_not_from_layout_to_layout():
  def loss(params, batch, key):
    noise = jax.random.normal(key, batch["x"].shape)
    return (((batch["x"] + noise) @ params["w"]) ** 2).mean()

  def fit(parallel):
    task = Task(lambda rows: {"x": np.stack(rows)}, loss, loss)
    recipe = TaskRecipe(Optim(schedule=Constant(), learning_rate=1e-9), parallel, 2, 8)
    params, rows = {"w": np.ones((4, 4), np.float32)}, list(np.ones((1, 4), np.float32))
    return losses(TaskRun(task, params, rows, recipe, jax.devices()[: parallel.num_devices])
                  .fit(rows))

  first = fit(Parallel())
  assert abs(first[0] - first[1]) > 1e-3
  np.testing.assert_allclose(fit(Parallel(data=4, tensor=2)), first, rtol=1e-5)


@pytest.mark.parametrize(
  "message, changes, parallel",
  [
    ("must have a row for each of 16", {"collate": lambda rows: {"x": np.ones(3)}}, Parallel()),
    ("must have 16 rows", {"predict": lambda p, b, key: {"mean": b["x"].mean()}}, Parallel()),
    ("does not divide by 3", {}, Parallel(data=3)),
    ("cannot go on to step 13", {"steps": 13}, Parallel()),
    ("no examples", {"examples": []}, Parallel()),
    ("laid out by the compiler", {}, Parallel(tensor=2, sequence=True)),
    ("'head/\\*' names no parameter", {"optim": Optim(frozen=("head/*",))}, Parallel()),
    ("no domains to treat alike", {"optim": Optim(fairness=OnlineFairness(0.5))}, Parallel()),
  ],
)
def test_mistakes_end_with_one_line(message, changes, parallel):
  changes = dict(changes)
  examples, steps = changes.pop("examples", EXAMPLES), changes.pop("steps", 1)
  optim = changes.pop("optim", OPTIM)
  with pytest.raises(InputError, match=message) as error:
    recipe = dataclasses.replace(RECIPE, optim=optim, parallel=parallel)
    task = dataclasses.replace(TASK, **changes)
    run = TaskRun(task, make_params(), EXAMPLES, recipe, jax.devices()[: parallel.num_devices])
    run.predictions(examples)
    run.fit(examples, steps)
  assert "\n" not in str(error.value)


def test_a_loss_that_is_not_finite_ends_the_run():
  task = dataclasses.replace(TASK, loss=lambda p, b, key: jnp.log(-jnp.abs(p["router"]).sum()))
  with pytest.raises(NotFiniteError, match="loss of step 1 is nan"):
    TaskRun(task, make_params(), EXAMPLES, RECIPE, jax.devices()[:1]).fit(EXAMPLES, 1)


PROCESS = """
import json, sys
import jax
jax.config.update("jax_num_cpu_devices", 2)
jax.distributed.initialize("127.0.0.1:" + sys.argv[1], 2, int(sys.argv[2]))
from jaxmoe.parallel import Parallel
from jaxmoe.train.task import TaskRun
from tests.train import task_test as t
import dataclasses
recipe = dataclasses.replace(t.RECIPE, parallel=Parallel(data=2, tensor=2))
run = TaskRun(t.TASK, t.make_params(), t.EXAMPLES[:3], recipe)
found = [float(line["loss"]) for line in run.fit(t.EXAMPLES, 4)]
print("FOUND", json.dumps([found, run.predictions(t.EXAMPLES[:21])["probability"].tolist()]))
"""


def test_two_processes_give_the_losses_of_one_device(one):
  with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    free_port = free.getsockname()[1]
  root = pathlib.Path(__file__).parents[2]
  started = [
    subprocess.Popen(
      [sys.executable, "-c", PROCESS, str(free_port), str(rank)], cwd=root, text=True,
      stdout=subprocess.PIPE, stderr=subprocess.PIPE,
      env={**os.environ, "PYTHONPATH": str(root), "JAX_PLATFORMS": "cpu",
           "JAX_COMPILATION_CACHE_DIR": jax.config.jax_compilation_cache_dir},
    )
    for rank in range(2)
  ]  # fmt: skip
  ended = [process.communicate(timeout=300) for process in started]
  run = run_of()
  run.fit(EXAMPLES, 4)
  expected = run.predictions(EXAMPLES[:21])["probability"]
  for process, (out, err) in zip(started, ended):
    assert process.returncode == 0, err[-2000:]
    line = next(line for line in out.splitlines() if line.startswith("FOUND"))
    found, probability = json.loads(line.removeprefix("FOUND"))
    np.testing.assert_allclose(found, one[0][:4], rtol=1e-5)
    np.testing.assert_allclose(probability, expected, rtol=1e-4, atol=1e-6)


def test_the_example_is_short():
  text = (pathlib.Path(__file__).parent / "mixture_task.py").read_text()
  assert len(text.splitlines()) <= 60


def decoder_task(num_heads, length):
  """Attention of so many heads of 2, and its parameters; nothing of it is to be computed."""

  def loss(params, batch, key):
    del key
    x = batch["x"]
    q, k, v = (jnp.einsum("bld,dnh->blnh", x, params[name]) for name in "qkv")
    scores = jax.nn.softmax(jnp.einsum("blnh,bsnh->bnls", q, k))
    return (jnp.einsum("bnls,bsnh,nhd->bld", scores, v, params["o"]) ** 2).mean()

  def collate(rows):
    return {"x": np.zeros((len(rows), length, 8), np.float32)}

  params = {name: np.zeros((8, num_heads, 2), np.float32) for name in "qkv"}
  params["o"] = np.zeros((num_heads, 2, 8), np.float32)
  return Task(collate, loss, lambda params, batch, key: batch["x"]), params


@pytest.mark.parametrize(
  "heads, words",
  [
    (6, r"\(4, 6, 64, 64\) float32.*for 6 heads cannot be divided by 4; set parallel.tensor=3, or"),
    (
      5,
      "for 5 heads cannot be divided by 4; make batches smaller, or set "
      "parallel.max_replicated_gib",
    ),
  ],
)
def test_heads_that_would_be_whole_on_every_tensor_device_are_refused_if_large(heads, words):
  task, params = decoder_task(heads, length=64)
  limit = 4 * 64 * 64 * 4 / 2**30  # of one head's scores
  recipe = TaskRecipe(
    OPTIM, parallel=Parallel(data=2, tensor=4, max_replicated_gib=limit), num_steps=2, batch_size=8
  )
  with pytest.raises(InputError, match=words) as caught:
    TaskRun(task, params, [0], recipe)
  assert "\n" not in str(caught.value)
  higher = dataclasses.replace(recipe.parallel, max_replicated_gib=limit * heads)
  TaskRun(task, params, [0], dataclasses.replace(recipe, parallel=higher))
  task, params = decoder_task(4, length=64)
  TaskRun(task, params, [0], recipe)


def test_parameters_that_come_in_bfloat16_are_kept_in_float32_and_learn():
  came = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), make_params())
  seen, store = [], MemoryStore()

  def loss(params, batch, key):
    seen.extend(leaf.dtype for leaf in jax.tree.leaves(params))
    return TASK.loss(params, batch, key)

  task = dataclasses.replace(TASK, loss=loss)
  optim = dataclasses.replace(OPTIM, learning_rate=1e-5)
  recipe = dataclasses.replace(RECIPE, optim=optim)

  def run(recipe, store=None):
    return TaskRun(task, came, EXAMPLES[:3], recipe, jax.devices()[:1], store=store)

  made = run(recipe, store)
  made.fit(EXAMPLES, 3)
  assert set(seen) == {jnp.dtype(jnp.bfloat16)}
  first, last = (np.concatenate([np.ravel(np.float32(x)) for x in jax.tree.leaves(tree)])
                 for tree in (came, made.params))  # fmt: skip
  assert {x.dtype for x in jax.tree.leaves(made.params)} == {jnp.dtype(jnp.float32)}
  assert np.mean(first != last) > 0.9  # rounded to bfloat16 none of them would move
  assert np.mean(np.float32(last.astype(jnp.bfloat16)) == first) > 0.9
  narrow = dataclasses.replace(recipe, optim=dataclasses.replace(optim, master_dtype="bfloat16"))
  assert jax.tree.leaves(run(narrow).params)[0].dtype == jnp.bfloat16
  arrays, record = store.read(3, {
    name: jax.ShapeDtypeStruct(held.shape, held.dtype, sharding=made.layout.replicated)
    for name, held in store.contents(3).items()
  })  # fmt: skip
  before = MemoryStore()  # as a run of before left it
  before.write(3, {
    name: x.astype(jnp.bfloat16) if name.startswith("params/") else x for name, x in arrays.items()
  }, record)  # fmt: skip
  again = run(recipe, before)
  assert again.step == 3 and jax.tree.leaves(again.params)[0].dtype == jnp.float32
