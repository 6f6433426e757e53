"""Multiple choice by likelihood, against sums of log probabilities of whole rows."""

import json

import jax.numpy as jnp
import numpy as np
import pytest

from jaxmoe.core.errors import InputError
from jaxmoe.core.rng import Keys
from jaxmoe.core.tokens import Tokens
from jaxmoe.data.tokenizers.byte import ByteTokenizer
from jaxmoe.models.attention import SoftmaxAttention
from jaxmoe.models.block import BlockConfig, MLPConfig
from jaxmoe.models.stack import LayerGroup
from jaxmoe.models.transformer import Decoder, TransformerConfig
from jaxmoe.train import multiple_choice
from jaxmoe.train.multiple_choice import Question, read_questions, score_questions

TOKENIZER = ByteTokenizer()
QUESTIONS = [
  Question("one plus one is ", ("two", "a hundred", "3"), 0),
  Question("the sky: ", ("green", "blue"), 1),
  Question("", ("yes", "no", "perhaps"), 2),
  Question("und ", ("z\u00f6\u00f6\u00f6", "aber"), 0),
]


@pytest.fixture(scope="module")
def model():
  block = BlockConfig(SoftmaxAttention(2, 1, 8), MLPConfig(16))
  decoder = Decoder(TransformerConfig(dim=16, stack=(LayerGroup((block,), 1),)), 257)
  return decoder, decoder.init(Keys.from_seed(5))


def logprob(model, question, choice):
  """The sum over an answer's bytes of log softmax, in float64, of one row."""
  decoder, params = model
  ids = np.array([256, *question.encode(), *choice.encode()], np.int32)
  row = np.pad(ids, (0, 48 - len(ids)))[None]
  hidden, _, _ = decoder.hidden(params, Tokens.of_ids(jnp.asarray(row)))
  logits = np.asarray(decoder.logits(params, hidden), np.float64)[0]
  share = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
  first = len(ids) - len(choice.encode())
  return sum(share[at - 1, ids[at]] for at in range(first, len(ids)))


@pytest.mark.parametrize("batch", [1, 4])
def test_the_likeliest_answer_wins(model, batch):
  sums = [[logprob(model, q.question, c) for c in q.choices] for q in QUESTIONS]
  best = [int(np.argmax(row)) for row in sums]
  by_byte = [
    int(np.argmax([x / len(c.encode()) for x, c in zip(row, q.choices)]))
    for row, q in zip(sums, QUESTIONS)
  ]
  found = score_questions(*model, TOKENIZER, QUESTIONS, (batch, 64))
  right = [q.answer for q in QUESTIONS]
  assert best != by_byte, "both scores would be one"
  assert found["accuracy"] == np.mean([a == b for a, b in zip(best, right)])
  assert found["accuracy_by_byte"] == np.mean([a == b for a, b in zip(by_byte, right)])
  assert found["chance"] == pytest.approx((1 / 3 + 1 / 2 + 1 / 3 + 1 / 2) / 4)
  # Had each its likeliest answer as the right one, all would be right.
  told = [Question(q.question, q.choices, index) for q, index in zip(QUESTIONS, best)]
  assert score_questions(*model, TOKENIZER, told, (batch, 64))["accuracy"] == 1


class Adds(ByteTokenizer):
  """Puts nothing before a prompt, as tokenizers of some public models do."""

  def encode_prompt(self, text):
    return self.encode(text)


def test_an_answer_alone_is_scored_whole_whatever_is_put_before_a_prompt(model):
  alone = [Question("", ("yes", "no", "perhaps"), 2)]
  found = [score_questions(*model, of, alone, (4, 64)) for of in (TOKENIZER, Adds())]
  assert found[0] == found[1]
  window, _ = multiple_choice._window(Adds(), "", "yes", 64)
  assert [row.tolist() for row in window] == [[256, *b"ye"], [*b"yes"]]
  window, _ = multiple_choice._window(Adds(), "ab", "yes", 64)
  assert [row.tolist() for row in window] == [[*b"abye"], [-1, *b"yes"]]


def test_a_long_question_loses_its_start_and_an_answer_nothing(model):
  long = [Question("x" * 100 + "and so ", ("it is", "not"), 0)]
  found = score_questions(*model, TOKENIZER, long, (2, 24))
  assert found["cut"] == 2
  with pytest.raises(InputError, match="has 25 tokens, and the context is 24"):
    score_questions(*model, TOKENIZER, [Question("", ("y" * 25, "n"), 0)], (2, 24))


@pytest.mark.parametrize(
  "line",
  [
    "{", "[]", "{}", '{"question": 1, "choices": ["a", "b"], "answer": 0}',
    '{"question": "", "choices": ["a"], "answer": 0}',
    '{"question": "", "choices": ["a", ""], "answer": 0}',
    '{"question": "", "choices": ["a", "b"], "answer": 2}',
    '{"question": "", "choices": ["a", "b"], "answer": true}',
    '{"question": "", "choices": ["a", "\\ud800"], "answer": 0}',
  ],
)  # fmt: skip
def test_a_line_that_is_no_question_is_refused_with_its_number(tmp_path, line):
  path = tmp_path / "questions.jsonl"
  good = json.dumps({"question": "", "choices": ["a", "b"], "answer": 0})
  path.write_text(f"{good}\n\n{line}\n")
  with pytest.raises(InputError, match=r"questions.jsonl:3: needs"):
    read_questions(path)


def test_a_byte_order_mark_is_no_part_of_the_first_question(tmp_path):
  plain = {"question": "q", "choices": ["a", "b"], "answer": 0}
  (tmp_path / "marked.jsonl").write_text(json.dumps(plain), encoding="utf-8-sig")
  assert read_questions(tmp_path / "marked.jsonl") == [Question("q", ("a", "b"), 0)]


def test_a_file_without_questions_is_refused(tmp_path):
  (tmp_path / "empty.jsonl").write_text("\n")
  for name, words in (("empty.jsonl", "has no line"), ("none.jsonl", "cannot be read")):
    with pytest.raises(InputError, match=words):
      read_questions(tmp_path / name)
