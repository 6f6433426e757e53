"""Every public name of `jaxmoe`, used as a stranger uses it; its mistakes are one line."""

import json
import pathlib
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest

import jaxmoe
from jaxmoe.core.config_io import override
from jaxmoe.core.errors import InputError
from jaxmoe.runs.recipe_loading import load_recipe
from jaxmoe.train.run_log import read_lines

ROOT = pathlib.Path(__file__).parents[2]
SHORT = {
  "train.num_steps": 3, "train.checkpoint_every": 3, "evaluation.every": 0, "samples.every": 0,
}  # fmt: skip


@pytest.fixture(scope="module")
def run(trained):
  return jaxmoe.open(trained)


@pytest.fixture
def ids():
  return np.arange(96).reshape(2, 48)


# Names.


def test_an_import_loads_no_jax_and_every_name_is_there():
  code = (
    "import sys, jaxmoe\n"
    "assert not {'jax', 'flax', 'numpy', 'absl'} & set(sys.modules)\n"
    "assert {'open', 'fit', 'recipe', 'Run', 'InputError'} <= set(dir(jaxmoe))\n"
    "for name in jaxmoe.__all__: getattr(jaxmoe, name)\n"
    "from jax._src import xla_bridge\n"
    "assert not xla_bridge._backends\n"
  )
  done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
  assert done.returncode == 0, done.stderr


def test_no_public_name_is_that_of_a_subpackage_of_another_thing():
  packages = {path.parent.name for path in (ROOT / "jaxmoe").glob("*/__init__.py")}
  assert set(jaxmoe.__all__) & packages <= {"nn"}, "which is the same thing"
  with pytest.raises(AttributeError, match="no attribute 'upcycle'"):
    _ = jaxmoe.upcycle


# Each name, by an example.


def test_a_recipe_is_a_name_with_keywords_and_fields():
  made = jaxmoe.recipe("quickstart", num_steps=200, **{"train.seed": 3, "optim.no_decay": ["*x"]})
  assert (made.train.num_steps, made.train.seed) == (200, 3)
  assert made.optim.no_decay == ("*x",)
  by_path = load_recipe(str(ROOT / "configs" / "tiny.py"), [])
  assert jaxmoe.recipe("tiny") == jaxmoe.recipe(str(ROOT / "configs" / "tiny.py")) == by_path
  ffn = jaxmoe.recipe("tiny", router="switch").model.stack[0].pattern[0].ffn
  assert isinstance(ffn, jaxmoe.MoEConfig) and ffn.num_active == 1


def test_a_recipe_is_fitted_in_a_folder_and_goes_on_there(tmp_path):
  steps = []
  recipe = jaxmoe.recipe("tiny", **SHORT)
  run = jaxmoe.fit(recipe, tmp_path / "q", on_step=steps.append)
  assert [line["step"] for line in steps] == [1, 2, 3] == [line["step"] for line in steps_of(run)]
  assert run.step == 3 and (tmp_path / "q" / "report.html").is_file()
  longer = override(recipe, [("train.num_steps", "4")])
  assert jaxmoe.fit(longer, tmp_path / "q", on_step=steps.append).step == 4
  assert [line["step"] for line in steps] == [1, 2, 3, 4]
  with pytest.raises(jaxmoe.InputError, match="holds a run of another config"):
    jaxmoe.fit(jaxmoe.recipe("tiny", dispatch="dense", **SHORT), tmp_path / "q")


def steps_of(run):
  return list(read_lines(run.workdir.metrics))


def test_a_run_is_opened_without_a_word_and_without_a_setting(trained, capfd):
  before = dict(jax.config.values)
  run = jaxmoe.open(str(trained))
  assert isinstance(run, jaxmoe.Run) and run.step == 6
  assert repr(run) == f"Run({str(trained)!r}, step=6, params=47,584)"
  assert capfd.readouterr() == ("", "")
  assert dict(jax.config.values) == before


def test_a_run_writes_what_the_command_writes(run, trained, run_command, capsys):
  texts = run.generate(["copy#", "add#"], max_tokens=5)
  assert capsys.readouterr().out == "" and len(texts) == 2
  flags = ("--prompt=copy#", "--prompt=add#", "--max_tokens=5")
  shown = run_command("generate", f"--workdir={trained}", *flags).out
  assert shown == f"--- 1 of 2\ncopy#{texts[0]}\n--- 2 of 2\nadd#{texts[1]}\n"
  assert run.generate("copy#", max_tokens=5, temperature=0, stream=True)
  assert capsys.readouterr().out.startswith("copy#")


def test_a_run_answers_in_a_chat(run, trained, run_command):
  answer = run.chat([("system", "S"), ("user", "hi")], max_tokens=5, seed=3)
  flags = ("--chat", "--system=S", "--prompt=hi", "--max_tokens=5", "--seed=3")
  assert run_command("generate", f"--workdir={trained}", *flags).out == f"{answer}\n"


def test_a_run_is_evaluated_on_what_it_holds_out_and_on_any_text(run, trained, run_command, text):
  copy = trained.parent / "evaluated"
  shutil.copytree(trained, copy, dirs_exist_ok=True)
  for name, found, flags in (
    ("eval.json", run.evaluate(), ()),
    ("eval_text.json", run.evaluate(text), (f"--text={text}",)),
  ):
    assert run_command("evaluate", f"--workdir={copy}", *flags).code == 0
    assert json.loads((copy / name).read_text()) == found
  assert not (trained / "eval_text.json").exists()


def test_scores_are_the_same_bit_for_bit_where_routing_is_taken_again(run, ids):
  first = run.score(ids, return_routing=True)
  again = run.score(ids.astype(np.int64).tolist(), routing=first.routing)
  assert first.routing.shape == (2, 2, 48, 2) and first.logprobs.shape == (2, 47)
  np.testing.assert_array_equal(first.logprobs, again.logprobs)
  other = np.flip(first.routing, axis=2)
  assert not np.array_equal(run.score(ids, routing=other).logprobs, first.logprobs)
  assert run.score(ids, return_logits=True).logits.shape == (2, 48, 257)


def test_a_run_is_changed_and_saved_as_another(run, ids, tmp_path):
  wider = run.insert(2).save(tmp_path / "wider", changes=["train.num_steps=9"])
  assert wider.step == 0 and wider.experiment.train.num_steps == 9
  np.testing.assert_array_equal(wider.score(ids).logprobs, run.score(ids).logprobs)
  opened = wider.open_experts(like=[0, 1]).save(tmp_path / "opened")
  pruned = opened.prune(4, count_on=1).save(tmp_path / "pruned")
  counted = opened.prune(4, usage=[[9, 1, 9, 1, 9, 9]] * 2).save(tmp_path / "counted")
  twice = pruned.clone(2).save(tmp_path / "twice")
  assert [
    one.experiment.model.stack[0].pattern[0].ffn.num_experts
    for one in (opened, pruned, counted, twice)
  ] == [6, 4, 4, 8]


def test_a_public_checkpoint_is_a_run_in_memory_or_in_a_folder(checkpoint, tmp_path, ids):
  folder = checkpoint("llama")
  model, small = jaxmoe.from_pretrained(folder), ids[:, :8] % 8 + 2
  run = jaxmoe.convert(folder, tmp_path / "run")
  np.testing.assert_array_equal(model.score(small).logprobs, run.score(small).logprobs)
  assert model.generate("ab", max_tokens=4) == run.generate("ab", max_tokens=4)
  for name, one in (("of_memory", model), ("of_run", run)):
    one.save_pretrained(tmp_path / name)
  for path in sorted((tmp_path / "of_run").iterdir()):
    assert (tmp_path / "of_memory" / path.name).read_bytes() == path.read_bytes(), path.name
  model.save_pretrained(tmp_path / "small", dtype="bfloat16")
  dense = run.upcycle(num_experts=2).save(tmp_path / "upcycled")
  np.testing.assert_allclose(dense.score(small).logprobs, run.score(small).logprobs, rtol=1e-5)
  with pytest.raises(jaxmoe.InputError, match="surgery needs a run in a folder"):
    model.upcycle(num_experts=2)


# Mistakes.


def test_a_run_that_is_not_there_is_one_line_as_of_the_command(tmp_path, trained, run_command):
  left_out = shutil.ignore_patterns("checkpoints", "events*")
  shutil.copytree(trained, tmp_path / "run", ignore=left_out)
  for folder, words in (("none", "no run here"), ("run", "no checkpoint yet")):
    with pytest.raises(InputError, match=words) as found:
      jaxmoe.open(tmp_path / folder)
    shown = run_command("generate", f"--workdir={tmp_path / folder}", "--prompt=a")
    assert (shown.code, shown.err) == (4, f"error: {found.value}\n")
    assert isinstance(found.value, jaxmoe.CheckpointError)


def test_an_id_outside_the_vocabulary_is_one_line_as_of_the_command(run, trained, run_command,
                                                                    tmp_path):  # fmt: skip
  for bad in ([[1, 257]], [[-1, 1]], [[1]], [[0.5, 1.0]]):
    with pytest.raises(jaxmoe.InputError) as found:
      run.score(bad)
    file = tmp_path / "ids.npy"
    np.save(file, np.array(bad, np.int32 if isinstance(bad[0][0], int) else np.float64))
    flags = (f"--workdir={trained}", f"--ids={file}", f"--out={tmp_path / 'x.npz'}")
    shown = run_command("score", *flags)
    expected = str(found.value).replace("ids: ", f"error: --ids={file}: ", 1) + "\n"
    assert (shown.code, shown.err) == (2, expected)


@pytest.mark.parametrize("name", ["quickest", "nowhere/x.py", "nowhere.json", "tiny.py"])
def test_a_recipe_that_is_not_there_is_one_line_as_of_the_command(run_command, tmp_path, name):
  with pytest.raises(jaxmoe.InputError) as found:
    jaxmoe.recipe(name)
  shown = run_command("train", f"--config={name}", f"--workdir={tmp_path / 'run'}")
  assert (shown.code, shown.err) == (2, f"error: {found.value}\n")
  assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
  "use, words",
  [
    (lambda run: run.score([[1, 257]]), "ids: id 257 is outside the vocabulary of 257"),
    (lambda run: run.score([[1, -1]]), "ids: id -1 is outside"),
    (lambda run: run.score([[1, 2**40]]), "needs an int32 array"),
    (lambda run: run.score([[0.5, 1.0]]), "needs an int32 array"),
    (lambda run: run.score([[1] * 65]), "2 to 64 ids"),
    (lambda run: run.score([[1, 2], [3]]), "ids: rows have different lengths"),
    (lambda run: run.score([[1, 2]], routing=[[0]]), "must be int16"),
    (lambda run: run.score([[1, 2]], routing=np.zeros((1, 1, 2, 1), np.int16)), "must be int16"),
    (lambda run: run.generate([]), "give the text to continue"),
    (lambda run: run.generate("x" * 64), "shorten it"),
    (lambda run: run.generate("x", max_token=3), "max_token: no such setting"),
    (lambda run: run.generate("x", top_p=0), "top_p must lie in"),
    (lambda run: run.chat([]), "give the text to continue"),
    (lambda run: run.chat("hi"), "messages: expected pairs of role and text, got 'h'"),
    (lambda run: run.chat([{"role": "user", "content": "hi"}]), "expected pairs of role and text"),
    (lambda run: run.generate([3]), "expected text, got 3"),
    (lambda run: run.evaluate(batch_size=0), "batch_size=0 must be at least 1"),
    (lambda run: jaxmoe.fit("tiny", "/nowhere/run"), "'tiny' is no recipe"),
    (lambda run: run.evaluate("/nowhere"), "/nowhere"),
    (lambda run: run.insert(0).save("/nowhere/x"), "at least one expert"),
    (lambda run: run.prune(2), "needs one of"),
    (lambda run: run.upcycle(num_experts=4).save("/nowhere/x"), "nothing to upcycle"),
    (lambda run: run.save_pretrained("/tmp/x", dtype="int8"), "dtype='int8'"),
    (lambda run: jaxmoe.recipe("quickest"), "no such recipe"),
    (lambda run: jaxmoe.recipe("tiny", rooter="topk"), "rooter"),
    (lambda run: jaxmoe.recipe("tiny", router=3), "expected str"),
    (lambda run: jaxmoe.recipe("tiny", router="nope"), "'nope'"),
    (lambda run: jaxmoe.recipe("tiny", **{"train.steps": 3}), "steps"),
    (lambda run: jaxmoe.recipe(""), "--config is missing"),
    (lambda run: jaxmoe.from_pretrained("/nowhere"), "/nowhere"),
    (lambda run: jaxmoe.convert("/nowhere", "/nowhere/run"), "/nowhere"),
    (lambda run: run.save_pretrained("/proc"), "is there already"),
    (lambda run: run.clone(2).save("/proc"), "is there already"),
    (lambda run: run.clone(2).save(None), "path=None: expected a path"),
    (lambda run: run.clone("2"), "times='2': expected a whole number"),
    (lambda run: run.generate("x", temperature="hot"), "temperature='hot': expected float"),
    (lambda run: run.generate("x", max_tokens=2.5), "max_tokens=2.5: expected int"),
    (lambda run: run.evaluate(3), "text=3: expected a path"),
    (lambda run: run.save_pretrained(3), "path=3: expected a path"),
    (lambda run: jaxmoe.recipe(3), "3 is no recipe; give a name"),
    (lambda run: jaxmoe.open(None), "path=None: expected a path"),
    (lambda run: jaxmoe.from_pretrained(3), "path=3: expected a path"),
    (lambda run: jaxmoe.convert("/nowhere", None), "workdir=None: expected a path"),
    (lambda run: jaxmoe.fit(jaxmoe.recipe("tiny"), 3), "workdir=3: expected a path"),
  ],
)  # fmt: skip
def test_bad_input_is_one_line(run, use, words):
  with pytest.raises(jaxmoe.InputError) as found:
    use(run)
  assert words in str(found.value) and "\n" not in str(found.value)
