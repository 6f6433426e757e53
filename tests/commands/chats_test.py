"""A run's chats: settled when it is made, trained in one format and asked in the same."""

import dataclasses
import datetime
import json
import pathlib
import shutil
import sys

import pytest

from jaxmoe.conversion import hf_export
from jaxmoe.conversion.hf_files import FOLDER
from jaxmoe.core.config_io import from_plain, to_plain
from jaxmoe.data.chat_format import PlainChatFormat
from jaxmoe.data.tokenizers import load_tokenizer
from jaxmoe.data.tokenizers.template_file import find_template
from jaxmoe.runs.chat_prompt import prompt_format
from jaxmoe.runs.recipe_loading import load_recipe
from jaxmoe.train.chat_date import settle_chat_date
from jaxmoe.train.workdir import Workdir
from tests.models.pretrained.checkpoint import write_checkpoint

ROOT = pathlib.Path(__file__).parents[2]
TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}<|end|>\n{% endfor %}it: "
DATED = TEMPLATE + "{# {{ strftime_now('%Y') }} #}"
TALKS = [[{"role": "user", "content": f"say {word}"}, {"role": "assistant", "content": word}]
         for word in ("ab", "cd", "ef", "gh", "ij", "kl", "mn", "op", "qr", "st")]  # fmt: skip


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
  """Returns a checkpoint with a template that knows of the date."""
  folder = tmp_path_factory.mktemp("checkpoint") / "llama"
  write_checkpoint("llama", folder)
  (folder / "chat_template.jinja").write_text(DATED)
  return folder


@pytest.fixture(scope="module")
def text(tmp_path_factory):
  path = tmp_path_factory.mktemp("text") / "talks.jsonl"
  path.write_text("\n".join(json.dumps({"messages": talk}) for talk in TALKS))
  return path


@pytest.fixture(scope="module")
def converted(here, checkpoint, text, tmp_path_factory):
  """Returns the run of the checkpoint; not to be changed."""
  run = tmp_path_factory.mktemp("converted") / "run"
  changes = ("train.num_steps=1", "train.batch_size=2", "data.seq_len=32", "data.held_out=0.2",
             "samples.every=0", "evaluation.every=0", "optim.schedule.warmup_steps=0")  # fmt: skip
  flags = (f"--from_hf={checkpoint}", f"--workdir={run}", f"--text={text}")
  result = here("convert", *flags, *(f"--config.{change}" for change in changes))
  assert result.code == 0, result
  return run


@pytest.fixture
def run(converted, tmp_path):
  """Returns a copy of the run whose tokenizer is where its recipe says."""
  shutil.copytree(converted, tmp_path / "run")
  return tmp_path / "run"


def with_data(experiment, **fields):
  return dataclasses.replace(experiment, data=dataclasses.replace(experiment.data, **fields))


def test_the_date_is_set_when_a_run_is_made_and_stays(converted):
  made = Workdir(converted).experiment()
  today = datetime.datetime.now(datetime.UTC).date()
  assert abs((datetime.date.fromisoformat(made.data.chat_date) - today).days) <= 1
  assert made.data.chat is None
  undated = with_data(made, chat_date=None)
  assert settle_chat_date(undated).data.chat_date == today.isoformat()
  old = with_data(made, chat_date="2020-01-31")
  assert settle_chat_date(undated, to_plain(old)) == old
  # What was asked for is kept, and then refused where the run is another.
  assert settle_chat_date(made, to_plain(old)) == made
  record = with_data(undated, chat=PlainChatFormat("{role}"))
  assert settle_chat_date(record) == record


def test_a_recipe_without_a_template_has_no_date(tiny):
  experiment = load_recipe(tiny.removeprefix("--config="), [])
  assert settle_chat_date(experiment) == experiment
  assert experiment.data.chat is experiment.data.chat_date is None


def test_a_run_begun_when_recipes_held_a_format_goes_on_with_the_same_command(tiny):
  spec = tiny.removeprefix("--config=")
  plain = to_plain(with_data(load_recipe(spec, []), chat=PlainChatFormat()))
  del plain["data"]["chat_date"]
  again = settle_chat_date(load_recipe(spec, [], plain), plain)
  assert again.data.chat == PlainChatFormat()
  assert again == from_plain(type(again), plain)
  plain["data"]["chat"]["before"] = "[{role}]"
  assert load_recipe(spec, [], plain).data.chat is None, "another format is another config"
  del plain["data"]["chat"]
  assert from_plain(type(again), plain).data.chat == PlainChatFormat(), (
    "none is of before there was one"
  )


def test_training_on_a_template_without_jinja2_names_the_extra(run, here, monkeypatch, tmp_path):
  monkeypatch.setitem(sys.modules, "jinja2", None)
  out = tmp_path / "new"
  result = here("train", f"--config={run}/config.json", f"--workdir={out}")
  assert result.code == 2 and not out.exists()
  assert "pip install 'jaxmoe[chat]'" in result.err and result.err.count("\n") == 1


def test_a_run_is_asked_in_the_format_that_it_is_trained_in(run, here):
  pytest.importorskip("jinja2")
  result = here("train", f"--config={run}/config.json", f"--workdir={run}")
  assert result.code == 0, result
  experiment = Workdir(run).experiment()
  (line,) = (line for line in result.out.splitlines() if "chats are written" in line)
  assert line.endswith(f"chat_template.jinja, of {experiment.data.chat_date}")
  for chat, name, text in (
    (None, "the template of ", "user: hi<|end|>\nit: "),
    (PlainChatFormat("({role}) "), "'({role}) ' before", "<|end|>(user) hi\n(assistant) "),
  ):  # fmt: skip
    asked = prompt_format(run / FOLDER, with_data(experiment, chat=chat), trained=True)
    tokenizer = load_tokenizer(run / "tokenizer.json")
    assert asked.name.startswith(name)
    assert tokenizer.decode(asked.encode(tokenizer, [("user", "hi")]), special=True) == text


def test_an_export_has_the_template_that_messages_were_trained_in(run, tmp_path, capsys):
  experiment = Workdir(run).experiment()
  hf_export._write_tokenizer(tmp_path, run / "tokenizer.json", experiment, print)
  assert find_template(tmp_path).text == DATED
  other = with_data(experiment, tokenizer=dataclasses.replace(experiment.data.tokenizer, path="x"))
  hf_export._write_tokenizer(tmp_path, run / "tokenizer.json", other, print)
  assert find_template(tmp_path) is None
  assert capsys.readouterr().out.startswith("note: the checkpoint has no chat template: x: no such")


def test_a_run_of_ones_own_is_asked_as_messages_are_written(trained):
  asked = prompt_format(trained / FOLDER, Workdir(trained).experiment(), trained=True)
  found = asked.encode(load_tokenizer(trained / "tokenizer.json"), [("system", "S"), ("user", "q")])
  assert found.tolist() == [256, *b"<|system|>\nS\n<|user|>\nq\n<|assistant|>\n"]


def test_names_of_files_control_no_terminal_when_a_run_starts(here, tmp_path):
  folder = tmp_path / "text"
  folder.mkdir()
  (folder / "\x1b[2J.txt").write_bytes(b"\xff")
  for at in range(3):
    (folder / f"{at}.txt").write_text("words " * 9)
  recipe = f"--config={ROOT}/configs/quickstart.py:text={folder}"
  result = here("train", recipe, f"--workdir={tmp_path}/run", "--config.data.max_bad_share=0.5")
  assert result.code == 2 and "\x1b" not in result.out + result.err
  assert r"\x1b[2J.txt" in result.out, "skipped, before none is held out"
