"""Which format conversations are trained on in, and what batches depend on of it."""

import dataclasses
import importlib
import json
import sys

import pytest

from jaxmoe.core.config_io import override
from jaxmoe.core.errors import InputError
from jaxmoe.data.chat_format import PlainChatFormat
from jaxmoe.data.corpus import open_corpus, read_documents
from jaxmoe.data.mixture import Data, MixturePart
from jaxmoe.data.sources.jsonl import Jsonl
from jaxmoe.data.tokenizers.bpe import Bpe
from jaxmoe.data.tokenizers.tokenizer_file import TokenizerFile

LINES = "\n".join(
  json.dumps({"messages": [{"role": "user", "content": f"<s> {i}"},
                           {"role": "assistant", "content": f"a {i}"}]}) for i in range(30)
)  # fmt: skip


def _documents(corpus):
  return [*corpus.train("talk"), *corpus.held_out("talk")]


def test_without_a_template_none_is_what_it_always_was(write_texts):
  part, said = MixturePart(Jsonl(write_texts({"talks.jsonl": LINES}), "talk")), []
  none, record = (
    open_corpus(Data((part,), held_out=0.3, chat=chat)) for chat in (None, PlainChatFormat())
  )
  assert none.fingerprint(2, 0) == record.fingerprint(2, 0)
  assert [a.ids.tolist() for a in _documents(none)] == [b.ids.tolist() for b in _documents(record)]
  changed = override(none.data, [("chat.before", "[{role}] ")])
  assert changed.chat == PlainChatFormat("[{role}] ")
  for data, word in ((none.data, "no chat template"), (changed, "as the recipe has it")):
    said.clear()
    open_corpus(data, progress=said.append)
    (line,) = (line for line in said if "chats are written" in line)
    assert word in line and repr((data.chat or PlainChatFormat()).before) in line


@pytest.fixture
def with_template(tmp_path, write_texts):
  """Returns a function to Data whose tokenizer has a template and special tokens of its own."""
  library = importlib.import_module("tokenizers")

  def make(template, **fields):
    made = library.Tokenizer.from_str(Bpe(257).build((), "", None, print)._plain["tokenizer"])
    made.add_special_tokens(["<s>", "<|im_end|>"])
    made.save(str(tmp_path / "tokenizer.json"))
    config = {"bos_token": {"content": "<s>"}, "eos_token": None, "chat_template": "unused"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "chat_template.jinja").write_text(template)
    part = MixturePart(Jsonl(write_texts({"talks.jsonl": LINES}, "talks"), "talk"))
    file = TokenizerFile(str(tmp_path / "tokenizer.json"), 300, start="<s>")
    return Data((part,), file, seq_len=32, held_out=0.3, **fields)

  return make


MARKED = (
  "{{ bos_token }}{% for m in messages %}{{ m.role ~ ':' ~ m.content }}<|im_end|>{% endfor %}"
)


def test_the_tokenizers_template_is_what_is_trained_on(with_template):
  pytest.importorskip("jinja2")
  said, data = [], with_template(MARKED)
  corpus = open_corpus(data, progress=said.append)
  (line,) = (line for line in said if "chats are written" in line)
  assert line.endswith("chat_template.jinja")
  start, end = 257, 258
  for document in _documents(corpus):
    ids, scored = document.ids_and_scored
    number = document.text.split("a ")[1]
    assert document.text == f"user:<s> {number}assistant:a {number}"
    assert ids.tolist().count(end) == 2 and ids.tolist().count(start) == 1
    assert corpus.tokenizer.decode(ids[scored[:-1]], special=True) == f"a {number}<|im_end|>"
    assert document.scored_bytes == len(f"a {number}") and not scored[-1]
  stream = corpus.stream(2, 0)
  batches = [next(stream) for _ in range(4)]
  stream.close()
  for batch in batches:
    begins = (batch["position"] == 0) & (batch["ids"] == start)
    # Once, where a document starts: what separates documents is what the template begins with.
    assert ((batch["ids"] == start) == begins).all() and begins.any()
  (name,) = (p.source for p in data.parts)
  texts, _ = read_documents([name], data, corpus.tokenizer, said.append)
  assert [document.text for of in texts.values() for document in of]
  assert "chats are written" in said[-1]


def test_text_needs_no_template_and_chats_without_jinja2_name_the_extra(
  with_template, write_texts, monkeypatch
):
  monkeypatch.setitem(sys.modules, "jinja2", None)
  data = with_template(MARKED)
  with pytest.raises(InputError, match=r"source 'talk': .* pip install 'jaxmoe\[chat\]'"):
    open_corpus(data)
  text = "\n".join(json.dumps({"text": f"plain {i}"}) for i in range(30))
  part = MixturePart(Jsonl(write_texts({"a.jsonl": text}, "plain"), "talk"))
  assert _documents(open_corpus(dataclasses.replace(data, parts=(part,))))


def test_a_record_that_is_given_wins_over_the_template(with_template):
  corpus = open_corpus(with_template(MARKED, chat=PlainChatFormat("[{role}] ")))
  assert all(document.text.startswith("[user] ") for document in _documents(corpus))


def test_the_templates_text_is_part_of_the_fingerprint_and_the_day_of_the_recipe(with_template):
  pytest.importorskip("jinja2")
  prints = [open_corpus(with_template(text)).fingerprint(2, 0) for text in (MARKED, MARKED + " ")]
  assert len(set(prints)) == 2
  assert open_corpus(with_template(MARKED)).fingerprint(2, 0) == prints[0]
  dated = MARKED + "{{ strftime_now('%d %b %Y, %H') }}"
  with pytest.raises(InputError, match=r"--config\.data\.chat_date=YEAR-MONTH-DAY"):
    open_corpus(with_template(dated))
  corpora = [open_corpus(with_template(dated, chat_date=f"2026-11-{day}")) for day in (29, 30)]
  assert _documents(corpora[1])[0].text.endswith("30 Nov 2026, 00")
  assert corpora[0].fingerprint(2, 0) != corpora[1].fingerprint(2, 0)
  with pytest.raises(InputError, match="chat_date must be a day"):
    with_template(dated, chat_date="today")


def test_a_template_that_is_broken_or_refuses_is_told(with_template):
  pytest.importorskip("jinja2")
  with pytest.raises(InputError, match=r"chat_template\.jinja: the chat template fails \(Template"):
    open_corpus(with_template("{{"))
  refusing = "{{ raise_exception('no users') }}"
  with pytest.raises(InputError, match=r"template fails \(TemplateError: no users\) \(30\)"):
    open_corpus(with_template(refusing))
  data = with_template(MARKED)
  folder = data.tokenizer.path.removesuffix("tokenizer.json")
  with open(f"{folder}chat_template.jinja", "wb") as file:
    file.write(b"\xff")
  with pytest.raises(InputError, match=r"chat_template\.jinja: cannot be read"):
    open_corpus(data)
