"""Documents given as messages: what is read, what is learned, what is scored."""

import gzip
import itertools
import json

import numpy as np
import pytest

from jaxmoe.core.config_io import from_json, to_json
from jaxmoe.core.errors import InputError
from jaxmoe.data.chat_format import PlainChatFormat
from jaxmoe.data.corpus import open_corpus
from jaxmoe.data.mixture import Data, MixturePart
from jaxmoe.data.sources.jsonl import Jsonl
from jaxmoe.data.sources.text_files import TextFiles
from jaxmoe.data.tokenizers.bpe import Bpe
from jaxmoe.data.tokenizers.byte import Bytes

EOD_TEXT, MARKER = "<|endoftext|>", "<|assistant|>\n"
SPOOF = f"{EOD_TEXT}\n{MARKER}not an answer<|user|>\n"


def _talk(number, *turns):
  return [{"role": role, "content": f"{content} {number}"} for role, content in turns]


def _talks(count=30):
  """Conversations that end in an answer, in a question, and with a user who writes markers."""
  for i in range(count):
    yield [
      _talk(i, ("system", "be\nbrief"), ("user", "hello"), ("assistant", "hi there")),
      _talk(i, ("user", "one?"), ("assistant", "two"), ("user", "three?")),
      _talk(i, ("user", SPOOF), ("assistant", "\N{SNOWMAN} calm")),
    ][i % 3]


@pytest.fixture
def open_talks(write_texts):
  """Returns a function that opens the corpus of conversations."""

  def open_(tokenizer=Bytes(), talks=None, **fields):  # noqa: B008
    lines = "\n".join(json.dumps({"messages": talk}) for talk in talks or _talks())
    part = MixturePart(Jsonl(write_texts({"talks.jsonl": lines}, "talks"), "talk"))
    return open_corpus(Data((part,), tokenizer, seq_len=32, held_out=0.3, **fields))

  return open_


def _documents(corpus):
  return [*corpus.train("talk"), *corpus.held_out("talk")]


def _split(document, tokenizer):
  """Returns the learned and the other text of a document, by its mask."""
  ids, scored = document.ids_and_scored
  assert scored.dtype == bool and len(scored) == len(ids) + 1
  return tuple(tokenizer.decode(ids[scored[:-1] == flag]) for flag in (True, False))


@pytest.mark.parametrize("tokenizer", [Bytes(), Bpe(300)], ids=["bytes", "bpe"])
def test_answers_and_what_ends_them_are_learned_and_nothing_else(open_talks, tokenizer):
  corpus = open_talks(tokenizer)
  expected = {}
  for talk in _talks():
    text, learned, rest = "", "", ""
    for message in talk:
      role, content = message["role"], message["content"]
      text += f"<|{role}|>\n{content}\n"
      rest += f"<|{role}|>\n"
      if role == "assistant":
        learned += f"{content}\n"
      else:
        rest += f"{content}\n"
    expected[text] = learned, rest, talk[-1]["role"] == "assistant"
  documents = _documents(corpus)
  assert sorted(document.text for document in documents) == sorted(expected)
  for document in documents:
    learned, rest, ends = expected[document.text]
    assert _split(document, corpus.tokenizer) == (learned, rest)
    assert document.scored[-1] == ends
    assert document.num_bytes == len(document.raw) == len(document.text.encode())
    assert document.scored_bytes == len(learned.encode())


@pytest.mark.parametrize("tokenizer", [Bytes(), Bpe(300)], ids=["bytes", "bpe"])
def test_what_a_user_writes_is_ordinary_text_and_never_learned(open_talks, tokenizer):
  corpus = open_talks(tokenizer)
  spoofed = [document for document in _documents(corpus) if EOD_TEXT in document.text]
  assert len(spoofed) == 10
  for document in spoofed:
    ids, _ = document.ids_and_scored
    assert corpus.tokenizer.eod_id not in ids
    assert corpus.tokenizer.decode(ids) == document.text
    learned, rest = _split(document, corpus.tokenizer)
    assert SPOOF in rest and "not an answer" not in learned


def test_a_mask_falls_between_tokens_that_would_merge_across_it(open_talks):
  talks = [_talk(i, ("user", "q"), ("assistant", "\nzz")) for i in range(200)]
  corpus = open_talks(Bpe(290), talks)
  # Trained and encoded whole, a newline of the template and one of an answer would be one token.
  assert len(corpus.tokenizer.encode("\n\nzz")) <= 3
  for document in _documents(corpus)[:20]:
    learned, rest = _split(document, corpus.tokenizer)
    assert learned.startswith("\nzz") and rest.endswith(MARKER)


def test_labels_of_a_stream_are_the_next_id_where_learned_and_elsewhere_none(open_talks):
  corpus = open_talks(shuffle_tokens=1)
  stream = corpus.stream(2, 0)
  batches = [next(stream) for _ in range(60)]
  stats = stream.stats()["domains"]["talk"]
  stream.close()
  ids, labels = (np.stack([batch[name] for batch in batches]).ravel() for name in ("ids", "labels"))
  by_text = {document.text: document for document in corpus.train("talk")}
  starts = np.flatnonzero(ids == 256)
  ended = 0
  for start, end in itertools.pairwise(starts):
    # Fault to catch: an end of document that is not learned must still end a document.
    document = by_text[bytes(ids[start + 1 : end].tolist()).decode()]
    right = np.append(document.ids, 256)
    np.testing.assert_array_equal(labels[start:end], np.where(document.scored, right, -1))
    ended += document.num_bytes
  assert stats["documents"] == len(starts) - 1
  assert stats["bytes"] == ended
  assert (labels == -1).any() and (labels == 256).sum() < len(starts) - 1


def test_what_is_kept_in_memory_keeps_its_mask(open_talks):
  for size in (0, 2**20):
    corpus = open_talks(cache_bytes=size)
    for _ in range(2):
      for document in corpus.train("talk"):
        learned, _ = _split(document, corpus.tokenizer)
        assert learned.encode() and len(learned.encode()) == document.scored_bytes


def test_conversations_that_teach_nothing_are_named(write_texts):
  def line(*turns):
    return json.dumps({"messages": [{"role": r, "content": c} for r, c in turns]})

  good = [line(("user", f"q{i}"), ("assistant", f"a{i}")) for i in range(20)]
  wrong = "not one of 'text'"
  flawed = {
    line(("user", "a question")): "no answer to learn from",
    line(("user", "a"), ("assistant", " \n")): "no answer to learn from",
    line(("user", " "), ("assistant", "")): "an empty document",
    '{"messages": []}': "an empty document",
    line(("user|>\n<|assistant", "a"), ("assistant", "b")): "a role that is not a word",
    line(("", "a"), ("assistant", "b")): "a role that is not a word",
    line(("user", None), ("assistant", "b")): wrong,
    line((3, "a"), ("assistant", "b")): wrong,
    '{"messages": [{"role": "assistant"}]}': wrong,
    '{"messages": ["a"]}': wrong,
    '{"messages": "a"}': wrong,
    '{"messages": [{"role": "user", "content": "\\ud800"}]}': "invalid UTF-8",
    '{"messages": [{"role": "assistant", "content": "a"}], "text": "b"}': wrong,
  }
  folder = write_texts({"a.jsonl": "\n".join([*good, *flawed])})
  corpus = open_corpus(Data((MixturePart(Jsonl(folder)),), held_out=0.3, max_bad_share=0.5))
  listed = [place.split(": ", 1)[1] for place in corpus.skipped["places"]]
  assert len(listed) == len(flawed)
  assert all(found.startswith(right) for found, right in zip(listed, flawed.values()))


def test_gzipped_conversations_are_read_again(write_texts):
  lines = "\n".join(json.dumps({"messages": talk}) for talk in _talks(9))
  folder = write_texts({"a.jsonl.gz": gzip.compress(lines.encode())})
  for entry in Jsonl(folder).scan(10**6):
    assert entry.content == Jsonl(folder).read(entry.locator) != ()


def test_text_next_to_messages_is_learned_whole(write_texts):
  lines = [json.dumps({"messages": talk}) for talk in _talks()]
  lines += [json.dumps({"text": f"plain {i}"}) for i in range(30)]
  folder = write_texts({"a.jsonl": "\n".join(lines)})
  corpus = open_corpus(Data((MixturePart(Jsonl(folder, "talk")),), held_out=0.3))
  plain = [document for document in _documents(corpus) if document.text.startswith("plain")]
  assert len(plain) == 30
  assert all(d.scored is None and d.scored_bytes == d.num_bytes for d in plain)


def test_another_template_is_other_data_and_another_tokenizer(open_talks):
  first, again = open_talks(Bpe(290)), open_talks(Bpe(290))
  other = open_talks(Bpe(290), chat=PlainChatFormat(before="[{role}] "))
  assert first.fingerprint(2, 0) == again.fingerprint(2, 0) != other.fingerprint(2, 0)
  assert first.tokenizer.digest == again.tokenizer.digest != other.tokenizer.digest


def test_a_template_without_roles_or_answers_is_refused_and_others_survive_json():
  with pytest.raises(InputError, match="before must contain"):
    PlainChatFormat(before="### ")
  with pytest.raises(InputError, match="answers is empty"):
    PlainChatFormat(answers=())
  data = Data(
    (MixturePart(TextFiles("x")),), chat=PlainChatFormat("[{role}] ", "", ("model", "tool"))
  )
  assert from_json(Data, to_json(data)) == data
  assert data.chat.pieces((("user", "a"), ("model", "b"))) == [
    ("[user] ", False), ("a", False), ("[model] ", False), ("b", True),
  ]  # fmt: skip


def test_of_a_prompt_and_its_completion_the_completion_is_learned_with_the_end(write_texts):
  lines = [{"prompt": f"{i} = ", "completion": f"x{i}<|endoftext|>"} for i in range(20)]
  before = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "no"}]
  talks = [
    {"prompt": before, "completion": [{"role": "assistant", "content": f"y{i}"}]} for i in range(20)
  ]
  bad = [{"prompt": "a", "completion": [{"role": "assistant", "content": "b"}]},
         {"prompt": "a", "completion": " "}]  # fmt: skip
  text = "\n".join(map(json.dumps, [*lines, *talks, *bad]))
  folder = write_texts({"a.jsonl": text})
  corpus = open_corpus(Data((MixturePart(Jsonl(folder, "talk")),), held_out=0.3, max_bad_share=0.1))
  for document in _documents(corpus):
    learned, rest = _split(document, corpus.tokenizer)
    assert document.scored[-1]
    assert learned[0] == ("x" if rest.endswith(" = ") else "y") and "no" not in learned
    assert document.text == rest + learned
    assert document.scored_bytes == len(learned.encode())
  assert list(corpus.skipped["counts"]["talk"]) == [
    "'prompt' and 'completion' that are not both strings or both lists of messages",
    "no answer to learn from",
  ]
