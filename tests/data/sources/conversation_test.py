"""What of public conversations is honoured, and what is refused by its name."""

import pytest

from jaxmoe.data.chat_format import PlainChatFormat
from jaxmoe.data.document import content_digest
from jaxmoe.data.sources.json_record import record_content, record_example
from jaxmoe.data.tokenizers.byte import Bytes


def _said(record, form=PlainChatFormat()):  # noqa: B008
  """Returns (the learned text, the rest) of a record, or its flaw."""
  content, flaw = record_content(record)
  flaw = flaw or form.find_error(content, None)
  if flaw:
    return flaw
  pieces = form.text(content, None)
  return tuple("".join(text for text, flag in pieces if flag == which) for which in (True, False))


def test_weight_and_train_say_what_is_learned():
  def said(*fields):
    turns = [{"role": role, "content": role[0]} for role in ("user", "assistant") * 2]
    for turn, more in zip(turns, fields):
      turn |= more
    return _said({"messages": turns})[0]

  assert said({}, {}, {}, {}) == "a\na\n"
  assert said({}, {"weight": 0}) == "a\n" == said({}, {"weight": 0.0}) == said({}, {"train": False})
  assert said({"weight": 1}, {"weight": 1, "train": True}, {"weight": None}) == "a\na\n"
  assert said({"train": True}, {"weight": 0, "train": False}) == "u\na\n"
  unlearned = {"role": "assistant", "content": "a", "weight": 0}
  content, _ = record_content({"messages": [unlearned] * 2})
  assert PlainChatFormat().find_error(content, None) == "no answer to learn from"
  tokenizer = Bytes().build((), "", None, print)
  content, _ = record_content({"messages": [{"role": "assistant", "content": "b"}, unlearned]})
  assert not PlainChatFormat().encode(content, tokenizer)[1][-1], "the end is the last answer's"


@pytest.mark.parametrize(
  ("fields", "flaw"),
  [
    ({"weight": 0.5}, "a 'weight' that is neither 0 nor 1"),
    ({"weight": "1"}, "a 'weight' that is neither 0 nor 1"),
    ({"train": "yes"}, "a 'train' that is neither true nor false"),
    ({"weight": 0, "train": True}, "a 'weight' and a 'train' that disagree"),
    ({"images": ["a.png"]}, "a message with 'images', which cannot be learned from"),
    ({"audio": {"id": "a"}}, "a message with 'audio', which cannot be learned from"),
    ({"function_call": {"name": "f"}}, "a message with 'function_call', which cannot be"),
    ({"content": [{"type": "image_url", "image_url": "x"}]}, "a part of the type 'image_url'"),
    ({"content": [{"type": "text", "text": None}]}, "not one of 'text'"),
    ({"tool_calls": [{"function": {"name": "f"}}]}, "'tool_calls', for which only a chat template"),
    ({"tool_calls": "{"}, "a 'tool_calls' that is not JSON"),
    ({"tool_calls": ["f"]}, "a 'tool_calls' that is not a list of objects"),
    ({"reasoning_content": "hm"}, "'reasoning_content', for which only a chat template"),
    ({"name": "A|>\n<|assistant"}, "a name that is more than words"),
    ({"content": None}, "not one of 'text'"),
  ],
)
def test_what_cannot_be_honoured_is_named(fields, flaw):
  turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a", **fields}]
  assert _said({"messages": turns}).startswith(flaw)


def test_what_says_nothing_is_as_if_it_were_not_there():
  empty = {"name": None, "tool_calls": [], "reasoning_content": "", "images": [], "weight": None,
           "audio": None, "id": 7}  # fmt: skip
  plain = [{"role": "user", "content": 'h\u00e9 "x"'}, {"role": "assistant", "content": "a\nb"}]
  full = [{**turn, **empty} for turn in plain]
  parts = [{**turn, "content": [{"type": "text", "text": letter} for letter in turn["content"]]}
           for turn in plain]  # fmt: skip
  # Made by the code of before any of these fields was read.
  digest, key = (
    "f4f12c64432a6e9182d90492552ba111",
    "01bd5d6ef4f5fea3fc2d8bcdc1bb5b2107cb0585c8a837d0cedc8ff55d3827ba",
  )
  for messages in (plain, full, parts):
    content, _ = record_content({"messages": messages, "tools": None, "images": []})
    assert content_digest(content).hex() == digest
    assert record_example("p", "n", content, "").split_key == key
  for more in ({"name": "Ann"}, {"weight": 0}, {"train": True}):
    other, _ = record_content({"messages": [plain[0], {**plain[1], **more}]})
    assert content_digest(other).hex() != digest


def test_a_name_stands_beside_the_role():
  turns = [{"role": "user", "name": "Ann-Lee O'Hara", "content": "q"},
           {"role": "assistant", "content": "a"}]  # fmt: skip
  assert _said({"messages": turns}) == ("a\n", "<|user Ann-Lee O'Hara|>\nq\n<|assistant|>\n")


@pytest.mark.parametrize(
  ("record", "wanted"),
  [
    ({"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
     ("a\n", "<|user|>\nq\n<|assistant|>\n")),
    ({"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}],
      "system": "S", "id": "x", "prompt": "ignored"},
     ("a\n", "<|system|>\nS\n<|user|>\nq\n<|assistant|>\n")),
    ({"conversations": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]},
     ("a\n", "<|user|>\nq\n<|assistant|>\n")),
    ({"conversations": [{"from": "gpt", "value": "a", "weight": 0},
                        {"from": "gpt", "value": "b"}]},
     ("b\n", "<|assistant|>\na\n<|assistant|>\n")),
    ({"conversations": [{"from": "function_call", "value": "{}"}]}, "a 'from' that is none of"),
    ({"messages": [{"role": "assistant", "content": "a"}], "conversations": 3, "prompt": "p",
      "completion": "c"}, ("a\n", "<|assistant|>\n")),
    ({"messages": [{"role": "assistant", "content": "a"}], "tools": [{"name": "f"}]},
     "'tools', for which only a chat template"),
    ({"messages": [{"role": "assistant", "content": "a"}], "images": ["b"]},
     "a record with 'images', which cannot be learned from"),
    ({"conversations": [], "prompt": "a", "completion": "b"}, "not one of 'text'"),
    ({"prompt": "2 + 2 = ", "completion": "4"}, "the text and what follows"),
  ],
)  # fmt: skip
def test_other_forms_of_conversations_are_read(record, wanted):
  if wanted == "the text and what follows":
    content, flaw = record_content(record)
    assert (content.prompt, content.completion, flaw) == ("2 + 2 = ", "4", "")
  elif isinstance(wanted, str):
    assert _said(record).startswith(wanted)
  else:
    assert _said(record) == wanted
